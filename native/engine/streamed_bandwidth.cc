/** StreamedExperts: what flash does, traced, and what it can do when nothing else is to be done. */
#include <algorithm>
#include <chrono>

#include "native/engine/stream_sizes.h"
#include "native/engine/streamed_experts.h"

namespace pi2 {
namespace {

/** Reads under way at once. */
constexpr size_t kDepth = 64;
constexpr size_t kLeastRounds = 3;
constexpr double kLeastSeconds = 0.03;

}  // namespace

/** Begins the reads of a list; any thread. How long flash had no room for them, in nanoseconds. */
uint64_t StreamedExperts::submit(const ReadList& list) {
  if (list.count == 0) return 0;
  if (pool_->trace() != nullptr) {
    const uint64_t now = trace_now();
    for (size_t i = 0; i < list.count; i++) list.reads[i].submitted_ns = now;
  }
  return reader_->submit(list.reads, list.count);
}

/** Records the reads of a list, all of them done. */
void StreamedExperts::trace_reads(const ReadList& list) {
  Trace* trace = pool_->trace();
  for (size_t i = 0; trace != nullptr && i < list.count; i++) {
    ReadRequest& read = list.reads[i];
    // Readers that do not note when a read was done are looked at now.
    const uint64_t done = read.done_ns >= read.submitted_ns ? read.done_ns : trace_now();
    trace->add(TraceStage::kRead, read.submitted_ns, done, read.bytes);
    read.submitted_ns = 0;
  }
}

/** What the job missed, and read. */
void StreamedExperts::trace_counters() {
  Trace* trace = pool_->trace();
  if (trace == nullptr) return;
  trace->count(TraceStage::kMissing, stream_counters_.misses);
  trace->count(TraceStage::kFlashBytes, stream_counters_.read_bytes);
}

double StreamedExperts::measure_flash(size_t read_bytes) {
  using Clock = std::chrono::steady_clock;
  const size_t bytes = std::clamp(page_up(read_bytes), kPageBytes, kMostReadBytes);
  const size_t units = (config_->neuron_count + config_->layout.neurons_per_unit - 1) / config_->layout.neurons_per_unit;
  const size_t first = page_up(config_->expert_offsets.front());
  const size_t end = page_down(config_->expert_offsets.back() + units * config_->layout.unit_bytes);
  const size_t count = std::min({kDepth, half_requests_, half_bytes(*config_) / bytes});
  if (count == 0 || end < first + bytes) return 0;
  const size_t places = (end - first - bytes) / kPageBytes + 1;
  uint64_t random = 0x9e3779b97f4a7c15ull;
  double best = 0;
  double total_seconds = 0;
  for (size_t round = 0; round < kLeastRounds || total_seconds < kLeastSeconds; round++) {
    for (size_t i = 0; i < count; i++) {
      random = random * 6364136223846793005ull + 1442695040888963407ull;
      requests_[i].offset = first + (random >> 20) % places * kPageBytes;
      requests_[i].bytes = bytes;
      requests_[i].buffer = staging_.data() + i * bytes;
    }
    const auto start = Clock::now();
    reader_->submit(requests_.get(), count);
    bool landed = true;
    for (size_t i = 0; i < count; i++) landed &= reader_->wait(requests_[i]).is_ok();
    if (!landed) return 0;
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    total_seconds += seconds;
    best = std::max(best, static_cast<double>(count * bytes) / seconds);
  }
  return best;
}

}  // namespace pi2
