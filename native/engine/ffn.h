#pragma once
#include <array>
#include <optional>

#include "native/engine/experts.h"

namespace pi2 {

/** The FFN of one layer: routes tokens to experts (a dense FFN is one expert) and adds up what they compute. */
class Ffn {
 public:
  static size_t scratch_bytes(const EngineConfig& config);
  /** Experts whose tokens are gathered at a time: one is begun before the one before it is run. */
  static constexpr size_t kGathered = 2;
  /** `routed`, `routed_residual`: room for what each of these experts' tokens give it and its predictor. */
  void bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, Experts& experts, uint8_t* scratch,
            const std::array<Activations, kGathered>& routed, const std::array<Activations, kGathered>& routed_residual);

  /**
   * out[t * out_stride + i] = FFN of the normed inputs x, both forms filled. out is padded to whole groups. If `fired_bits`
   * is not null, bit i of token t's bytes at fired_bits + t * fired_stride + expert * fired_bytes(neurons) is set for every
   * neuron i that fired. `predictor_x` is x, the residual stream in both forms, or null for an exact result. Fails only on
   * I/O.
   */
  Status compute(size_t layer_index, const LayerWeights& weights, const Activations& x, const Activations* predictor_x,
                 size_t tokens, float* out, size_t out_stride, uint8_t* fired_bits, size_t fired_stride);

  /** Bytes of routers read since bind. */
  uint64_t router_bytes_read() const { return router_bytes_read_; }

  /**
   * Whether the next computations also say where tokens are routed: bit e of token t's bytes at bits + t * stride is set for
   * every expert e that it uses. Null: they do not.
   */
  void record_routes(uint8_t* bits, size_t stride) {
    routed_bits_ = bits;
    routed_stride_ = stride;
  }

  /**
   * Whether the next computations also say what each neuron of a used expert contributes before its routing weight: the j-th
   * used expert of token t (ascending) has its neurons at activations + t * stride + j * neurons, zero so far. Null: they do
   * not.
   */
  void record_activations(float* activations, size_t stride) {
    activations_ = activations;
    activation_stride_ = stride;
  }

 private:
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);
  void route(const LayerWeights& layer, const Activations& x, size_t tokens);
  /** The tokens that chose an expert, and the job that they are. */
  struct Gathered {
    Activations x;
    Activations residual;
    float* shares = nullptr;       // (batch): routing weights
    uint32_t* tokens = nullptr;    // (batch): their numbers in the batch
    float** rows = nullptr;        // (batch): where their activations are written down
    std::optional<ExpertJob> job;  // none: nothing is begun
  };
  bool gather(size_t expert, const ExpertJob& all, Gathered* gathered);
  Status run_gathered(const ExpertJob& all, Gathered* gathered);

  const EngineConfig* config_ = nullptr;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  Experts* experts_ = nullptr;
  float* expert_out_ = nullptr;     // (batch, padded hidden): of one expert
  float* shares_ = nullptr;         // (expert, batch): routing weight, 0 if not chosen
  float* router_logits_ = nullptr;  // (expert)
  uint32_t* used_ = nullptr;        // (batch): experts that each token of the batch has used so far
  std::array<Gathered, kGathered> gathered_;
  uint8_t* routed_bits_ = nullptr;  // of this layer, or null
  size_t routed_stride_ = 0;
  float* activations_ = nullptr;  // of this layer, or null
  size_t activation_stride_ = 0;
  uint64_t router_bytes_read_ = 0;
};

}  // namespace pi2
