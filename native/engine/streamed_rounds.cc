/** The rounds of StreamedExperts: what each of them reads, how it lands, and what of it stays. */
#include <chrono>
#include <cstring>

#include "native/engine/stream_sizes.h"
#include "native/engine/streamed_experts.h"

namespace pi2 {

/** Plans and submits chunks from `first_chunk` on; whether chunks are left after them. */
bool StreamedExperts::plan_round(size_t bank, size_t first_chunk, Round* round) {
  const size_t half = staging_.bytes() / 2;
  round->first_chunk = first_chunk;
  round->read_count = 0;
  round->staged_bytes = 0;
  size_t chunk = first_chunk;
  for (; chunk < chunks(); chunk++) {
    const bool fits = round->staged_bytes + chunk_flash_bytes(*config_) <= half &&
                      round->read_count + chunk_reads(*config_) <= half_requests_;
    if (!fits && chunk > first_chunk) break;
    if (is_whole(bank, chunk)) {
      plan_whole_chunk(bank, chunk, round);
    } else {
      plan_open_chunk(bank, chunk, round);
    }
  }
  round->end_chunk = chunk;
  if (round->read_count > 0) reader_->submit(round->reads, round->read_count);
  stream_counters_.reads += round->read_count;
  stream_counters_.read_bytes += round->staged_bytes;
  return chunk < chunks();
}

void StreamedExperts::plan_open_chunk(size_t bank, size_t chunk, Round* round) {
  const BundleLayout& layout = config_->layout;
  ReadRequest* read = nullptr;
  for (size_t entry = chunk * kNeuronChunk; entry < chunk * kNeuronChunk + open_count_[chunk]; entry++) {
    const size_t neuron = open_[entry];
    slot_[entry] = NeuronCache::kNoSlot;
    staged_[entry] = nullptr;
    rows_[entry] = cache_.rows(bank, neuron);
    if (rows_[entry] != nullptr) {
      (neuron < cache_.plan(bank).hot_neurons ? stream_counters_.hot_hits : stream_counters_.cold_hits)++;
      continue;
    }
    stream_counters_.misses++;
    stream_counters_.asked_bytes += layout.part2_bytes;
    const size_t offset = config_->expert_offsets[bank] + layout.part2_at(neuron);
    const size_t begin = page_down(offset);
    const size_t end = page_up(offset + layout.part2_bytes);
    if (read != nullptr && begin <= read->offset + read->bytes + kGapBytes && end - read->offset <= kMostReadBytes) {
      const size_t longer = std::max(end, read->offset + read->bytes) - read->offset;
      round->staged_bytes += longer - read->bytes;
      read->bytes = longer;
    } else {
      add_read(begin, end, round);
      read = &round->reads[round->read_count - 1];
    }
    staged_[entry] = read->buffer + (offset - read->offset);
    read_of_[entry] = static_cast<uint32_t>(round->read_count - 1);
    slot_[entry] = cache_.admit(bank, neuron);
  }
}

void StreamedExperts::plan_whole_chunk(size_t bank, size_t chunk, Round* round) {
  const BundleLayout& layout = config_->layout;
  const size_t first = chunk * kNeuronChunk;
  const size_t last = std::min(first + kNeuronChunk, config_->neuron_count) - 1;
  const size_t base = config_->expert_offsets[bank];
  const size_t begin = base + first / layout.neurons_per_unit * layout.unit_bytes;
  const size_t end = base + (last / layout.neurons_per_unit + 1) * layout.unit_bytes;
  const uint8_t* staging = nullptr;
  const auto first_read = static_cast<uint32_t>(round->read_count);
  for (size_t at = begin; at < end; at += kMostReadBytes) {
    const uint8_t* buffer = add_read(at, std::min(at + kMostReadBytes, end), round);
    if (staging == nullptr) staging = buffer;
  }
  stream_counters_.misses += last - first + 1;
  stream_counters_.asked_bytes += (last - first + 1) * (layout.part1_bytes + layout.part2_bytes);
  for (size_t neuron = first; neuron <= last; neuron++) {
    const size_t entry = neuron;
    part1_[entry] = staging + (base + layout.part1_at(neuron) - begin);
    staged_[entry] = staging + (base + layout.part2_at(neuron) - begin);
    rows_[entry] = nullptr;
    slot_[entry] = NeuronCache::kNoSlot;
    read_of_[entry] = first_read;  // and those after it: see land_chunk
  }
}

/** Appends a read of whole pages to a round; where its bytes will be. */
const uint8_t* StreamedExperts::add_read(size_t begin, size_t end, Round* round) {
  ReadRequest& read = round->reads[round->read_count++];
  read.offset = begin;
  read.bytes = end - begin;
  read.buffer = round->staging + round->staged_bytes;
  round->staged_bytes += end - begin;
  return read.buffer;
}

/** Waits for one read of the round; counts the time that it was not there yet. */
bool StreamedExperts::wait_for(const Round& round, size_t read, size_t thread) {
  ReadRequest& request = round.reads[read];
  if (request.state.load(std::memory_order_acquire) == ReadRequest::kDone) return true;
  const auto start = std::chrono::steady_clock::now();
  Status status = reader_->wait(request);
  const auto waited = std::chrono::steady_clock::now() - start;
  thread_counters_[thread].stall_ns +=
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count());
  const bool landed = status.is_ok();
  failure_->meet(std::move(status));
  return landed;
}

/**
 * Waits for what the chunk reads, neuron by neuron, and makes rows of it: in the slots of neurons that will be kept, else in
 * the thread's landing memory, which the next chunk overwrites. A chunk without resident gates gets them here, and loses the
 * entries that do not fire.
 */
bool StreamedExperts::land_chunk(const ExpertJob& job, size_t bank, const Round& round, size_t chunk, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  if (is_whole(bank, chunk)) {
    const size_t count = open_count_[chunk];
    const size_t units = (open_[first + count - 1] / config_->layout.neurons_per_unit) -
                         (open_[first] / config_->layout.neurons_per_unit) + 1;
    const size_t reads = (units * config_->layout.unit_bytes + kMostReadBytes - 1) / kMostReadBytes;
    for (size_t i = 0; i < reads; i++) {
      if (!wait_for(round, read_of_[first] + i, thread)) return false;
    }
    for (size_t entry = first; entry < first + count; entry++) {
      if (!is_sound(bank, open_[entry], 0, part1_[entry])) return false;
    }
    keep_firing(job, chunk, thread);
  }
  uint8_t* landing = landing_ + thread * kNeuronChunk * slot_bytes(*config_);
  for (size_t entry = first; entry < first + open_count_[chunk]; entry++) {
    if (staged_[entry] == nullptr) continue;
    if (!is_whole(bank, chunk) && !wait_for(round, read_of_[entry], thread)) return false;
    if (!is_sound(bank, open_[entry], 1, staged_[entry])) return false;
    uint8_t* rows = slot_[entry] != NeuronCache::kNoSlot ? cache_.slot(bank, slot_[entry])
                                                         : landing + (entry - first) * slot_bytes(*config_);
    uint8_t* const places[3] = {nullptr, rows, rows + row_bytes_};
    unpack_bundle(*config_, part1_[entry], staged_[entry], places);
    rows_[entry] = rows;
  }
  return true;
}

/** Neurons whose rows have arrived in their slots are found from now on. */
void StreamedExperts::settle_round(size_t bank, const Round& round, bool failed) {
  for (size_t chunk = round.first_chunk; chunk < round.end_chunk; chunk++) {
    if (is_whole(bank, chunk)) continue;
    for (size_t entry = chunk * kNeuronChunk; entry < chunk * kNeuronChunk + open_count_[chunk]; entry++) {
      const bool read = staged_[entry] != nullptr;
      counters_.weight_bytes_read += slot_bytes(*config_);
      if (!read || slot_[entry] == NeuronCache::kNoSlot) continue;
      if (failed) {
        cache_.abandon(bank, slot_[entry]);
      } else {
        cache_.commit(bank, open_[entry], slot_[entry]);
      }
    }
  }
}

}  // namespace pi2
