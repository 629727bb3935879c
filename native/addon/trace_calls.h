#pragma once
#include <napi.h>

#include "native/base/trace.h"

namespace pi2 {

/** {records, dropped} of what a trace holds, which is then empty; no records of null. */
Napi::Value drained_trace(Napi::Env env, Trace* trace);

/** traceStages of src/engine/contract.ts. */
void export_trace_calls(Napi::Env env, Napi::Object exports);

}  // namespace pi2
