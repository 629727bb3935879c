#pragma once
/**
 * Guesses which neurons contribute to a token (paper section 1.9): score = bias + sum over k of relu(fc1_k . x) * fc2_k, one
 * score a neuron. A neuron is computed if its score reaches a threshold: one for neurons in memory, a higher one for those
 * on flash, so that a marginal neuron is not worth a read. docs/PREDICTORS.md.
 *
 * fc2 is kept as one vector over neurons for each hidden unit, so that units that are 0 after ReLU are not read, and a rank
 * need not be a multiple of a group.
 */
#include <array>
#include <vector>

#include "native/base/memory.h"
#include "native/base/thread_pool.h"
#include "native/engine/experts.h"
#include "native/engine/tensor_file.h"

namespace pi2 {

/** What prediction took and did since open. */
struct PredictorCounters {
  /** Time spent on scores, summed over threads. */
  uint64_t ns = 0;
  uint64_t weight_bytes_read = 0;
  /** Neurons scored; those whose score reached the threshold of where they were. */
  uint64_t scored = 0;
  uint64_t chosen = 0;
  /** Neurons on flash that would have been computed in memory. */
  uint64_t skipped_on_flash = 0;
};

class Predictor {
 public:
  /** Bytes of weights, and of scratch. */
  static size_t bytes_needed(const EngineConfig& config);
  static size_t scratch_bytes(const EngineConfig& config);

  /** Reads and checks predictor.bin. */
  Status load(const EngineConfig& config);
  /** The configuration must outlive this object. */
  void bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch);

  /**
   * Computes the hidden units for the tokens of a job; `score` may be called until the next job begins. A `rough` guess for
   * one token is made of the strongest units alone: for what changes no result.
   */
  void begin(const ExpertJob& job, bool rough = false);
  /**
   * Groups that `score` takes at once for up to kFewTokens tokens. A hidden unit's weights of one group are 144 bytes (q4),
   * of four 576 in a row: memory gives those a fourth faster.
   */
  static constexpr size_t kMostGroups = 4;
  /**
   * Scores of the neurons of groups [first, first + count) for every token of the job: token t's begin at result + t * count
   * * kGroup. Of more than kFewTokens tokens one group at a time. They are the thread's until it asks for the next. Any
   * thread of the pool.
   */
  const float* score(const ExpertJob& job, size_t first, size_t count, size_t thread);
  /** The least score with which a neuron is computed. */
  float threshold(size_t layer, size_t neuron, bool in_memory) const {
    const PredictorConfig& predictor = config_->predictor;
    return in_memory && neuron < predictor.flash_from ? predictor.memory_thresholds[layer]
                                                      : predictor.flash_thresholds[layer];
  }
  /** A score that is not a number counts as high: trouble stays visible. */
  static bool reaches(float score, float threshold) { return !(score < threshold); }

  /**
   * likely[j] = whether any token's score of neuron j reaches one of the layer's thresholds. `scores` as `score` returns
   * them, or from a neuron further on.
   */
  void find_likely(const ExpertJob& job, const float* scores, size_t count, uint8_t* likely) const;

  /** Counts what a job chose; on the caller's thread. */
  void count(size_t scored, size_t chosen, size_t skipped_on_flash);
  /** Sums up what threads took. */
  PredictorCounters counters() const;
  size_t bytes() const { return file_.bytes() + sizes_.size() * sizeof(float); }

 private:
  struct Layer {
    Matrix fc1;   // [experts * rank x hidden]
    Matrix fc2;   // [experts * rank x neurons]
    Matrix bias;  // [experts x neurons]
    size_t rank;
    size_t first_size;  // of its columns of fc2, in sizes_
  };
  /** On a cache line of its own. */
  struct alignas(64) ThreadTime {
    uint64_t ns = 0;
  };

  void keep_strongest(const Layer& layer, size_t first);
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);

  const EngineConfig* config_ = nullptr;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  TensorFile file_;
  std::vector<Layer> layers_;
  std::vector<float> sizes_;   // (layer, expert, unit): about how large the numbers of a column of fc2 are
  float* hidden_ = nullptr;    // (batch, most rank): fc1 . x
  float* factors_ = nullptr;   // (most rank, batch): the same after ReLU, many tokens; strengths of one
  uint32_t* units_ = nullptr;  // (most rank): hidden units that are not 0 for every token
  Column* columns_ = nullptr;  // (token, rank): of fc2, for the units of each of few tokens
  std::array<size_t, kFewTokens> column_counts_{};
  float* scores_ = nullptr;      // (thread, scores_room_)
  ThreadTime* times_ = nullptr;  // (thread)
  size_t scores_room_ = 0;       // floats: (batch, kGroup) or (few tokens, kMostGroups, kGroup)
  size_t active_ = 0;            // units of the present job
  PredictorCounters counters_;
};

}  // namespace pi2
