#pragma once
#include <napi.h>

namespace pi2 {

/** cpu and measureReadBandwidth of src/engine/contract.ts. */
void export_cpu_calls(Napi::Env env, Napi::Object exports);

}  // namespace pi2
