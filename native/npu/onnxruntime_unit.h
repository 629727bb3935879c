#pragma once
/** The dense unit that runs a model's graphs by ONNX Runtime: on the CPU, or on an NPU by a provider that is a plug-in. */
#include <memory>
#include <vector>

#include "native/npu/dense_unit.h"
#include "native/npu/onnxruntime_config.h"

namespace pi2 {

/**
 * Loads the library, maps the weights, registers the provider and starts the unit's threads; graphs come with
 * `DenseUnit::load`. Nothing in `config` is believed: files that are missing, too short or name bytes outside a bank, and
 * libraries that are something else, are refused in words for a person.
 */
Status open_onnxruntime_unit(const OnnxruntimeConfig& config, std::unique_ptr<DenseUnit>* unit);

/**
 * An upper bound of the bytes that a unit holds with the graphs of `shapes` loaded, library and window included: what a plan
 * counts. The CPU provider keeps weights packed, with sums of blocks beside them; of another one this is what the process
 * holds, not what an NPU has of its own.
 */
size_t onnxruntime_memory_needed(const OnnxruntimeConfig& config, const std::vector<GraphShape>& shapes);

}  // namespace pi2
