#pragma once
/**
 * The threads of the token loop. The caller is thread 0; the others spin for a moment between regions (a layer has five, a
 * few microseconds apart) and sleep when nothing comes, so that an idle engine costs nothing.
 *
 * A region is claimed chunk by chunk from one atomic ticket (high half: number of the region, low half: next chunk). A
 * worker that wakes late finds the region's number changed and claims nothing, so the caller never waits for a sleeper: it
 * waits only for chunks that were claimed.
 */
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "native/base/trace.h"

namespace pi2 {

class ThreadPool {
 public:
  /** `threads` counts the caller; at least 1. `trace` gets what they do; null: nothing is recorded. */
  explicit ThreadPool(size_t threads, Trace* trace = nullptr);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t threads() const { return workers_.size() + 1; }
  /**
   * Lets the regions from now on run on the first `threads` threads alone, at least 1; the others sleep and leave their
   * cores to somebody else. Between regions.
   */
  void limit(size_t threads);
  Trace* trace() const { return trace_; }

  /**
   * Runs work(chunk, thread) for every chunk in [0, chunks), on any thread, in any order; returns when all are done. Not
   * reentrant; one caller at a time.
   */
  template <class Work>
  void run(size_t chunks, const Work& work) {
    run_chunks(
        chunks,
        [](const void* context, size_t chunk, size_t thread) { (*static_cast<const Work*>(context))(chunk, thread); },
        &work);
  }

 private:
  using ChunkFunction = void (*)(const void* context, size_t chunk, size_t thread);

  void run_chunks(size_t chunks, ChunkFunction function, const void* context);
  /** Claims and runs chunks of region `region` until none are left. */
  void work_on(uint32_t region, size_t thread);
  void worker(size_t thread);
  /** Sleeps while threads are limited to others. */
  void wait_for_turn(size_t thread);

  Trace* const trace_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> limit_;
  // The region's work: written before the ticket is released, read after it is acquired.
  std::atomic<ChunkFunction> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint32_t> chunks_{0};
  std::vector<std::thread> workers_;
};

}  // namespace pi2
