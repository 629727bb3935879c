#pragma once
#include <algorithm>

#include "native/base/thread_pool.h"
#include "native/engine/experts.h"
#include "native/engine/predictor.h"
#include "native/engine/sum_order.h"

namespace pi2 {

/** Experts whose neurons are all in memory, one array a matrix (weights.h). */
class ResidentExperts : public Experts {
 public:
  static size_t scratch_bytes(const EngineConfig& config);
  /** `predictor` may be null. */
  ResidentExperts(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, Predictor* predictor,
                  const SumOrder& order, uint8_t* scratch);

  Status run(const ExpertJob& job) override;

 private:
  /** Room of a list: a chunk, and neurons that share a byte of fired bits with its first. */
  static constexpr size_t kListRoom = kNeuronChunk + 7;
  /** What a list of neurons came to: firings of all tokens; rows and columns that were read for any. */
  struct ListCounts {
    uint32_t fired = 0;
    uint32_t rows = 0;
  };

  /** Only to measure scratch. */
  ResidentExperts() = default;
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);
  void run_batch(const ExpertJob& job);
  void leave_out(const ExpertJob& job);
  void run_one(const ExpertJob& job);
  void run_few(const ExpertJob& job);
  bool is_few(const ExpertJob& job) const;
  size_t choose(const ExpertJob& job);
  size_t choose_for_any(const ExpertJob& job);
  void find_fired_for_any(const ExpertJob& job, const uint32_t* neurons, const uint8_t* masks, size_t count,
                          ListCounts* counts, size_t thread);
  void add_part_for_any(const ExpertJob& job, size_t part);
  size_t list_start(size_t list, size_t count, bool chosen) const;
  void add_part(const ExpertWeights& expert, size_t part);
  template <class Work>
  void for_chunks(const ExpertJob& job, const Work& work);
  size_t find_fired(const ExpertJob& job, size_t first, size_t count, const uint32_t* chosen);
  size_t chunks() const;
  size_t part_size() const;
  /** Most tokens of a job that are few. */
  size_t few_room() const { return std::min(config_->batch_size, kFewTokens); }

  const EngineConfig* config_ = nullptr;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  Predictor* predictor_ = nullptr;
  SumOrder order_;
  uint16_t* tile_factors_ = nullptr;     // the same for the matrix unit, as tiles.h lays it out
  const uint8_t** column_of_ = nullptr;  // (neuron in checkpoint order): its down column, or null: it does not fire
  float* factors_ = nullptr;             // (neuron, batch): contributions to several tokens
  float* tiles_ = nullptr;               // (thread, 2, batch, list): products of a list's rows
  Column* columns_ = nullptr;            // (part, neuron of the part): fired neurons of one token
  uint32_t* neurons_ = nullptr;        // (part, neuron of the part): neurons that fired for any token; one token: the chosen
  uint32_t* fired_ = nullptr;          // (chunk): how many
  uint32_t* chosen_ = nullptr;         // (chunk): how many were looked at
  uint8_t* masks_ = nullptr;           // (part, neuron of the part): few tokens: bit t is set if token t wants the neuron
  ListCounts* list_counts_ = nullptr;  // (chunk)
  float* part_sums_ = nullptr;         // (part, few tokens, padded hidden): sums of one token or a few
  float* tile_sums_ = nullptr;         // (thread, token of a tile, group): sums of one part and group
};

}  // namespace pi2
