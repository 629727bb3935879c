#pragma once
#include <napi.h>

#include "native/engine/engine.h"

namespace pi2 {

/** EngineCounters of src/engine/counters.ts. */
Napi::Object counters_object(Napi::Env env, const Engine& engine);

/** UnitTimes of src/engine/contract.ts. */
Napi::Object unit_times_object(Napi::Env env, const UnitTimes& times);

}  // namespace pi2
