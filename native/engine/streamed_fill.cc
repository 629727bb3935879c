/**
 * StreamedExperts: what is kept from the start (gates, hot neurons, those that slots begin with) comes into memory with the
 * first job of its bank, not at open: a model is open as soon as its fixed region is there.
 *
 * A job of several tokens that asks no predictor takes every chunk of a bank that is not filled for one that is read whole.
 * A prompt reads it all anyway; what has a place goes there as it lands, while others are computed (land_gates, land_rows).
 * Any other job wants some neurons where they are kept: for it `fill` reads just these before it begins, in rounds of the
 * same long reads.
 *
 * A bank counts as filled once a whole job, or `fill`, met no failure. Until then nothing is found in it, so a job that is
 * done again reads it again.
 */
#include <utility>

#include "native/engine/stream_sizes.h"
#include "native/engine/streamed_experts.h"

namespace pi2 {

Status StreamedExperts::fill(size_t bank) {
  if (is_filled(bank)) return Status::ok();
  const TraceSpan span(pool_->trace(), TraceStage::kFill);
  // Whatever was begun lies where this reads to.
  end_ahead();
  Found& found = found_of(0);
  found.bank = bank;
  for (size_t chunk = 0; chunk < chunks(); chunk++) find_kept(found, chunk);
  FirstFailure failure;
  failure_ = &failure;
  bool more = plan_round(found, 0, 0);
  for (size_t half = 0;; half = 1 - half) {
    const Round& round = rounds_[half];
    // After a failure, only what is under way is waited for.
    const bool last = !more || failure.any();
    if (!last) more = plan_round(found, round.end_chunk, 1 - half);
    pool_->run(round.end_chunk - round.first_chunk, [&](size_t task, size_t thread) {
      const size_t chunk = round.first_chunk + task;
      if (!failure.any() && land_gates(found, chunk, thread)) static_cast<void>(land_rows(found, chunk, thread));
    });
    wait_everything(found, round);
    trace_reads(round.first_phase);
    if (last) break;
  }
  failure_ = nullptr;
  for (size_t thread = 0; thread < config_->threads; thread++) {
    stream_counters_.add(std::exchange(thread_counters_[thread].stream, {}));
  }
  if (!failure.any()) filled_[bank] = 1;
  return failure.take();
}

Status StreamedExperts::fill_all() {
  Status status;
  for (size_t bank = 0; bank < filled_.size() && status.is_ok(); bank++) status = fill(bank);
  return status;
}

/** The neurons of a chunk that have a place are its entries, all of them on flash. */
void StreamedExperts::find_kept(Found& found, size_t chunk) {
  const size_t first = chunk * kNeuronChunk;
  const size_t end = std::min(first + kNeuronChunk, config_->neuron_count);
  size_t entry = first;
  for (size_t neuron = first; neuron < end; neuron++) {
    if (cache_.part1(found.bank, neuron) == nullptr && cache_.first_rows(found.bank, neuron) == nullptr) continue;
    found.open[entry] = static_cast<uint32_t>(neuron);
    found.slot[entry] = NeuronCache::kNoSlot;
    found.state[entry++] = kMissing;
  }
  found.open_count[chunk] = static_cast<uint32_t>(entry - first);
  found.kinds[chunk] = ChunkKind::kWhole;
}

}  // namespace pi2
