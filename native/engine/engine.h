#pragma once
/**
 * An open model and its sequences: weights, KV cache and scratch are allocated at open and nothing afterwards. A step
 * computes tokens of one sequence or of several through all layers, in batches of at most batch_size: weights are read once
 * for all of a batch, attention is each sequence's own. Same kernel set, same bits, whatever else is in a batch.
 *
 * Threads: `step` is called by one thread at a time (the addon sees to it); inside, the pool's threads share each region's
 * chunks and nothing else.
 */
#include <memory>
#include <optional>
#include <vector>

#include "native/base/memory.h"
#include "native/base/status.h"
#include "native/base/thread_pool.h"
#include "native/engine/attention.h"
#include "native/engine/config.h"
#include "native/engine/experts.h"
#include "native/engine/ffn.h"
#include "native/engine/hybrid_experts.h"
#include "native/engine/kv_cache.h"
#include "native/engine/predictor.h"
#include "native/engine/step.h"
#include "native/engine/sum_order.h"
#include "native/engine/unit_times.h"
#include "native/engine/weights.h"

namespace pi2 {

class StreamedExperts;

/** EngineCounters of src/engine/contract.ts. */
struct EngineCounters {
  uint64_t tokens;
  uint64_t weight_bytes_read;
  uint64_t kv_bytes_read;
  uint64_t neurons_fired;
  uint64_t neurons_seen;
  size_t weight_bytes;
  size_t kv_bytes;
  size_t scratch_bytes;
  size_t unit_bytes;
};

/** Bytes that an engine takes, each the number that its counters show once it is open. */
struct EngineMemory {
  size_t weight_bytes = 0;
  size_t kv_bytes = 0;
  size_t scratch_bytes = 0;
  size_t unit_bytes = 0;
  /** Only while it opens. */
  size_t load_bytes = 0;
};

/** Bytes a second; 0 where it cannot be measured. */
struct Bandwidths {
  double memory = 0;
  double flash = 0;
};

class Engine {
 public:
  /** What `open` would allocate for a configuration. */
  static Status memory_needed(const EngineConfig& config, EngineMemory* memory);
  /** Checks the configuration, loads and verifies the weights. Takes seconds for a large model. */
  static Status open(EngineConfig config, std::unique_ptr<Engine>* engine);

  /**
   * Computes the tokens of the input's runs. In each sequence, positions below its run must be filled by earlier steps;
   * those from the run on are forgotten. `logits` gets vocab_size floats of each token if `all`, else of the last of each
   * run, in their order. With `exact` the predictor has no say. A `prompt` is computed by the matrix unit, if the kernel set
   * has one: the same bits whatever steps the prompt is cut into. `record` gets which neurons fired and which experts were
   * used. What is refused changes nothing; a step that fails on I/O leaves the tokens of whole batches.
   */
  Status step(const StepInput& input, float* logits, FiringRecord record);

  /** Lets an empty sequence go on from the first `positions` positions of another, which both share. Takes no memory. */
  Status fork(size_t from, size_t to, size_t positions) { return cache_.fork(from, to, positions); }
  /** Empties a sequence: what it did not share is free for others. */
  Status release(size_t sequence) { return cache_.release(sequence); }

  /** What the dense unit and the CPU take for the same neurons. Before the first step. */
  Status measure_unit(UnitTimes* times);
  /**
   * Another schedule of the dense unit, within its most clusters: loads what it needs and waits for it. Between steps.
   */
  Status set_unit_schedule(const UnitConfig::Schedule& clusters);

  /**
   * What memory and flash give at best, measured on what is open: the engine's own weights, read by its own threads, and
   * reads of `flash_read_bytes` bytes (0: flash is left alone). Between steps; changes nothing.
   */
  Bandwidths measure_bandwidths(size_t flash_read_bytes);

  const char* kernel_set() const { return kernels_->name; }
  size_t fired_bytes_per_token() const {
    return config_.layer_count * config_.expert_count * fired_bytes(config_.neuron_count);
  }
  size_t routed_bytes_per_token() const { return config_.layer_count * routed_bytes(config_.expert_count); }
  size_t inputs_per_token() const { return config_.layer_count * config_.hidden_size; }
  size_t activations_per_token() const { return config_.layer_count * config_.experts_per_token * config_.neuron_count; }
  size_t vocab_size() const { return config_.vocab_size; }
  EngineCounters counters() const;
  /** The predictor, if the engine has one, else null. */
  const Predictor* predictor() const { return config_.predictor.enabled() ? &predictor_ : nullptr; }
  /** What threads did since it was drained; null if nothing is traced. */
  Trace* trace() { return trace_ ? &*trace_ : nullptr; }
  /** The experts, if they are streamed, else null. */
  const StreamedExperts* streamed() const { return streamed_; }
  /** Experts and the dense unit, if there is one, else null. */
  const HybridExperts* hybrid() const { return hybrid_ ? &*hybrid_ : nullptr; }

 private:
  explicit Engine(EngineConfig config) : config_(std::move(config)) {}
  Status allocate();
  Status open_unit();
  Status check_input(const StepInput& input, const FiringRecord& record, size_t* tokens) const;
  /** Fills places_ from token `first` of the input on, and gives them room in the KV cache. */
  void place(const StepInput& input, size_t first, size_t count);
  void embed(const int32_t* tokens, const Step& step);
  /** x = norm(hidden) for each token, in both forms. */
  void normalize_batch(const Matrix& weight, const Matrix& bias, size_t count);
  /** hidden += update for each token. */
  void add_update(size_t count);
  /** What predictors look at once `hidden_` is the residual stream after attention and `normed_` the FFN's input. */
  const Activations* predictor_input(const Step& step);
  /** Lets the neurons of a layer be read while its attention is computed, where they can be guessed. */
  void prefetch(size_t index, const Step& step);
  Status run_layer(size_t index, const Step& step);
  /** Moves the hidden state of the last tokens of runs to the front; `first` is the step's first token of the input. */
  size_t gather_last(const StepInput& input, size_t first, size_t count);
  /** Logits of the first `count` tokens of hidden_. */
  void compute_logits(size_t count, float* logits);

  EngineConfig config_;
  const Kernels* kernels_ = nullptr;
  Weights weights_;
  KvCache cache_;
  HugeMemory scratch_;
  std::optional<Trace> trace_;
  std::unique_ptr<ThreadPool> pool_;
  float* hidden_ = nullptr;  // (batch, padded hidden): the residual stream
  float* update_ = nullptr;  // (batch, padded hidden): what a block adds to it
  Activations normed_;
  Activations residual_;  // hidden_ and its int8 form, for predictors that look at it
  Attention attention_;
  std::unique_ptr<Experts> experts_;
  StreamedExperts* streamed_ = nullptr;  // experts_, if they are streamed
  std::vector<HotRows> hot_rows_;        // (bank): only with a dense unit
  std::unique_ptr<DenseUnit> unit_;      // null: there is none
  std::optional<HybridExperts> hybrid_;  // experts_ and the unit
  Predictor predictor_;
  SumOrder order_;
  Ffn ffn_;
  std::vector<Place> places_;  // (batch): of the present step's tokens
  bool is_prompt_ = false;     // the present step
  uint64_t tokens_ = 0;
  uint64_t resident_bytes_read_ = 0;
};

}  // namespace pi2
