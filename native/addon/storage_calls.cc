#include "native/addon/storage_calls.h"

#include <memory>
#include <string>

#include "native/addon/task.h"
#include "native/base/memory.h"
#include "native/storage/bandwidth.h"
#include "native/storage/page_cache.h"
#include "native/storage/reader.h"

namespace pi2 {
namespace {

Napi::Value page_cache_bytes_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 1 || !info[0].IsString()) {
    return Task::refuse(env, Status::argument("pageCacheBytes takes a path"));
  }
  const std::string path = info[0].As<Napi::String>().Utf8Value();
  auto share = std::make_shared<PageCacheShare>();
  return Task::run(
      env, {}, [path, share] { return page_cache_share(path, share.get()); },
      [share](Napi::Env e) -> Napi::Value {
        if (!share->is_known) return e.Null();
        return Napi::Number::New(e, static_cast<double>(share->bytes));
      });
}

Napi::Value measure_flash_bandwidth_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  const std::string path = fields.text("path");
  FlashProbe probe;
  probe.block_bytes = fields.size("blockBytes");
  probe.lanes = fields.size("lanes");
  probe.random = fields.boolean("random");
  probe.seconds = fields.number("seconds");
  if (probe.block_bytes == 0 || probe.block_bytes % kPageBytes != 0 || probe.block_bytes > size_t{1} << 30) {
    fields.fail("blockBytes must be whole pages, at most 1 GiB");
  }
  if (probe.lanes == 0 || probe.lanes > 1024) fields.fail("lanes must be 1 to 1024");
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
  auto rate = std::make_shared<double>(0);
  auto how = std::make_shared<std::string>();
  return Task::run(
      env, {}, [path, probe, rate, how] { return measure_flash_bandwidth(path, probe, rate.get(), how.get()); },
      [rate, how](Napi::Env e) -> Napi::Value {
        Napi::Object result = Napi::Object::New(e);
        result.Set("bytesPerSecond", Napi::Number::New(e, *rate));
        result.Set("how", Napi::String::New(e, *how));
        return result;
      });
}

Napi::Value allocate_pages_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  constexpr double kMostBytes = static_cast<double>(size_t{1} << 48);
  const double bytes = info.Length() >= 1 && info[0].IsNumber() ? info[0].As<Napi::Number>().DoubleValue() : 0;
  auto memory = std::make_unique<HugeMemory>();
  Status status = bytes >= 1 && bytes <= kMostBytes ? memory->allocate(static_cast<size_t>(bytes), "a buffer")
                                                    : Status::argument("allocatePages takes a number of bytes");
  if (!status.is_ok()) {
    to_error(env, status).ThrowAsJavaScriptException();
    return env.Undefined();
  }
  HugeMemory* const owned = memory.release();
  return Napi::ArrayBuffer::New(
      env, owned->data(), owned->bytes(), [](Napi::Env, void*, HugeMemory* done) { delete done; }, owned);
}

}  // namespace

void export_storage_calls(Napi::Env env, Napi::Object exports) {
  exports.Set("pageCacheBytes", Napi::Function::New(env, page_cache_bytes_call));
  exports.Set("allocatePages", Napi::Function::New(env, allocate_pages_call));
  exports.Set("measureFlashBandwidth", Napi::Function::New(env, measure_flash_bandwidth_call));
}

}  // namespace pi2
