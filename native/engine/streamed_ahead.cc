/**
 * StreamedExperts: reads of the next layer while the present one is computed (paper section 1.2, prompts). Where nothing is
 * guessed and no gate in memory says what fires, every neuron that is not in memory is read, so what the next layer of a
 * dense model reads first is known. It goes to the half of the staging memory that the last round of this layer leaves free,
 * and is there, or on its way, when attention is over. Rounds take it as their own reads: no result depends on it.
 */
#include "native/engine/stream_sizes.h"
#include "native/engine/streamed_experts.h"

namespace pi2 {

/** Whether the bank behind this one is the next to be computed, by chunks that are read whole. */
bool StreamedExperts::knows_next_bank(size_t bank) const {
  return config_->stream.pipeline && config_->expert_count == 1 && bank + 1 < config_->layer_count &&
         (!is_filled(bank + 1) || cache_.plan(bank + 1).resident_gates == 0);
}

/** Begins to read the first chunks of a bank, as many as fit a half of the staging memory that is free. */
void StreamedExperts::read_ahead(size_t bank, size_t half) {
  const BundleLayout& layout = config_->layout;
  const size_t base = config_->expert_offsets[bank];
  ahead_ = {requests_.get() + half * half_requests_, 0, staging_.data() + half * half_bytes(*config_), 0};
  ahead_bank_ = bank;
  is_ahead_guess_ = false;
  ahead_half_ = half;
  size_t chunk = 0;
  for (; chunk < chunks(); chunk++) {
    const bool fits = ahead_.staged_bytes + chunk_flash_bytes(*config_) <= half_bytes(*config_) &&
                      ahead_.count + chunk_reads(*config_) <= half_requests_;
    if (!fits && chunk > 0) break;
    const size_t first_read = ahead_.count;
    const size_t end = std::min((chunk + 1) * kNeuronChunk, config_->neuron_count);
    for (size_t neuron = chunk * kNeuronChunk; neuron < end; neuron++) {
      // As add_entry: rows without a gate are of no use.
      if (is_filled(bank) && keeps_gates(*config_) && cache_.rows(bank, neuron) != nullptr) continue;
      const size_t rows_end = base + layout.part2_at(neuron) + layout.part2_bytes;
      ahead_read_[neuron] = &add_range(base + layout.part1_at(neuron), rows_end, &ahead_, first_read);
      ahead_neurons_[ahead_count_++] = static_cast<uint32_t>(neuron);
    }
  }
  if (ahead_.count == 0) return forget_ahead();
  ahead_end_chunk_ = chunk;
  stream_counters_.row_stall_ns += submit(ahead_) * pool_->threads();
  stream_counters_.reads += ahead_.count;
  stream_counters_.read_bytes += ahead_.staged_bytes;
  stream_counters_.asked_bytes += ahead_count_ * (layout.part1_bytes + layout.part2_bytes);
}

}  // namespace pi2
