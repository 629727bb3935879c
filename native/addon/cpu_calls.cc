#include "native/addon/cpu_calls.h"

#include <sched.h>

#include <cstring>
#include <memory>

#include "native/addon/task.h"
#include "native/base/bandwidth.h"
#include "native/base/memory.h"
#include "native/kernels/dispatch.h"

namespace pi2 {
namespace {

Napi::Value cpu_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array sets = Napi::Array::New(env);
  for (const Kernels* kernels : available_kernels()) sets.Set(sets.Length(), Napi::String::New(env, kernels->name));
  Napi::Array features = Napi::Array::New(env);
  for (const std::string& feature : cpu_features()) features.Set(features.Length(), Napi::String::New(env, feature));
  cpu_set_t allowed;
  const int cores = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
  Napi::Object object = Napi::Object::New(env);
  object.Set("kernelSets", sets);
  object.Set("features", features);
  object.Set("cores", Napi::Number::New(env, cores));
  return object;
}

Napi::Value measure_read_bandwidth_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  const size_t threads = fields.size("threads");
  const size_t bytes = fields.size("bytes");
  if (threads == 0 || threads > 1024 || bytes < 1 << 20) fields.fail("threads must be 1 to 1024, bytes at least 1 MiB");
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
  auto rate = std::make_shared<double>(0);
  const auto measure = [threads, bytes, rate] {
    HugeMemory memory;
    Status status = memory.allocate(bytes, "the memory test");
    if (!status.is_ok()) return status;
    std::memset(memory.data(), 1, bytes);
    ThreadPool pool(threads);
    *rate = measure_read_bandwidth(pool, {{memory.data(), bytes}});
    return status;
  };
  return Task::run(env, {}, measure, [rate](Napi::Env e) { return Napi::Number::New(e, *rate); });
}

}  // namespace

void export_cpu_calls(Napi::Env env, Napi::Object exports) {
  exports.Set("cpu", Napi::Function::New(env, cpu_call));
  exports.Set("measureReadBandwidth", Napi::Function::New(env, measure_read_bandwidth_call));
}

}  // namespace pi2
