#pragma once
#include <napi.h>

namespace pi2 {

/** Calls about files: `pageCacheBytes`, `measureFlashBandwidth`. */
void export_storage_calls(Napi::Env env, Napi::Object exports);

}  // namespace pi2
