#pragma once
/**
 * Experts whose neurons do not all fit in memory, exact: bit for bit the result of ResidentExperts.
 *
 * One job (one expert of one layer, some tokens):
 *
 *   gates    products of all resident gates; a neuron whose gate fires is open
 *   rounds   chunks in order, as many as half of the staging memory can take:
 *     plan     for each chunk, which open neurons are in memory and what must be read; reads of near pages are one read
 *     submit   the reads of this round, while the round before is still computed
 *     compute  parts in parallel, chunks of a part in order: first what is in memory, then each missing neuron as it lands
 *              (up, activation), then down columns in order. A missing neuron worth keeping is copied into a slot.
 *   sum      parts in order
 *
 * A chunk whose gates are not resident is read whole, in sequence: there is no knowing what to leave out. A batch of tokens
 * goes the same way with more open neurons, so that its reads melt into long ones.
 *
 * Threads: planning and the cache's bookkeeping happen on the caller's thread, between regions.
 */
#include <memory>
#include <vector>

#include "native/base/thread_pool.h"
#include "native/cache/neuron_cache.h"
#include "native/engine/experts.h"
#include "native/engine/load.h"
#include "native/engine/predictor.h"
#include "native/storage/reader.h"

namespace pi2 {

/** What streaming cost since open. */
struct StreamCounters {
  uint64_t hot_hits = 0;
  uint64_t cold_hits = 0;
  uint64_t misses = 0;
  uint64_t reads = 0;
  /** Of the neurons that were needed, without the pages around them. */
  uint64_t asked_bytes = 0;
  uint64_t read_bytes = 0;
  /** Time that computing threads waited for reads, summed over threads. */
  uint64_t stall_ns = 0;
};

class StreamedExperts : public Experts {
 public:
  /** Loads what stays in memory, opens the reader, allocates everything. */
  static Status open(const EngineConfig& config, const Weights& weights, const Kernels& kernels, ThreadPool& pool,
                     Predictor* predictor, std::unique_ptr<StreamedExperts>* experts);
  /** Whether the configuration's plan fits the model. */
  static Status check_plans(const EngineConfig& config);
  ~StreamedExperts() override;

  Status run(const ExpertJob& job) override;

  const StreamCounters& stream_counters() const { return stream_counters_; }
  std::string storage() const { return reader_->description(); }
  size_t weight_bytes() const { return cache_.bytes(); }
  size_t scratch_bytes() const { return staging_.bytes() + scratch_.bytes() + 2 * half_requests_ * sizeof(ReadRequest); }
  /** Bytes that `open` will allocate: the cache, and beyond it. */
  static size_t weight_bytes_needed(const EngineConfig& config);
  static size_t scratch_bytes_needed(const EngineConfig& config);

 private:
  /** Some chunks whose reads fit half of the staging memory. */
  struct Round {
    size_t first_chunk = 0;
    size_t end_chunk = 0;
    ReadRequest* reads = nullptr;
    size_t read_count = 0;
    uint8_t* staging = nullptr;
    size_t staged_bytes = 0;
  };
  /** On a cache line of its own, so that threads do not share one. */
  struct alignas(64) ThreadCounters {
    uint64_t fired = 0;
    uint64_t stall_ns = 0;
  };

  StreamedExperts(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, Predictor* predictor)
      : config_(&config), kernels_(&kernels), pool_(&pool), predictor_(predictor) {}
  Status allocate();
  Status load();
  Status find_checksums(const Weights& weights);
  size_t carve(const EngineConfig& config, uint8_t* scratch);

  void find_open(const ExpertJob& job, size_t bank);
  void open_all(size_t chunk, size_t count);
  bool plan_round(size_t bank, size_t first_chunk, Round* round);
  void plan_open_chunk(size_t bank, size_t chunk, Round* round);
  void plan_whole_chunk(size_t bank, size_t chunk, Round* round);
  const uint8_t* add_read(size_t begin, size_t end, Round* round);
  void compute_round(const ExpertJob& job, size_t bank, const Round& round);
  void compute_part(const ExpertJob& job, size_t bank, const Round& round, size_t part, size_t thread);
  bool wait_for(const Round& round, size_t read, size_t thread);
  bool is_sound(size_t bank, size_t neuron, size_t part, const uint8_t* bytes);
  bool land_chunk(const ExpertJob& job, size_t bank, const Round& round, size_t chunk, size_t thread);
  void keep_firing(const ExpertJob& job, size_t chunk, size_t thread);
  void activate_entries(const ExpertJob& job, size_t chunk, bool landed, size_t thread);
  void add_token(size_t chunk, size_t part, size_t thread);
  void add_tokens(const ExpertJob& job, size_t bank, const Round& round, size_t chunk, size_t part, size_t thread);
  void settle_round(size_t bank, const Round& round, bool failed);
  void add_parts(const ExpertJob& job);

  size_t chunks() const { return chunk_total(config_->neuron_count); }
  bool is_whole(size_t bank, size_t chunk) const { return chunk * kNeuronChunk >= cache_.plan(bank).resident_gates; }

  const EngineConfig* config_;
  const Kernels* kernels_;
  ThreadPool* pool_;
  Predictor* predictor_;
  std::unique_ptr<Reader> reader_;
  NeuronCache cache_;
  HugeMemory staging_;
  HugeMemory scratch_;
  std::vector<const uint8_t*> checksums_;    // (bank): two of each neuron; empty if reads are not compared
  std::unique_ptr<ReadRequest[]> requests_;  // two halves
  size_t half_requests_ = 0;
  size_t row_bytes_ = 0;

  // Entries: open neurons of a chunk, at chunk * kNeuronChunk + k. (neurons) each.
  uint32_t* open_ = nullptr;          // the neuron
  const uint8_t** part1_ = nullptr;   // its gate and scales, in memory or staging
  const uint8_t** staged_ = nullptr;  // its part 2 in staging, if it is read
  const uint8_t** rows_ = nullptr;    // its up and down rows; null until it has landed
  uint32_t* read_of_ = nullptr;       // last read it waits for
  int32_t* slot_ = nullptr;           // slot it will be kept in
  float* gates_ = nullptr;            // one token: product of its gate
  uint32_t* open_count_ = nullptr;    // (chunk)
  float* factors_ = nullptr;          // (neuron of a chunk, batch) a thread: products of gates, then factors
  float* batch_gates_ = nullptr;      // (neuron, batch): gates of several tokens
  float* ups_ = nullptr;              // (thread, batch, chunk)
  uint8_t* landing_ = nullptr;        // (thread, neuron of a chunk): rows of neurons that get no slot
  uint8_t* compact_ = nullptr;        // (thread, 2, neuron of a chunk): up and down rows one behind another
  Column* columns_ = nullptr;         // (thread, neuron of a chunk)
  float* part_sums_ = nullptr;        // (part, batch, padded hidden)
  std::unique_ptr<ThreadCounters[]> thread_counters_;
  FirstFailure* failure_ = nullptr;
  StreamCounters stream_counters_;
};

}  // namespace pi2
