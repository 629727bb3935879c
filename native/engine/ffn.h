#pragma once
#include "native/base/thread_pool.h"
#include "native/engine/activations.h"
#include "native/engine/weights.h"

namespace pi2 {

/** What the FFN did since bind. Routed experts only. */
struct FfnCounters {
  uint64_t neurons_seen = 0;
  uint64_t neurons_fired = 0;
  uint64_t weight_bytes_read = 0;
};

/** Bytes of one token's fired bits of one expert. */
constexpr size_t fired_bytes(size_t neurons) { return (neurons + 7) / 8; }

/** Bytes of one token's routed bits of one layer. */
constexpr size_t routed_bytes(size_t experts) { return (experts + 7) / 8; }

/**
 * The FFN of one layer, dense or a mixture of experts, exact: every gate is computed, up rows and down columns only of
 * neurons that fire (paper section 1.1).
 *
 * Threads share the down columns by parts: part p holds the neurons of every kParts-th chunk, is summed by one thread in
 * ascending order, and parts are added in order. A column is then read whole by one thread (DRAM dislikes halves), and a sum
 * never depends on the number of threads or on how tokens are batched.
 */
class Ffn {
 public:
  static size_t scratch_bytes(const EngineConfig& config);
  /** `routed`: room for the inputs of one expert's tokens. */
  void bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch, Activations routed);

  /**
   * out[t * out_stride + i] = FFN of the normed inputs x, both forms filled. out is padded to whole groups. If `fired_bits`
   * is not null, bit i of token t's bytes at fired_bits + t * fired_stride + expert * fired_bytes(neurons) is set for every
   * neuron i that fired.
   */
  void compute(const LayerWeights& weights, const Activations& x, size_t tokens, float* out, size_t out_stride,
               uint8_t* fired_bits, size_t fired_stride);

  /**
   * Whether the next computations also say where tokens are routed: bit e of token t's bytes at bits + t * stride is set for
   * every expert e that it uses. Null: they do not.
   */
  void record_routes(uint8_t* bits, size_t stride) {
    routed_bits_ = bits;
    routed_stride_ = stride;
  }

  const FfnCounters& counters() const { return counters_; }

 private:
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);
  void run_expert(const ExpertWeights& expert, const LayerWeights& layer, const Activations& x, size_t tokens,
                  const float* shares, float* out, size_t out_stride);
  void run_one(const ExpertWeights& expert, const LayerWeights& layer, const Activations& x, float share, float* out);
  void add_part(const ExpertWeights& expert, size_t part);
  size_t find_fired(const ExpertWeights& expert, const LayerWeights& layer, const Activations& x, float share, size_t first,
                    size_t count);
  void route(const LayerWeights& layer, const Activations& x, size_t tokens);
  size_t chunks() const;
  size_t part_size() const;
  void mark_fired(size_t t, size_t neuron) const;
  /** The batch's number of an expert's token t. */
  size_t token_of(size_t t) const { return config_->expert_count == 1 ? t : tokens_[t]; }
  /** Whether a neuron with this product of its gate row can contribute at all. */
  bool gate_fires(float gate) const;
  /** values[j] = what a neuron contributes for its gate and up products; 0 if it does not fire. `values` may be `gates`. */
  void activate(const float* gates, const float* ups, size_t count, float* values) const;

  const EngineConfig* config_ = nullptr;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  float* factors_ = nullptr;        // (neuron, batch): contributions to several tokens
  float* tiles_ = nullptr;          // (thread, 2, batch, chunk): products of a chunk's rows
  Column* columns_ = nullptr;       // (chunk, neuron of the chunk): fired neurons of one token
  Column* part_columns_ = nullptr;  // (part, neuron of the part): the same by part, without gaps
  uint32_t* neurons_ = nullptr;     // (part, neuron of the part): neurons that fired for any token
  uint32_t* fired_ = nullptr;       // (chunk): how many
  float* part_sums_ = nullptr;      // (part, padded hidden): one token's sums
  float* tile_sums_ = nullptr;      // (thread, token of a tile, group): sums of one part and group
  float* expert_out_ = nullptr;     // (batch, padded hidden)
  float* shares_ = nullptr;         // (expert, batch): routing weight, 0 if not chosen
  float* router_logits_ = nullptr;  // (expert)
  float* token_shares_ = nullptr;   // (batch): of one expert's tokens
  uint32_t* tokens_ = nullptr;      // (batch): one expert's tokens
  Activations routed_;
  uint8_t* fired_bits_ = nullptr;  // of this layer, or null
  size_t fired_stride_ = 0;
  uint8_t* routed_bits_ = nullptr;  // of this layer, or null
  size_t routed_stride_ = 0;
  size_t expert_index_ = 0;
  FfnCounters counters_;
};

}  // namespace pi2
