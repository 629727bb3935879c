#pragma once
/** What the unit `onnxruntime` is opened with: src/npu/onnxruntime-unit.ts makes it out of a model directory and a profile.
 */
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "native/npu/dense_unit.h"

namespace pi2 {

/** An initializer of a graph, and where a bank has its bytes. */
struct OnnxruntimeTensor {
  std::string name;
  /** ONNX's number of the element type; 1 is float, 2 is uint8. */
  int element_type = 0;
  std::vector<int64_t> dimensions;
  /** Behind the start of the bank. */
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

/** The graph of one shape, which all banks share. */
struct OnnxruntimeGraph {
  GraphShape shape;
  std::string path;
  std::vector<OnnxruntimeTensor> tensors;
};

/** What computes graphs: an execution provider of ONNX Runtime. */
struct OnnxruntimeProvider {
  /** As the library names its devices: `QNNExecutionProvider`. Empty: the CPU provider, with nothing to be set. */
  std::string name;
  /** Plug-in to register first; empty: the provider is part of ONNX Runtime. */
  std::string library;
  std::vector<std::pair<std::string, std::string>> options;
  /** Entries of the session's configuration: `session.disable_cpu_ep_fallback`. */
  std::vector<std::pair<std::string, std::string>> session_options;
  /** Directory of compiled graphs (EPContext models), written at first and opened later; empty: compiled each time. */
  std::string contexts;
};

struct OnnxruntimeConfig {
  /** Path of libonnxruntime.so.1, or a name for the loader to look for. */
  std::string library;
  std::vector<OnnxruntimeGraph> graphs;
  /** File of the weights, and where each bank begins in it. */
  std::string weights;
  std::vector<uint64_t> bank_offsets;
  uint64_t bank_bytes = 0;
  size_t hidden = 0;
  OnnxruntimeProvider provider;
};

}  // namespace pi2
