#pragma once
#include <napi.h>

#include "native/engine/engine.h"

namespace pi2 {

/** EngineCounters of src/engine/counters.ts. */
Napi::Object counters_object(Napi::Env env, const Engine& engine);

}  // namespace pi2
