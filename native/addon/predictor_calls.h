#pragma once
#include <napi.h>

namespace pi2 {

/** trainPredictor and scorePredictor of src/engine/contract.ts. */
void export_predictor_calls(Napi::Env env, Napi::Object exports);

}  // namespace pi2
