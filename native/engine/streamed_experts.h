#pragma once
/**
 * Experts whose neurons do not all fit in memory. Without a predictor the result is, bit for bit, that of ResidentExperts.
 *
 * One job (one expert of one layer, some tokens):
 *
 *   find     in parallel: which neurons are wanted. With their gates in memory: those whose gate fires. With a predictor:
 *            those that it chooses. Else: all of them. Each wanted neuron is an entry of its chunk.
 *   rounds   chunks in order, as many as half of the staging memory can take; while one is computed, the first reads of the
 *            next are under way
 *     plan     what must be read of each entry; near pages become one read
 *     resident stage  entries in memory: gate, up, activation
 *     gate stage      entries on flash whose gate came (phase 1): gate; for those that fire the rows are read (phase 2)
 *     row stage       rows as they land: up, activation; down rows stay until the sum
 *   sum      the down columns of each part in checkpoint order (sum_order.h), parts in order
 *
 * Of a mixture, the next expert's job is found while the first reads of this one are under way, and reads its first round
 * into the half of the staging memory that this one's last round leaves free: flash works for one expert while the other is
 * computed. Results and slots do not depend on it, since each bank has its own.
 *
 * Stages of all parts are the tasks of one region, in this order: no part waits for another, and the only barrier is the end
 * of the round (paper section 1.7). The files streamed_find.cc,
 * streamed_plan.cc and streamed_stages.cc hold them; streamed_ahead.cc and streamed_prefetch.cc begin reads before their
 * job. Opening reads no neurons: those that are kept come in with the first job of their bank (streamed_fill.cc).
 *
 * A whole chunk without gates in memory is read in sequence, the next layer's first ones while this layer is still computed.
 * A batch of tokens goes the same way with more entries.
 *
 * Threads: planning and the cache's bookkeeping happen on the caller's thread, between regions.
 */
#include <atomic>
#include <memory>
#include <vector>

#include "native/base/thread_pool.h"
#include "native/cache/neuron_cache.h"
#include "native/engine/experts.h"
#include "native/engine/load.h"
#include "native/engine/predictor.h"
#include "native/engine/stream_sizes.h"
#include "native/engine/sum_order.h"
#include "native/npu/host_unit.h"
#include "native/storage/reader.h"

namespace pi2 {

/** What streaming cost since open. */
struct StreamCounters {
  uint64_t hot_hits = 0;
  uint64_t cold_hits = 0;
  uint64_t misses = 0;
  uint64_t reads = 0;
  /** Of the parts of neurons that were asked for; of the pages read for them; of the neurons among them that fired. */
  uint64_t asked_bytes = 0;
  uint64_t read_bytes = 0;
  uint64_t used_bytes = 0;
  /** Rows that were not read since the gate, read before them, did not fire. */
  uint64_t spared_bytes = 0;
  /** Time that computing threads waited for reads of gates (and for room to submit more), and of rows, summed over threads.
   */
  uint64_t gate_stall_ns = 0;
  uint64_t row_stall_ns = 0;
  /** Neurons read ahead, and those of them that were wanted. */
  uint64_t prefetched = 0;
  uint64_t prefetch_used = 0;

  void add(const StreamCounters& other);
};

class StreamedExperts : public Experts {
 public:
  /** Opens the reader and allocates everything; reads no neurons. `predictor` may be null. */
  static Status open(const EngineConfig& config, const Weights& weights, const Kernels& kernels, ThreadPool& pool,
                     Predictor* predictor, const SumOrder& order, std::unique_ptr<StreamedExperts>* experts);
  /** Whether the configuration's plan fits the model. */
  static Status check_plans(const EngineConfig& config);
  ~StreamedExperts() override;

  /**
   * Finds what the job wants, and begins to read it if a half of the staging memory is free. Without the pipeline, or before
   * its bank is filled, nothing happens before `run`.
   */
  void begin(const ExpertJob& job) override;
  Status prepare(const ExpertJob& job) override { return fill(bank_of(job)); }
  Status run(const ExpertJob& job) override;
  void cancel() override;
  /** Reads what is kept of every bank. Between jobs. */
  Status fill_all();
  /**
   * Begins reads of neurons that the next job of this bank will probably want: `job` has the inputs of the predictor as they
   * are before attention. Changes what is waited for, never a result.
   */
  void prefetch(const ExpertJob& job);

  /** Where the rows of a bank's hot neurons are once it is filled; without their bias. */
  HotRows hot_rows(size_t bank) const;

  /**
   * Bytes a second that flash delivers at random places, in reads of `read_bytes` bytes (rounded to pages), many at once; 0
   * if it fails. Between jobs.
   */
  double measure_flash(size_t read_bytes);

  const StreamCounters& stream_counters() const { return stream_counters_; }
  /** Whether gates are read before rows. */
  bool two_phases() const { return two_phases_; }
  std::string storage() const { return reader_->description(); }
  size_t weight_bytes() const { return cache_.bytes(); }
  size_t scratch_bytes() const {
    return staging_.bytes() + scratch_.bytes() + request_total(*config_) * sizeof(ReadRequest);
  }
  /** Bytes that `open` will allocate: the cache, and beyond it. */
  static size_t weight_bytes_needed(const EngineConfig& config);
  static size_t scratch_bytes_needed(const EngineConfig& config);

 private:
  /** What decides which neurons of a chunk are entries. */
  enum class ChunkKind : uint8_t { kGates, kPredicted, kWhole };
  /** Where an entry is: in memory; on its way; on flash, but its gate did not fire. */
  enum EntryState : uint8_t { kResident, kMissing, kDropped };
  /** Where the rows of a neuron are kept; the gate is null where gates are kept elsewhere, or not. */
  struct KeptRows {
    uint8_t* gate;
    uint8_t* up;
    uint8_t* down;
  };
  /** Reads that are submitted together, and the memory they go to, one behind another. */
  struct ReadList {
    ReadRequest* reads = nullptr;
    size_t count = 0;
    uint8_t* staging = nullptr;
    size_t staged_bytes = 0;
  };
  /**
   * Some chunks whose reads fit half of the staging memory. Room for second phases is kept at the end of requests and
   * staging: Found::later has it.
   */
  struct Round {
    size_t first_chunk = 0;
    size_t end_chunk = 0;
    ReadList first_phase;
    size_t later_count = 0;
    size_t later_bytes = 0;
    size_t planned_bytes = 0;  // that its missing entries can need, and reads
    size_t planned_reads = 0;
  };
  /**
   * What was found of a job. Entries are the wanted neurons of a chunk, at chunk * kNeuronChunk + k: room for all neurons.
   */
  struct Found {
    size_t bank = 0;
    size_t first_chunk = 0;
    bool is_planned = false;  // its first round, in half `half`
    bool has_more = false;    // chunks behind that round
    size_t half = 0;

    uint32_t* open = nullptr;             // (entry): the neuron
    uint8_t* state = nullptr;             // (entry): EntryState
    const uint8_t** part1 = nullptr;      // (entry): its gate, and the scales of its rows if they are on flash
    const uint8_t** staged_up = nullptr;  // (entry): weights of its rows in staging, if they are read
    const uint8_t** staged_down = nullptr;
    const uint8_t** up = nullptr;       // (entry): its up row (if there is a gate); null until it has landed
    const uint8_t** down = nullptr;     // (entry): its down row likewise
    ReadRequest** gate_read = nullptr;  // (entry): reads that it waits for
    ReadRequest** up_read = nullptr;
    ReadRequest** down_read = nullptr;
    int32_t* slot = nullptr;         // (entry): slot it will be kept in
    float* gates = nullptr;          // (entry): one token: product of its gate, then what it adds of its column
    uint64_t* masks = nullptr;       // (entry, mask words): bit t is set if token t wants it
    float* batch_gates = nullptr;    // (neuron, batch): gates of several tokens
    uint32_t* open_count = nullptr;  // (chunk): entries
    ChunkKind* kinds = nullptr;      // (chunk)
    ReadList* later = nullptr;       // (chunk): reads of its second phase

    /** One behind the last entry of a chunk. */
    size_t end_entry(size_t chunk) const { return chunk * kNeuronChunk + open_count[chunk]; }
    /** For stages that run side by side: the gate stage drops missing entries while the resident stage passes over them. */
    EntryState state_of(size_t entry) const {
      return static_cast<EntryState>(std::atomic_ref(state[entry]).load(std::memory_order_relaxed));
    }
    void set_state(size_t entry, EntryState value) { std::atomic_ref(state[entry]).store(value, std::memory_order_relaxed); }
  };
  /** On cache lines of its own, so that threads do not share one. */
  struct alignas(64) ThreadCounters {
    StreamCounters stream;
    uint64_t fired = 0;
    uint64_t rows = 0;  // multiplied or added
    uint64_t chosen = 0;
    uint64_t skipped_on_flash = 0;
  };
  struct alignas(64) Progress {
    std::atomic<uint32_t> stages{0};
  };

  /** What something took of late. */
  struct Mean {
    double mean = 0;
    uint64_t count = 0;
    void add(double value);
  };

  StreamedExperts(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, Predictor* predictor,
                  const SumOrder& order)
      : config_(&config), kernels_(&kernels), pool_(&pool), predictor_(predictor), order_(order) {}
  Status allocate();
  bool are_two_phases_faster();
  Status find_checksums(const Weights& weights);
  size_t carve(const EngineConfig& config, uint8_t* scratch);

  Status fill(size_t bank);
  void find_kept(Found& found, size_t chunk);
  void find_and_plan(const ExpertJob& job);
  void find(const ExpertJob& job, Found& found);
  void find_open(const ExpertJob& job, Found& found, size_t chunk, size_t thread);
  void find_chosen(const ExpertJob& job, Found& found, size_t chunk, const float* scores, size_t thread);
  void find_all(Found& found, size_t chunk, size_t thread);
  void add_entry(Found& found, size_t neuron, size_t entry, size_t thread);

  void plan_first(Found& found, size_t half);
  bool plan_round(Found& found, size_t first_chunk, size_t half);
  void plan_chunk(Found& found, size_t chunk, Round* round);
  void plan_rows(Found& found, size_t entry, ReadList* list, size_t first_read);
  void keep_room(Found& found, size_t chunk, Round* round);
  ReadRequest& add_range(size_t begin, size_t end, ReadList* list, size_t first_read);
  void submit_rows(Found& found, size_t chunk, size_t thread);
  void settle_round(Found& found, const Round& round, bool failed);
  void keep_fired(Found& found, size_t chunk);
  uint64_t submit(const ReadList& list);
  void trace_reads(const ReadList& list);
  void trace_counters();

  bool knows_next_bank(size_t bank) const;
  void read_ahead(size_t bank, size_t half);

  bool is_ahead(const ReadRequest* read) const { return read >= ahead_.reads && read < ahead_.reads + ahead_.count; }
  bool is_asking_worth_it();
  void judge_asking(double waited);
  void tune_ahead();
  void end_ahead();
  void forget_ahead();

  void compute_rounds(const ExpertJob& job, Found& found);
  void compute_round(const ExpertJob& job, Found& found, const Round& round);
  void run_stage(const ExpertJob& job, Found& found, const Round& round, size_t stage, size_t part, size_t thread);
  void resident_stage(const ExpertJob& job, Found& found, const Round& round, size_t first, size_t thread);
  void gate_stage(const ExpertJob& job, Found& found, size_t chunk, size_t thread);
  void row_stage(const ExpertJob& job, Found& found, const Round& round, size_t part, size_t thread);
  static size_t list_entries(const Found& found, size_t chunk, EntryState state, uint32_t* entries);
  void multiply_gates(const ExpertJob& job, Found& found, const uint32_t* entries, size_t count, size_t thread);
  void multiply_batch_gates(const ExpertJob& job, Found& found, size_t chunk, size_t thread);
  bool land_gates(Found& found, size_t chunk, size_t thread);
  bool land_rows(Found& found, size_t chunk, size_t thread);
  void unpack_rows(const Found& found, size_t entry, const KeptRows& to);
  size_t activate_entries(const ExpertJob& job, Found& found, const uint32_t* entries, size_t count, size_t thread);
  void activate_batch(const ExpertJob& job, Found& found, size_t chunk, size_t thread);
  void add_part(const ExpertJob& job, const Found& found, size_t part, size_t thread);
  bool wait_for(ReadRequest& request, uint64_t* stall_ns);
  void wait_everything(const Found& found, const Round& round);
  bool is_sound(const Found& found, size_t entry, size_t part);
  void begin_tiles(size_t tokens);
  void add_parts(const ExpertJob& job, const Found& found);
  void collect_counters(const ExpertJob& job);

  size_t bank_of(const ExpertJob& job) const { return job.layer_index * config_->expert_count + job.expert_index; }
  /** What was found of the `place`-th of the jobs that are begun, or will be of one that is not yet. */
  Found& found_of(size_t place) { return found_[(first_found_ + place) % found_count(*config_)]; }
  size_t chunks() const { return chunk_total(config_->neuron_count); }
  bool is_filled(size_t bank) const { return filled_[bank] != 0; }
  /** Whether a job takes every neuron of a bank that is not filled, and so fills it. */
  bool passes_through(const ExpertJob& job) const {
    return job.predictor_x == nullptr && job.first_neuron == 0 && !job.is_single();
  }
  /** Bytes that a missing entry of the chunk asks flash for, if it fires. */
  size_t missing_bytes(const Found& found, size_t chunk) const {
    return config_->layout.part2_bytes + (found.kinds[chunk] == ChunkKind::kGates ? 0 : config_->layout.part1_bytes);
  }
  /** Whether a second phase reads the rows of an entry: what was read ahead came whole. */
  bool wants_rows(const Found& found, size_t entry) const {
    return found.state[entry] == kMissing && !is_ahead(found.gate_read[entry]);
  }
  /** Rows of hot neurons and of slots lie alike. */
  KeptRows slot_rows(uint8_t* slot) const {
    uint8_t* up = slot + (keeps_gates(*config_) ? row_bytes_ : 0);
    return {keeps_gates(*config_) ? slot : nullptr, up, up + (config_->gated ? row_bytes_ : 0)};
  }
  size_t mask_words() const { return (config_->batch_size + 63) / 64; }

  const EngineConfig* config_;
  const Kernels* kernels_;
  ThreadPool* pool_;
  Predictor* predictor_;
  SumOrder order_;
  std::unique_ptr<Reader> reader_;
  NeuronCache cache_;
  HugeMemory staging_;
  HugeMemory scratch_;
  std::vector<const uint8_t*> checksums_;    // (bank): two of each neuron
  std::vector<uint8_t> filled_;              // (bank): whether the neurons that it keeps from the start are in memory
  std::unique_ptr<ReadRequest[]> requests_;  // two halves, then those ahead
  size_t half_requests_ = 0;
  size_t row_bytes_ = 0;
  size_t weight_bytes_ = 0;  // of a row, without its scales
  bool two_phases_ = false;

  /** Of the job that is computed and, of a mixture, of the one behind it. */
  Found found_[2];
  size_t first_found_ = 0;               // whose turn is next
  size_t announced_ = 0;                 // jobs that will be run, begun or not
  size_t begun_ = 0;                     // jobs that were found and not computed yet
  Round rounds_[2];                      // (half)
  uint16_t* tile_factors_ = nullptr;     // the same for the matrix unit, as tiles.h lays it out
  const uint8_t** column_of_ = nullptr;  // (neuron in checkpoint order): its down column, or null: it does not fire
  float* factors_ = nullptr;             // (neuron, batch): what several tokens get of a column
  float* ups_ = nullptr;                 // (thread, batch, chunk)
  uint8_t* landing_ = nullptr;           // (thread, neuron of a chunk): up rows of neurons that get no slot
  uint8_t* retained_ = nullptr;  // (neuron): down rows of those that get no slot; for several tokens, of all that fire
  uint8_t* compact_ = nullptr;   // (thread, neuron of a chunk): rows one behind another
  Column* columns_ = nullptr;    // (thread, neuron of a part)
  uint32_t* summed_ = nullptr;   // (thread, neuron of a part): the same for several tokens
  float* part_sums_ = nullptr;   // (part, batch, padded hidden)
  std::unique_ptr<ThreadCounters[]> thread_counters_;
  std::unique_ptr<Progress[]> progress_;  // (part)
  FirstFailure* failure_ = nullptr;
  ReadList ahead_;                     // reads begun before their job
  size_t ahead_bank_ = 0;              // whose they are
  bool is_ahead_guess_ = true;         // whether a predictor chose them; else they are known to be wanted, and lie in a half
  size_t ahead_half_ = 0;              // which
  size_t ahead_end_chunk_ = 0;         // one behind the last chunk that they cover
  size_t ahead_bytes_ = 0;             // how much is read ahead at present: what flash delivers during attention
  uint32_t* ahead_neurons_ = nullptr;  // (neuron): those read ahead, ascending
  ReadRequest** ahead_read_ = nullptr;  // (neuron): its read ahead, or null
  size_t ahead_count_ = 0;
  size_t ahead_used_ = 0;
  bool could_ask_ = false;   // whether the predictor could be asked ahead of the present job
  bool is_asked_ = false;    // whether it was
  uint64_t ahead_jobs_ = 0;  // that could have been
  Mean asking_;              // seconds of a job, summed over threads: the scores before attention
  Mean waiting_asked_;       // waiting for flash then
  Mean waiting_;             // waiting for flash without them
  StreamCounters stream_counters_;
};

}  // namespace pi2
