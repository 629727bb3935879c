#pragma once
#include "native/base/status.h"
#include "native/engine/activations.h"
#include "native/engine/neurons.h"
#include "native/engine/weights.h"

namespace pi2 {

/** What the FFN did since open. Routed experts only. Bytes. */
struct FfnCounters {
  uint64_t neurons_seen = 0;
  uint64_t neurons_fired = 0;
  uint64_t weight_bytes_read = 0;
};

/** Where a job notes which neurons fired; null bases note nothing. */
struct FiredBits {
  uint8_t* base = nullptr;              // of this layer and expert, token 0
  size_t stride = 0;                    // from token to token
  const uint32_t* tokens = nullptr;     // the batch's numbers of the job's tokens, or null if they are the same
  float* const* activations = nullptr;  // (token of the job): its neurons' activations, zero so far; resident experts only

  bool wanted() const { return base != nullptr; }
  /** A chunk is a multiple of 8 neurons, so no two threads share a byte. */
  void mark(size_t t, size_t neuron) const {
    uint8_t& byte = base[(tokens == nullptr ? t : tokens[t]) * stride + neuron / 8];
    byte = static_cast<uint8_t>(byte | (1u << (neuron % 8)));
  }
  /** What the neuron contributes to the token, before its routing weight. */
  void put(size_t t, size_t neuron, float activation) const { activations[t][neuron] = activation; }
};

/** The tokens of a batch that one expert computes. */
struct ExpertJob {
  size_t layer_index;
  size_t expert_index;
  const LayerWeights& layer;
  const Activations& x;  // both forms filled
  /** What the predictor looks at, both forms; null: every neuron that fires is computed. */
  const Activations* predictor_x;
  size_t tokens;
  const float* shares;  // routing weight of each token; null: all 1
  float* out;           // (token, padded hidden), zeroed; natural order when done
  size_t out_stride;
  FiredBits fired;
  /**
   * Neurons before this one are somebody else's (hybrid_experts.h): none of their rows is read, from memory or flash. A
   * multiple of kNeuronChunk, less than all neurons.
   */
  size_t first_neuron = 0;

  size_t first_chunk() const { return first_neuron / kNeuronChunk; }
  /** Whether this is a single token for kernels of single tokens; the matrix unit's products are those of a batch. */
  bool is_single() const { return tokens == 1 && !x.is_packed(); }
  float share(size_t t) const { return shares != nullptr ? shares[t] : 1.0f; }
};

/**
 * Computes experts: gates of all neurons, or of those that a predictor chooses, and up rows and down columns only of neurons
 * that fire (paper section 1.1). A dense FFN is one expert. Implementations differ in where neurons are kept; without a
 * predictor, never in a single bit of the result.
 */
class Experts {
 public:
  virtual ~Experts() = default;
  /**
   * A job that will be run, so that what it reads can be on its way before: after those that were begun earlier, unchanged
   * but for its output. One may be begun while another waits for its run. None needs to be.
   */
  virtual void begin(const ExpertJob&) {}
  /** What the job's bank keeps in memory is there: for others that read it (hybrid_experts.h). Fails only on I/O. */
  virtual Status prepare(const ExpertJob&) { return Status::ok(); }
  /** Fails only on I/O; then the job's output is not to be used. */
  virtual Status run(const ExpertJob& job) = 0;
  /** Jobs that were begun will not be run. */
  virtual void cancel() {}
  const FfnCounters& counters() const { return counters_; }

 protected:
  FfnCounters counters_;
};

}  // namespace pi2
