#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "native/engine/bundle_layout.h"
#include "native/kernels/encoding.h"

namespace pi2 {

/** Root-mean-square norm, or layer norm with a mean and a bias. */
enum class NormKind { kRms, kLayer };

/** What a neuron contributes, from g = gate . x and u = up . x; src/format/hyperparameters.ts has the table. */
enum class ActivationKind { kSilu, kRelu, kDRelu, kFatRelu };

/** A range of a file with its checksum. */
struct ExtentConfig {
  std::string name;
  bool is_neurons;
  size_t offset;
  size_t bytes;
  uint32_t crc32;
};

/** A matrix in resident.bin, at its file offset. */
struct TensorConfig {
  std::string name;
  size_t offset;
  size_t bytes;
  Encoding encoding;
  size_t rows;
  size_t columns;
};

/** EngineRequest of src/engine/contract.ts. */
struct EngineConfig {
  std::string resident_path;
  std::string neurons_path;
  std::vector<ExtentConfig> extents;
  std::vector<TensorConfig> tensors;
  std::vector<size_t> expert_offsets;  // (layer, expert)
  BundleLayout layout;
  Encoding ffn_encoding;
  size_t hidden_size;
  size_t layer_count;
  size_t head_count;
  size_t kv_head_count;
  size_t head_dim;
  size_t neuron_count;
  size_t vocab_size;
  NormKind norm_kind;
  float norm_epsilon;
  std::vector<float> rope_frequencies;  // (head_dim / 2), empty for learned positions
  std::vector<size_t> windows;          // (layer), 0 is unlimited
  bool gated;
  ActivationKind activation;
  float threshold;
  size_t expert_count;
  size_t experts_per_token;
  size_t context_length;
  size_t threads;
  std::string kernel_set;
  size_t batch_size;

  size_t query_size() const { return head_count * head_dim; }
  size_t kv_size() const { return kv_head_count * head_dim; }
};

}  // namespace pi2
