#pragma once
#include <napi.h>

namespace pi2 {

/** openEngine and memoryNeeded of src/engine/contract.ts. */
void export_engine_calls(Napi::Env env, Napi::Object exports);

}  // namespace pi2
