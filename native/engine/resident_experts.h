#pragma once
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
  /** Only to measure scratch. */
  ResidentExperts() = default;
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);
  void run_batch(const ExpertJob& job);
  void leave_out(const ExpertJob& job);
  void run_one(const ExpertJob& job);
  size_t choose(const ExpertJob& job);
  void add_part(const ExpertWeights& expert, size_t part);
  template <class Work>
  void for_chunks(const ExpertJob& job, const Work& work);
  size_t find_fired(const ExpertJob& job, size_t first, size_t count, const uint32_t* chosen);
  size_t chunks() const;
  size_t part_size() const;

  const EngineConfig* config_ = nullptr;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  Predictor* predictor_ = nullptr;
  SumOrder order_;
  uint16_t* tile_factors_ = nullptr;     // the same for the matrix unit, as tiles.h lays it out
  const uint8_t** column_of_ = nullptr;  // (neuron in checkpoint order): its down column, or null: it does not fire
  float* factors_ = nullptr;             // (neuron, batch): contributions to several tokens
  float* tiles_ = nullptr;               // (thread, 2, batch, chunk): products of a chunk's rows
  Column* columns_ = nullptr;            // (part, neuron of the part): fired neurons of one token
  uint32_t* neurons_ = nullptr;  // (part, neuron of the part): neurons that fired for any token; one token: the chosen
  uint32_t* fired_ = nullptr;    // (chunk): how many
  uint32_t* chosen_ = nullptr;   // (chunk): how many were looked at
  float* part_sums_ = nullptr;   // (part, padded hidden): one token's sums
  float* tile_sums_ = nullptr;   // (thread, token of a tile, group): sums of one part and group
};

}  // namespace pi2
