#include "native/base/thread_pool.h"

#include "native/base/pause.h"

namespace pi2 {
namespace {

/** About 50 us of pauses before a worker sleeps: longer than any serial part of a step. */
constexpr int kSpins = 2000;

constexpr uint32_t region_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
constexpr uint32_t unclaimed_of(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

}  // namespace

ThreadPool::ThreadPool(size_t threads, Trace* trace) : trace_(trace), limit_(static_cast<uint32_t>(threads)) {
  for (size_t i = 1; i < threads; i++) workers_.emplace_back([this, i] { worker(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  limit(threads());
  // An empty region wakes everybody up.
  run_chunks(0, nullptr, nullptr);
  for (std::thread& thread : workers_) thread.join();
}

void ThreadPool::limit(size_t threads) {
  const auto limit = static_cast<uint32_t>(threads);
  // A worker that sees a new limit late works on regions that it would have been allowed to work on, or on none: its region
  // has ended before the limit changed.
  if (limit_.exchange(limit, std::memory_order_relaxed) < limit) limit_.notify_all();
}

void ThreadPool::wait_for_turn(size_t thread) {
  uint32_t limit = limit_.load(std::memory_order_relaxed);
  while (thread >= limit) {
    limit_.wait(limit, std::memory_order_relaxed);
    limit = limit_.load(std::memory_order_relaxed);
  }
}

void ThreadPool::run_chunks(size_t chunks, ChunkFunction function, const void* context) {
  if (trace_ != nullptr) trace_->begin_region();
  const uint32_t region = region_of(ticket_.load(std::memory_order_relaxed)) + 1;
  function_.store(function, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  chunks_.store(static_cast<uint32_t>(chunks), std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  // Pairs with the load in worker(): sequentially consistent, so that either a worker about to sleep sees the new region or
  // its count as a sleeper is seen here.
  ticket_.store((static_cast<uint64_t>(region) << 32) | chunks, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) ticket_.notify_all();
  work_on(region, 0);
  for (int spin = 0; finished_.load(std::memory_order_acquire) != chunks; spin++) {
    if (spin < kSpins) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work_on(uint32_t region, size_t thread) {
  // What thread 0 does has spans of its own.
  TraceRegion traced(thread == 0 ? nullptr : trace_);
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (region_of(ticket) == region && unclaimed_of(ticket) > 0) {
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    // The region cannot end before this chunk is finished, so the work read here is its own.
    const uint32_t chunk = chunks_.load(std::memory_order_relaxed) - unclaimed_of(ticket);
    traced.begin_chunk();
    function_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), chunk, thread);
    traced.end_chunk();
    finished_.fetch_add(1, std::memory_order_release);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void ThreadPool::worker(size_t thread) {
  trace_thread = static_cast<uint16_t>(thread);
  uint32_t seen = 0;
  while (true) {
    wait_for_turn(thread);
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (int spin = 0; region_of(ticket) == seen && spin < kSpins; spin++) {
      pause_cpu();
      ticket = ticket_.load(std::memory_order_acquire);
    }
    while (region_of(ticket) == seen) {
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      ticket = ticket_.load(std::memory_order_seq_cst);
      if (region_of(ticket) == seen) ticket_.wait(ticket, std::memory_order_seq_cst);
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
      ticket = ticket_.load(std::memory_order_acquire);
    }
    seen = region_of(ticket);
    if (stop_.load()) return;
    // The ticket was released after the limit of its region was set.
    if (thread < limit_.load(std::memory_order_relaxed)) work_on(seen, thread);
  }
}

}  // namespace pi2
