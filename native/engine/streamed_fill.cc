/**
 * StreamedExperts: what is kept from the start (gates, hot neurons, those that slots begin with) comes into memory with the
 * first job of its bank, not at open: a model is open as soon as its fixed region is there.
 *
 * A job that asks no predictor takes every chunk of a bank that is not filled for one that is read whole. A prompt reads it
 * all anyway; what has a place goes there as it lands, while others are computed (land_gates, land_rows). Any other job
 * wants some neurons where they are kept: for it `fill` reads just these before it begins, in rounds of the same long reads.
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
  for (size_t chunk = 0; chunk < chunks(); chunk++) find_kept(bank, chunk);
  FirstFailure failure;
  failure_ = &failure;
  Round rounds[2] = {round_in(0), {}};
  bool more = plan_round(bank, 0, &rounds[0]);
  for (size_t current = 0;; current = 1 - current) {
    const Round& round = rounds[current];
    // After a failure, only what is under way is waited for.
    const bool last = !more || failure.any();
    if (!last) {
      rounds[1 - current] = round_in(1 - current);
      more = plan_round(bank, round.end_chunk, &rounds[1 - current]);
    }
    pool_->run(round.end_chunk - round.first_chunk, [&](size_t task, size_t thread) {
      const size_t chunk = round.first_chunk + task;
      if (!failure.any() && land_gates(bank, chunk, thread)) static_cast<void>(land_rows(bank, chunk, thread));
    });
    wait_everything(round);
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
void StreamedExperts::find_kept(size_t bank, size_t chunk) {
  const size_t first = chunk * kNeuronChunk;
  const size_t end = std::min(first + kNeuronChunk, config_->neuron_count);
  size_t entry = first;
  for (size_t neuron = first; neuron < end; neuron++) {
    if (cache_.part1(bank, neuron) == nullptr && cache_.first_rows(bank, neuron) == nullptr) continue;
    open_[entry] = static_cast<uint32_t>(neuron);
    slot_[entry] = NeuronCache::kNoSlot;
    state_[entry++] = kMissing;
  }
  open_count_[chunk] = static_cast<uint32_t>(entry - first);
  kinds_[chunk] = ChunkKind::kWhole;
}

}  // namespace pi2
