#include "native/addon/cpu_calls.h"

#include <sched.h>

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

}  // namespace

void export_cpu_calls(Napi::Env env, Napi::Object exports) { exports.Set("cpu", Napi::Function::New(env, cpu_call)); }

}  // namespace pi2
