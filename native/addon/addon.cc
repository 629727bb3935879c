/** The native side of src/engine/contract.ts: what JavaScript can call. */
#include <napi.h>

#include "native/addon/cache_calls.h"
#include "native/addon/converter_calls.h"
#include "native/addon/cpu_calls.h"
#include "native/addon/engine_object.h"
#include "native/addon/predictor_calls.h"
#include "native/addon/storage_calls.h"
#include "native/addon/trace_calls.h"

static Napi::Object init(Napi::Env env, Napi::Object exports) {
  pi2::export_cache_calls(env, exports);
  pi2::export_converter_calls(env, exports);
  pi2::export_cpu_calls(env, exports);
  pi2::export_engine_calls(env, exports);
  pi2::export_predictor_calls(env, exports);
  pi2::export_storage_calls(env, exports);
  pi2::export_trace_calls(env, exports);
  return exports;
}

NODE_API_MODULE(pi2, init)
