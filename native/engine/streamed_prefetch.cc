/**
 * StreamedExperts: reads begun before attention for the FFN behind it. The stream changes little over an attention block, so
 * the predictor is asked once with what is there before it; flash works while attention computes.
 *
 * How much is read ahead follows what is left of flash: as much as really arrived until it was wanted. Where guesses are
 * poor, reads ahead take flash away from reads that are needed, and fewer are begun (field experience: on a busy flash
 * prefetching costs more than it brings).
 *
 * Asking twice costs too: where flash answers sooner than memory gives the predictor's weights, waiting is cheaper. So a
 * few jobs do the other thing, and what is cheaper of late, asking and waiting or waiting alone, the others do.
 */
#include <algorithm>
#include <chrono>
#include <utility>

#include "native/engine/streamed_experts.h"

namespace pi2 {
namespace {

/** Of the neurons read ahead at least this share must be wanted, else less is read ahead. */
constexpr double kLeastUsed = 0.6;
/** A group of which fewer neurons on flash fire than this, in the mean of so many tokens, is not worth its scores. */
constexpr float kLeastFired = 0.5f;
/** One job in so many tries what does not seem worth it. */
constexpr uint64_t kTrialEvery = 16;
/** Weight of the latest job in what asking and waiting take of late. */
constexpr double kLatest = 1.0 / 64;
/** How fast the amount follows: it grows slowly and shrinks fast. */
constexpr double kGrowth = 1.05;
constexpr double kDecline = 0.7;

}  // namespace

void StreamedExperts::prefetch(const ExpertJob& job) {
  const size_t bank = bank_of(job);
  const BundleLayout& layout = config_->layout;
  end_ahead();
  // Flash has to bring what is kept first.
  if (!is_filled(bank)) return;
  ahead_bank_ = bank;
  const size_t most = std::min(ahead_bytes_ / page_up(layout.unit_bytes), most_ahead(*config_));
  if (most == 0) return;
  could_ask_ = true;
  is_asked_ = is_asking_worth_it();
  if (!is_asked_) return;
  const auto start = std::chrono::steady_clock::now();
  // Candidates of a chunk take the places of its entries: there are none between two jobs.
  Found& found = found_of(0);
  predictor_->begin(job, true);
  // Several tokens are scored a group at a time.
  const size_t most_groups = job.tokens == 1 ? Predictor::kMostGroups : 1;
  const size_t groups = group_count(config_->neuron_count);
  pool_->run((groups + most_groups - 1) / most_groups, [&](size_t block, size_t thread) {
    size_t first = block * most_groups;
    size_t last = std::min(first + most_groups, groups);
    for (size_t chunk = first * kChunksPerGroup; chunk < std::min(last * kChunksPerGroup, chunks()); chunk++) {
      found.open_count[chunk] = 0;
    }
    const auto is_worth_it = [&](size_t group) { return cache_.fired_elsewhere(bank, group) >= kLeastFired; };
    while (first < last && !is_worth_it(first)) first++;
    while (first < last && !is_worth_it(last - 1)) last--;
    if (first == last) return;
    const float* scores = predictor_->score(job, first, last - first, thread);
    const size_t begin = first * kGroup;
    const size_t count = std::min(last * kGroup, config_->neuron_count) - begin;
    uint8_t likely[Predictor::kMostGroups * kGroup];
    predictor_->find_likely(job, scores, count, likely);
    for (size_t j = 0; j < count; j++) {
      const size_t neuron = begin + j;
      if (likely[j] == 0 || cache_.rows(bank, neuron) != nullptr) continue;
      float best = scores[j];
      for (size_t t = 1; t < job.tokens; t++) best = std::max(best, scores[t * kGroup + j]);
      if (!(best >= predictor_->threshold(job.layer_index, neuron, false))) continue;
      const size_t chunk = neuron / kNeuronChunk;
      const size_t entry = chunk * kNeuronChunk + found.open_count[chunk]++;
      found.open[entry] = static_cast<uint32_t>(neuron);
      found.gates[entry] = best;
    }
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  asking_.add(took.count() * static_cast<double>(pool_->threads()));
  // All candidates to the front, the likeliest of them first, then in the order of flash.
  size_t count = 0;
  for (size_t chunk = 0; chunk < chunks(); chunk++) {
    for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++, count++) {
      found.open[count] = found.open[entry];
      // By neuron: entry numbers are at most neuron numbers, so no score that is still needed is overwritten.
      found.gates[count] = found.gates[entry];
    }
  }
  if (count > most) {
    // The score of the last one that is taken.
    std::copy_n(found.gates, count, found.batch_gates);
    std::nth_element(found.batch_gates, found.batch_gates + most - 1, found.batch_gates + count, std::greater<float>());
    const float least = found.batch_gates[most - 1];
    size_t kept = 0;
    for (size_t i = 0; i < count && kept < most; i++) {
      if (found.gates[i] >= least) found.open[kept++] = found.open[i];
    }
    count = kept;
  }
  for (size_t i = 0; i < count; i++) {
    const size_t neuron = found.open[i];
    const size_t base = config_->expert_offsets[bank];
    const size_t begin = base + layout.part1_at(neuron);
    const size_t end = base + layout.part2_at(neuron) + layout.part2_bytes;
    if (ahead_.staged_bytes + page_up(layout.unit_bytes) + kGapBytes > config_->stream.prefetch_bytes) break;
    ahead_read_[neuron] = &add_range(begin, end, &ahead_, 0);
    ahead_neurons_[ahead_count_++] = static_cast<uint32_t>(neuron);
  }
  if (ahead_.count == 0) return;
  stream_counters_.row_stall_ns += submit(ahead_) * pool_->threads();
  stream_counters_.reads += ahead_.count;
  stream_counters_.read_bytes += ahead_.staged_bytes;
  stream_counters_.asked_bytes += ahead_count_ * (layout.part1_bytes + layout.part2_bytes);
  stream_counters_.prefetched += ahead_count_;
}

bool StreamedExperts::is_asking_worth_it() {
  const bool is_known = asking_.count > 0 && waiting_asked_.count > 0 && waiting_.count > 0;
  const bool is_worth = !is_known || asking_.mean + waiting_asked_.mean < waiting_.mean;
  return ahead_jobs_++ % kTrialEvery == kTrialEvery - 1 ? !is_worth : is_worth;
}

/** A job that could have been asked for before is done: `waited` seconds, summed over threads. */
void StreamedExperts::judge_asking(double waited) {
  (std::exchange(is_asked_, false) ? waiting_asked_ : waiting_).add(waited);
}

void StreamedExperts::Mean::add(double value) {
  count++;
  mean += (value - mean) * std::max(kLatest, 1.0 / static_cast<double>(count));
}

/** Attention is over: what has arrived by now is what flash had to spare. */
void StreamedExperts::tune_ahead() {
  if (ahead_.count == 0 || !is_ahead_guess_) return;
  reader_->poll();
  size_t arrived = 0;
  for (size_t i = 0; i < ahead_.count; i++) {
    arrived += ahead_.reads[i].state.load(std::memory_order_acquire) != ReadRequest::kPending;
  }
  const bool is_late = arrived < ahead_.count - ahead_.count / 8;
  const double bytes = static_cast<double>(ahead_bytes_) * (is_late ? kDecline : kGrowth);
  const double least = static_cast<double>(page_up(config_->layout.unit_bytes));
  ahead_bytes_ = static_cast<size_t>(std::clamp(bytes, least, static_cast<double>(config_->stream.prefetch_bytes)));
}

/** Waits for what was begun, so that its memory can be used again, and forgets it. A read that failed fails nobody here. */
void StreamedExperts::end_ahead() {
  if (ahead_.count == 0) return;
  const auto start = std::chrono::steady_clock::now();
  for (size_t i = 0; i < ahead_.count; i++) static_cast<void>(reader_->wait(ahead_.reads[i]));
  const auto waited = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start);
  stream_counters_.row_stall_ns += static_cast<uint64_t>(waited.count()) * pool_->threads();
  trace_reads(ahead_);
  for (size_t i = 0; i < ahead_count_; i++) ahead_read_[ahead_neurons_[i]] = nullptr;
  if (is_ahead_guess_) {
    stream_counters_.prefetch_used += ahead_used_;
    if (static_cast<double>(ahead_used_) < kLeastUsed * static_cast<double>(ahead_count_)) {
      ahead_bytes_ = static_cast<size_t>(static_cast<double>(ahead_bytes_) * kDecline);
    }
  }
  forget_ahead();
}

/** No read is ahead, and the next would be guesses, which have memory of their own. */
void StreamedExperts::forget_ahead() {
  ahead_ = {requests_.get() + 2 * half_requests_, 0, staging_.data() + 2 * half_bytes(*config_), 0};
  is_ahead_guess_ = true;
  ahead_half_ = ahead_end_chunk_ = 0;
  ahead_count_ = ahead_used_ = 0;
}

}  // namespace pi2
