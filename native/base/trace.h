#pragma once
/**
 * Where the time of a step goes: spans of stages by thread, reads, counters. Off, each place costs one branch. On, each
 * thread writes to a ring of its own, taken at open: no lock, no allocation. A full ring loses its oldest records, which are
 * counted; spans are recorded when they end, so what encloses others is the last to be lost.
 *
 * Threads: thread 0 is the caller of the engine, the others are those of its pool. Rings are drained between steps.
 */
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace pi2 {

/** What a record is about. From kRead on: no spans of a thread. */
enum class TraceStage : uint16_t {
  kNone,
  kStep,  // value: tokens
  kEmbed,
  kLayer,
  kPrefetch,
  kFill,  // neurons that are kept come in, before a job that does not pass through all of its bank
  kAttention,
  kFfn,
  kPredict,  // a predictor's hidden units, or the scores of a group of neurons
  kFind,     // which neurons are wanted; with everything in memory, their gate and up rows too
  kPlan,     // planning and submitting reads
  kRound,
  kResident,
  kGate,
  kRow,
  kWait,  // for flash
  kUnit,  // waiting for the dense unit
  kSum,
  kHead,
  kRead,        // from submission until it is seen to be done; value: bytes
  kMissing,     // at begin: neurons of a job that were not in memory
  kFlashBytes,  // at begin: bytes read for a job
  kStageCount,
};

/** The name of a stage, as traces have it. */
const char* trace_stage_name(TraceStage stage);

/** Nanoseconds of the monotonic clock, which JavaScript has as process.hrtime. */
inline uint64_t trace_now() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

/** src/trace/records.ts reads it. */
struct TraceRecord {
  uint64_t begin_ns;
  uint64_t end_ns;
  uint64_t value;
  uint32_t layer;  // kNoLayer outside of layers
  uint16_t stage;
  uint16_t thread;

  static constexpr uint32_t kNoLayer = 0xffffffff;
};
static_assert(sizeof(TraceRecord) == 32);

class Trace {
 public:
  static size_t bytes_needed(size_t threads, size_t records);
  /** `memory`: bytes_needed bytes. */
  Trace(uint8_t* memory, size_t threads, size_t records);

  /** Thread 0 alone, between regions: what spans from now on belong to. */
  void set_layer(uint32_t layer) { layer_ = layer; }

  /** Thread 0 alone, before other threads take part: what they do is called as what it is doing. */
  void begin_region() { region_stage_ = stage_; }

  /** Adds a record to the ring of the calling thread. */
  void add(TraceStage stage, uint64_t begin_ns, uint64_t end_ns, uint64_t value);
  /** On thread 0: how much a total has grown since the last call. */
  void count(TraceStage counter, uint64_t total);

  /** Of all rings, between steps: records there are, those lost since the last drain. */
  size_t size() const;
  uint64_t dropped() const;
  /** Copies `size()` records, thread by thread, and forgets them. */
  void drain(TraceRecord* records);

 private:
  friend class TraceSpan;
  friend class TraceRegion;
  struct alignas(64) Ring {
    TraceRecord* records;
    uint64_t count;  // ever written since the last drain
  };

  Ring* rings_;
  size_t threads_;
  size_t capacity_;
  uint32_t layer_ = TraceRecord::kNoLayer;
  /** What thread 0 is at, in the midst of a region too. */
  TraceStage stage_ = TraceStage::kNone;
  TraceStage region_stage_ = TraceStage::kNone;
  uint64_t totals_[static_cast<size_t>(TraceStage::kStageCount)] = {};
};

/** Which ring is the calling thread's. */
inline thread_local uint16_t trace_thread = 0;

/** A stage from here to the end of the scope; of nothing if `trace` is null. */
class TraceSpan {
 public:
  TraceSpan(Trace* trace, TraceStage stage, uint64_t value = 0) : trace_(trace) {
    if (trace_ != nullptr) begin(stage, value);
  }
  ~TraceSpan() {
    if (trace_ != nullptr) end();
  }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  void begin(TraceStage stage, uint64_t value);
  void end();

  Trace* trace_;
  TraceStage stage_;
  TraceStage outer_;
  uint64_t begin_ns_;
  uint64_t value_;
};

/**
 * What a thread of the pool does of one region, from its first chunk to its last: a record that grows with each chunk, since
 * a thread may not write any more once its last chunk counts as finished.
 */
class TraceRegion {
 public:
  explicit TraceRegion(Trace* trace) : trace_(trace) {}
  void begin_chunk() {
    if (trace_ != nullptr) begin();
  }
  void end_chunk() {
    if (trace_ != nullptr) end();
  }

 private:
  void begin();
  void end();

  Trace* trace_;
  bool is_open_ = false;
  uint64_t place_ = 0;
};

}  // namespace pi2
