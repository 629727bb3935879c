#pragma once
/**
 * The model's weights in memory. Resident tensors keep their form on flash. Bundles are taken apart into one array a matrix,
 * rows of weights and scales without padding: kernels then read each matrix as one stream.
 */
#include <string>
#include <unordered_map>
#include <vector>

#include "native/base/memory.h"
#include "native/base/status.h"
#include "native/engine/config.h"
#include "native/kernels/kernels.h"

namespace pi2 {

/** A matrix of encoded rows [rows x columns]; no rows if the model has none of it. */
struct Matrix {
  const uint8_t* data = nullptr;
  Encoding encoding = Encoding::kF32;
  size_t rows = 0;
  size_t columns = 0;

  bool exists() const { return data != nullptr; }
  size_t row_bytes() const { return pi2::row_bytes(encoding, columns); }
  size_t bytes() const { return rows * row_bytes(); }
  /** Rows from `first` on. */
  Rows rows_from(size_t first) const {
    const uint8_t* row = data + first * row_bytes();
    return {row, row + weight_bytes(encoding, columns), row_bytes()};
  }
  const float* floats() const { return reinterpret_cast<const float*>(data); }
};

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

  /** Memory of `bytes` bytes at `offset` of resident.bin, or null if they were not loaded. */
  const uint8_t* resident_at(const EngineConfig& config, size_t offset, size_t bytes) const;

  /** Bytes that `load` takes for resident.bin, and for all neurons unless they are streamed. */
  static size_t resident_bytes_needed(const EngineConfig& config);
  static size_t neuron_bytes_needed(const EngineConfig& config);
  size_t bytes() const { return resident_.bytes() + neurons_.bytes(); }

 private:
  Status load_resident(const EngineConfig& config);
  Status load_neurons(const EngineConfig& config);
  Status bind(const EngineConfig& config);

  std::vector<size_t> places_;  // (extent): where it begins in resident_
  HugeMemory resident_;
  HugeMemory neurons_;
  std::unordered_map<std::string, Matrix> tensors_;
};

}  // namespace pi2
