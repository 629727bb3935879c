/** StreamedExperts: what a round reads, and what of it stays in memory afterwards. */
#include <cstring>

#include "native/engine/stream_sizes.h"
#include "native/engine/streamed_experts.h"

namespace pi2 {

void StreamedExperts::plan_first(Found& found, size_t half) {
  found.half = half;
  found.is_planned = true;
  found.has_more = plan_round(found, found.first_chunk, half);
}

/**
 * Plans chunks from `first_chunk` on into a half of the staging memory, which is free, and submits their first reads;
 * whether chunks are left after them.
 */
bool StreamedExperts::plan_round(Found& found, size_t first_chunk, size_t half) {
  const TraceSpan span(pool_->trace(), TraceStage::kPlan);
  const size_t most_bytes = half_bytes(*config_);
  Round* const round = &rounds_[half];
  *round = {};
  round->first_chunk = first_chunk;
  ReadList& list = round->first_phase;
  list.reads = requests_.get() + half * half_requests_;
  list.staging = staging_.data() + half * most_bytes;
  size_t chunk = first_chunk;
  // Reads begun ahead take the beginning of the half that they lie in.
  const bool is_begun = first_chunk == 0 && ahead_end_chunk_ > 0;
  const size_t begun_bytes = is_begun ? ahead_.staged_bytes : 0;
  const size_t begun_reads = is_begun ? ahead_.count : 0;
  list.reads += begun_reads;
  list.staging += begun_bytes;
  round->planned_bytes = begun_bytes;
  round->planned_reads = begun_reads;
  for (; chunk < chunks(); chunk++) {
    const bool is_predicted = found.kinds[chunk] == ChunkKind::kPredicted;
    size_t bytes = chunk_flash_bytes(*config_);
    size_t reads = chunk_reads(*config_);
    if (is_predicted) {
      size_t missing = 0;
      size_t needed = 0;
      size_t last = 0;
      for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
        if (found.state[entry] != kMissing) continue;
        needed += entry_flash_bytes(*config_, missing == 0 ? kNeuronChunk : found.open[entry] - last);
        last = found.open[entry];
        missing++;
      }
      bytes = std::min(bytes, needed);
      reads = 3 * missing;
    }
    const bool fits = round->planned_bytes + bytes <= most_bytes && round->planned_reads + reads <= half_requests_;
    if (!fits && chunk > first_chunk && !(is_begun && chunk < ahead_end_chunk_)) break;
    plan_chunk(found, chunk, round);
    // What other kinds need is the same whenever they are planned: it may count as it is.
    round->planned_bytes = is_predicted ? round->planned_bytes + bytes : begun_bytes + list.staged_bytes;
    round->planned_reads = is_predicted ? round->planned_reads + reads : begun_reads + list.count;
  }
  round->end_chunk = chunk;
  // No region runs: while this thread waits, all do.
  stream_counters_.gate_stall_ns += submit(list) * pool_->threads();
  stream_counters_.reads += list.count;
  stream_counters_.read_bytes += list.staged_bytes;
  return chunk < chunks();
}

void StreamedExperts::plan_chunk(Found& found, size_t chunk, Round* round) {
  const BundleLayout& layout = config_->layout;
  const ChunkKind kind = found.kinds[chunk];
  const bool two_phases = kind == ChunkKind::kPredicted && two_phases_;
  ReadList* list = &round->first_phase;
  const size_t first_read = list->count;
  found.later[chunk] = {};
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    if (found.state[entry] != kMissing) continue;
    const size_t neuron = found.open[entry];
    if (kind != ChunkKind::kWhole) found.slot[entry] = cache_.admit(found.bank, neuron);
    if (kind == ChunkKind::kGates) {
      stream_counters_.asked_bytes += layout.part2_bytes;
      plan_rows(found, entry, list, first_read);
      continue;
    }
    const size_t part1 = config_->expert_offsets[found.bank] + layout.part1_at(neuron);
    const size_t part2 = config_->expert_offsets[found.bank] + layout.part2_at(neuron);
    const auto take_whole = [&](ReadRequest& read) {
      found.gate_read[entry] = found.up_read[entry] = found.down_read[entry] = &read;
      found.part1[entry] = read.buffer + (part1 - read.offset);
      found.staged_up[entry] = read.buffer + (part2 - read.offset);
      found.staged_down[entry] = found.staged_up[entry] + (config_->gated ? weight_bytes_ : 0);
    };
    if (ahead_count_ > 0 && ahead_read_[neuron] != nullptr) {
      take_whole(*ahead_read_[neuron]);
      ahead_used_++;
      continue;
    }
    stream_counters_.asked_bytes += layout.part1_bytes + (two_phases ? 0 : layout.part2_bytes);
    const bool whole = !two_phases && (config_->stream.bundles || kind == ChunkKind::kWhole);
    ReadRequest& read = add_range(part1, whole ? part2 + layout.part2_bytes : part1 + layout.part1_bytes, list, first_read);
    if (whole) {
      take_whole(read);
      continue;
    }
    found.part1[entry] = read.buffer + (part1 - read.offset);
    found.gate_read[entry] = &read;
    if (!two_phases) plan_rows(found, entry, list, first_read);
  }
  if (two_phases) keep_room(found, chunk, round);
}

/** Reads of the up row (if there is a gate) and the down row of an entry. */
void StreamedExperts::plan_rows(Found& found, size_t entry, ReadList* list, size_t first_read) {
  const size_t up = config_->expert_offsets[found.bank] + config_->layout.part2_at(found.open[entry]);
  const size_t down = up + (config_->gated ? weight_bytes_ : 0);
  const size_t end = up + config_->layout.part2_bytes;
  const bool apart = !config_->stream.bundles && config_->gated;
  ReadRequest& of_up = add_range(up, apart ? down : end, list, first_read);
  found.staged_up[entry] = of_up.buffer + (up - of_up.offset);
  found.up_read[entry] = &of_up;
  ReadRequest& of_down = apart ? add_range(down, end, list, first_read) : of_up;
  found.staged_down[entry] = of_down.buffer + (down - of_down.offset);
  found.down_read[entry] = &of_down;
}

/**
 * The read of a list that has the bytes [begin, end): its last one, made longer, or a new one of whole pages. Reads before
 * `first_read` are left alone. Offsets must not fall. Without bundles every range is read by itself.
 */
ReadRequest& StreamedExperts::add_range(size_t begin, size_t end, ReadList* list, size_t first_read) {
  begin = page_down(begin);
  end = page_up(end);
  if (list->count > first_read && config_->stream.bundles) {
    ReadRequest& last = list->reads[list->count - 1];
    if (begin <= last.offset + last.bytes + kGapBytes && end - last.offset <= kMostReadBytes) {
      const size_t bytes = std::max(end, last.offset + last.bytes) - last.offset;
      list->staged_bytes += bytes - last.bytes;
      last.bytes = bytes;
      return last;
    }
  }
  ReadRequest& read = list->reads[list->count++];
  read.offset = begin;
  read.bytes = end - begin;
  read.buffer = list->staging + list->staged_bytes;
  list->staged_bytes += end - begin;
  return read;
}

/**
 * Keeps requests and staging for the rows of a chunk's missing entries: as many as if all of them fired. Those that do are
 * read in no more bytes and requests than all.
 */
void StreamedExperts::keep_room(Found& found, size_t chunk, Round* round) {
  ReadList& list = round->first_phase;
  ReadRequest* const reads_end = list.reads + half_requests_ - round->later_count;
  uint8_t* const staging_end = list.staging + half_bytes(*config_) - round->later_bytes;
  // Planned at the very end of what is free, only to be measured; then moved to end there.
  size_t count = 0;
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) count += wants_rows(found, entry);
  ReadList rows{reads_end - 2 * count, 0, list.staging, 0};
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    if (wants_rows(found, entry)) plan_rows(found, entry, &rows, 0);
  }
  round->later_count += 2 * count;
  round->later_bytes += rows.staged_bytes;
  found.later[chunk] = {rows.reads, 0, staging_end - rows.staged_bytes, 0};
}

/** Second phase: reads the rows of the entries that are still wanted. On any thread. */
void StreamedExperts::submit_rows(Found& found, size_t chunk, size_t thread) {
  StreamCounters& counters = thread_counters_[thread].stream;
  ReadList& list = found.later[chunk];
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    if (!wants_rows(found, entry)) continue;
    counters.asked_bytes += config_->layout.part2_bytes;
    plan_rows(found, entry, &list, 0);
  }
  counters.row_stall_ns += submit(list);
  counters.reads += list.count;
  counters.read_bytes += list.staged_bytes;
}

/** Neurons whose rows have arrived in their slots are found from now on. */
void StreamedExperts::settle_round(Found& found, const Round& round, bool failed) {
  for (size_t chunk = round.first_chunk; chunk < round.end_chunk; chunk++) {
    if (found.kinds[chunk] == ChunkKind::kWhole && !failed) keep_fired(found, chunk);
    for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
      if (found.slot[entry] == NeuronCache::kNoSlot || found.state[entry] == kResident) continue;
      if (failed || found.state[entry] == kDropped) {
        cache_.abandon(found.bank, found.slot[entry]);
      } else {
        cache_.commit(found.bank, found.open[entry], found.slot[entry]);
      }
    }
  }
}

/** Of a chunk that was read whole, neurons that fired fill slots that nobody has used yet: a prompt warms the cache. */
void StreamedExperts::keep_fired(Found& found, size_t chunk) {
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk) && cache_.has_free_slot(found.bank); entry++) {
    const size_t neuron = found.open[entry];
    const bool is_of_use = keeps_gates(*config_) || cache_.part1(found.bank, neuron) != nullptr;
    if (!is_of_use || found.state[entry] != kMissing || cache_.rows(found.bank, neuron) != nullptr) continue;
    cache_.touch(found.bank, neuron);
    found.slot[entry] = cache_.admit(found.bank, neuron);
    unpack_rows(found, entry, slot_rows(cache_.slot(found.bank, found.slot[entry])));
  }
}

}  // namespace pi2
