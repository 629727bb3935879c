#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "native/cache/neuron_cache.h"
#include "native/engine/bundle_layout.h"
#include "native/kernels/encoding.h"
#include "native/npu/unit_config.h"
#include "native/storage/reader.h"

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

/** How neurons are kept and read when not all of them fit in memory; StreamRequest of src/engine/contract.ts. */
struct StreamConfig {
  std::vector<BankPlan> banks;  // (layer, expert); empty: every neuron is resident
  size_t staging_bytes = 0;     // of reads on their way and of bytes being computed, two halves
  ReadMode mode = ReadMode::kDirect;
  ReadBackend backend = ReadBackend::kThreads;
  size_t lanes = 0;
  /**
   * Whether the gate of a missing neuron is read first, and its rows only if it fires (paper section 1.6). By default what
   * a few reads at open show to be faster.
   */
  std::optional<bool> two_phase;
  CachePolicy policy = CachePolicy::kFrequency;
  /** Memory for reads that are guessed before attention, for the FFN behind it; 0: none are. */
  size_t prefetch_bytes = 0;
  /** False takes a step away, to be measured: rows of a neuron side by side; computing while reads are on their way. */
  bool bundles = true;
  bool pipeline = true;
  /** (layer, expert, neuron): share of its bank's tokens that each neuron fires for on calibration text; may be empty. */
  std::vector<float> firing_rates;
  ReaderTrial trial;

  bool enabled() const { return !banks.empty(); }
};

/** What a predictor's first matrix multiplies. */
enum class PredictorInput { kResidual, kFfnNorm };

/** PredictorRequest of src/engine/contract.ts. */
struct PredictorConfig {
  std::string path;  // empty: no predictor
  std::vector<ExtentConfig> extents;
  std::vector<TensorConfig> tensors;
  PredictorInput input = PredictorInput::kFfnNorm;
  std::vector<float> memory_thresholds;  // (layer)
  std::vector<float> flash_thresholds;   // (layer)
  /** Neurons of a bank from this one on count as on flash, wherever they are. */
  size_t flash_from = SIZE_MAX;

  bool enabled() const { return !path.empty(); }
};

/** EngineRequest of src/engine/contract.ts. */
struct EngineConfig {
  std::string resident_path;
  std::string neurons_path;
  std::vector<ExtentConfig> extents;
  std::vector<TensorConfig> tensors;
  std::vector<size_t> expert_offsets;  // (layer, expert)
  /** (layer, expert): where in resident.bin its heat order is; empty: neurons are in the order of the checkpoint. */
  std::vector<size_t> order_offsets;
  /** (layer, expert): where in resident.bin the CRC-32 of each neuron's two parts are. Of streamed neurons only. */
  std::vector<size_t> checksum_offsets;
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
  size_t context_length;  // positions of a sequence, and of all sequences together
  size_t sequences = 1;   // that the KV cache holds at a time
  size_t threads;
  std::string kernel_set;
  size_t batch_size;  // most tokens computed together
  StreamConfig stream;
  PredictorConfig predictor;
  UnitConfig unit;
  /** Files are mapped and every neuron is computed: a baseline, without stream and predictor. */
  bool mapped = false;
  /** Records of each thread's trace; 0: nothing is traced. */
  size_t trace_records = 0;

  size_t query_size() const { return head_count * head_dim; }
  size_t kv_size() const { return kv_head_count * head_dim; }
  /** The same without the matrix unit: vectors gain nothing from more, and keep more of each token. */
  size_t vector_batch() const { return batch_size < 128 ? batch_size : 128; }
};

}  // namespace pi2
