#include "native/addon/storage_calls.h"

#include <memory>
#include <string>

#include "native/addon/task.h"
#include "native/storage/page_cache.h"

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

}  // namespace

void export_storage_calls(Napi::Env env, Napi::Object exports) {
  exports.Set("pageCacheBytes", Napi::Function::New(env, page_cache_bytes_call));
}

}  // namespace pi2
