#pragma once
/**
 * The model's weights in memory. Resident tensors keep their form on flash. Bundles are taken apart into one array a matrix,
 * rows of weights and scales without padding: kernels then read each matrix as one stream.
 */
#include <span>
#include <vector>

#include "native/base/memory.h"
#include "native/base/status.h"
#include "native/engine/config.h"
#include "native/engine/matrix.h"
#include "native/engine/tensor_file.h"

namespace pi2 {

/** One FFN: gate [neurons x hidden] (absent if the FFN has two matrices), up [neurons x hidden], down columns likewise. */
struct ExpertWeights {
  Matrix gate;
  Matrix up;
  Matrix down;  // row i is column i of Down
};

struct LayerWeights {
  Matrix attention_norm, attention_norm_bias;
  Matrix q, k, v, o;
  Matrix q_bias, k_bias, v_bias, o_bias;
  Matrix q_norm, k_norm;
  Matrix ffn_norm, ffn_norm_bias;
  Matrix router;
  Matrix up_bias, down_bias;
  std::vector<ExpertWeights> experts;
};

class Weights {
 public:
  /** Reads and checks every extent. The tensors that a layer cannot do without must be there, in the right shape. */
  Status load(const EngineConfig& config);

  Matrix embedding, position_embedding;
  std::vector<LayerWeights> layers;
  Matrix output_norm, output_norm_bias;
  Matrix head;  // the embedding, when tied

  /** resident.bin, as far as it was loaded. */
  const TensorFile& resident() const { return resident_; }

  /** Bytes that `load` takes for resident.bin, and for all neurons unless they are streamed. */
  static size_t resident_bytes_needed(const EngineConfig& config) { return TensorFile::bytes_needed(config.extents); }
  static size_t neuron_bytes_needed(const EngineConfig& config);
  size_t bytes() const { return resident_.bytes() + neurons_.bytes(); }
  /** What is in memory, all of it filled. */
  std::vector<std::span<const uint8_t>> memory() const { return {resident_.memory(), {neurons_.data(), neurons_.bytes()}}; }

 private:
  Status load_neurons(const EngineConfig& config);
  Status bind(const EngineConfig& config);

  TensorFile resident_;
  HugeMemory neurons_;
};

}  // namespace pi2
