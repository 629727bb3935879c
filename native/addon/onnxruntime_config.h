#pragma once
#include "native/addon/arguments.h"
#include "native/npu/onnxruntime_config.h"

namespace pi2 {

/** Reads an `OnnxruntimeRequest` (src/npu/onnxruntime-request.ts). */
Status read_onnxruntime_config(const Napi::Value& request, OnnxruntimeConfig* config);

}  // namespace pi2
