/**
 * Hammers ThreadPool: regions of 0 to 100 chunks one behind the other, with pauses after which workers sleep and wake late,
 * chunks of uneven length, and some of them limited to fewer threads. Every chunk must run once, on one of the pool's
 * threads, before the region ends, and what it wrote must be seen. Prints "N regions, N chunks" or the first failure. Run
 * under the sanitizers by test/42-sanitizers.ts.
 */
#include "native/base/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

constexpr size_t kMostChunks = 100;
/** Fewer than a thread may record of a region: rings overflow too. */
constexpr size_t kRecords = 16;

/** Busy for about `steps` multiplications. */
uint64_t work(uint64_t value, size_t steps) {
  for (size_t i = 0; i < steps; i++) value = value * 6364136223846793005u + 1442695040888963407u;
  return value;
}

void require(bool condition, const char* what, size_t region) {
  if (condition) return;
  std::printf("FAILED: %s in region %zu\n", what, region);
  std::exit(1);
}

/** Counts of the chunks of a pool's regions, plain memory: only the pool keeps threads apart. */
class Hammer {
 public:
  Hammer(size_t threads, bool traced)
      : rings_(pi2::Trace::bytes_needed(threads, kRecords) + 64),
        trace_(rings_.data() + (64 - reinterpret_cast<uintptr_t>(rings_.data()) % 64), threads, kRecords),
        traced_(traced ? &trace_ : nullptr),
        pool_(threads, traced_),
        random_(static_cast<uint32_t>(threads)),
        limit_(threads) {
    require(pool_.threads() == threads, "another number of threads", 0);
  }

  void run(size_t regions) {
    for (size_t region = 0; region < regions; region++) {
      const size_t chunks = random_() % 4 == 0 ? random_() % 3 : random_() % (kMostChunks + 1);
      const size_t most_steps = random_() % 8 == 0 ? 4000 : 20;
      if (random_() % 8 == 0) pool_.limit(limit_ = 1 + random_() % pool_.threads());
      hammer(region, chunks, most_steps);
      if (random_() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 400));
    }
  }

  size_t chunks() const { return chunks_; }

 private:
  void hammer(size_t region, size_t chunks, size_t most_steps) {
    uint64_t results[kMostChunks] = {};
    size_t runs[kMostChunks] = {};
    std::vector<size_t> by_thread(pool_.threads(), 0);
    const uint64_t seed = random_();
    const pi2::TraceSpan outer(traced_, pi2::TraceStage::kFind);
    pool_.run(chunks, [&](size_t chunk, size_t thread) {
      const pi2::TraceSpan inner(traced_, pi2::TraceStage::kRow);
      require(chunk < chunks, "a chunk that is none", region);
      require(thread < limit_, "a thread that may not", region);
      results[chunk] = work(seed + chunk, (seed ^ chunk) % most_steps);
      runs[chunk]++;
      by_thread[thread]++;
    });
    size_t sum = 0;
    for (const size_t count : by_thread) sum += count;
    require(sum == chunks, "a wrong sum over threads", region);
    for (size_t chunk = 0; chunk < chunks; chunk++) {
      require(runs[chunk] == 1, "a chunk that did not run once", region);
      require(results[chunk] == work(seed + chunk, (seed ^ chunk) % most_steps), "a wrong result", region);
    }
    chunks_ += chunks;
    drain(region);
  }

  /** What was recorded before, which is what threads really did. */
  void drain(size_t region) {
    std::vector<pi2::TraceRecord> records(trace_.size());
    require(traced_ != nullptr || records.empty(), "a record though nothing is traced", region);
    trace_.drain(records.data());
    for (const pi2::TraceRecord& record : records) {
      const bool is_known = record.stage == static_cast<uint16_t>(pi2::TraceStage::kFind) ||
                            record.stage == static_cast<uint16_t>(pi2::TraceStage::kRow);
      require(is_known && record.thread < pool_.threads() && record.begin_ns <= record.end_ns, "a wrong record", region);
    }
    require(trace_.size() == 0 && trace_.dropped() == 0, "a ring that is not empty", region);
  }

  std::vector<uint8_t> rings_;
  pi2::Trace trace_;
  pi2::Trace* traced_;
  pi2::ThreadPool pool_;
  std::mt19937 random_;
  size_t limit_;
  size_t chunks_ = 0;
};

}  // namespace

/** Argument: how many regions for each number of threads. */
int main(int, char** arguments) {
  const size_t regions = std::strtoul(arguments[1], nullptr, 10);
  size_t chunks = 0;
  for (const size_t threads : {1, 2, 3, 8}) {
    Hammer hammer(threads, threads % 2 == 0);
    hammer.run(regions);
    chunks += hammer.chunks();
  }
  // Pools that end before, or just as, their workers wake up.
  for (size_t i = 0; i < 200; i++) Hammer(1 + i % 4, i % 8 < 4).run(i % 3);
  std::printf("%zu regions, %zu chunks\n", 4 * regions, chunks);
}
