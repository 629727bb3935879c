/** StreamedExperts: the stages of a round (paper section 1.7). */
#include <chrono>
#include <cstring>
#include <thread>

#include "native/base/pause.h"
#include "native/engine/product.h"
#include "native/engine/stream_sizes.h"
#include "native/engine/streamed_experts.h"

namespace pi2 {
namespace {

constexpr size_t kStages = 3;
constexpr TraceStage kStageNames[kStages] = {TraceStage::kResident, TraceStage::kGate, TraceStage::kRow};
/** Entries computed together: a list of rows begins without prefetched ones. */
constexpr size_t kListRoom = 4 * kNeuronChunk;
/** Looks at another thread's progress before this one gives its core away. */
constexpr int kSpins = 2000;

}  // namespace

void StreamedExperts::compute_round(const ExpertJob& job, Found& found, const Round& round) {
  const TraceSpan span(pool_->trace(), TraceStage::kRound);
  for (size_t part = 0; part < kParts; part++) progress_[part].stages.store(0, std::memory_order_relaxed);
  if (config_->stream.pipeline) {
    // Tasks begin in this order, and none waits for a later one.
    pool_->run(kStages * kParts,
               [&](size_t task, size_t thread) { run_stage(job, found, round, task / kParts, task % kParts, thread); });
  } else {
    // One matrix after the other, nothing computed while reads are under way: what the pipeline is measured against.
    for (size_t stage = 0; stage < kStages; stage++) {
      const auto start = std::chrono::steady_clock::now();
      wait_everything(found, round);
      const auto waited = std::chrono::steady_clock::now() - start;
      const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count();
      (stage == 0 ? stream_counters_.gate_stall_ns : stream_counters_.row_stall_ns) +=
          static_cast<uint64_t>(ns) * pool_->threads();
      pool_->run(kParts, [&](size_t part, size_t thread) { run_stage(job, found, round, stage, part, thread); });
    }
  }
  // Whatever happened, no read may arrive in memory that is used again.
  wait_everything(found, round);
  trace_reads(round.first_phase);
  for (size_t chunk = round.first_chunk; chunk < round.end_chunk; chunk++) trace_reads(found.later[chunk]);
}

void StreamedExperts::wait_everything(const Found& found, const Round& round) {
  const auto wait = [&](const ReadList& list) {
    for (size_t i = 0; i < list.count; i++) failure_->meet(reader_->wait(list.reads[i]));
  };
  wait(round.first_phase);
  for (size_t chunk = round.first_chunk; chunk < round.end_chunk; chunk++) wait(found.later[chunk]);
}

void StreamedExperts::run_stage(const ExpertJob& job, Found& found, const Round& round, size_t stage, size_t part,
                                size_t thread) {
  const TraceSpan span(pool_->trace(), kStageNames[stage]);
  // The part's first chunk of the round.
  const size_t first = (round.first_chunk + kParts - 1 - part) / kParts * kParts + part;
  std::atomic<uint32_t>& progress = progress_[part].stages;
  if (stage == 2) {
    for (int spin = 0; progress.load(std::memory_order_acquire) != 2; spin++) {
      if (spin < kSpins) {
        pause_cpu();
      } else {
        std::this_thread::yield();
      }
    }
    row_stage(job, found, round, part, thread);
    return;
  }
  if (stage == 1) {
    for (size_t chunk = first; chunk < round.end_chunk && !failure_->any(); chunk += kParts) {
      gate_stage(job, found, chunk, thread);
    }
  } else if (job.is_single()) {
    resident_stage(job, found, round, first, thread);
  }
  progress.fetch_add(1, std::memory_order_release);
}

/** One token: entries in memory, of as many chunks together as fit a list. */
void StreamedExperts::resident_stage(const ExpertJob& job, Found& found, const Round& round, size_t first, size_t thread) {
  uint32_t entries[kListRoom];
  size_t count = 0;
  for (size_t chunk = first; chunk < round.end_chunk; chunk += kParts) {
    count += list_entries(found, chunk, kResident, entries + count);
    if (count + kNeuronChunk <= kListRoom && chunk + kParts < round.end_chunk) continue;
    // Gates kept apart were multiplied to find out which neurons fire.
    if (keeps_gates(*config_)) multiply_gates(job, found, entries, count, thread);
    activate_entries(job, found, entries, count, thread);
    count = 0;
  }
}

/** Gates of entries on flash; of all entries, for several tokens. Entries that do not fire are dropped. */
void StreamedExperts::gate_stage(const ExpertJob& job, Found& found, size_t chunk, size_t thread) {
  if (found.kinds[chunk] == ChunkKind::kGates || !land_gates(found, chunk, thread)) return;
  if (job.is_single()) {
    uint32_t entries[kNeuronChunk];
    multiply_gates(job, found, entries, list_entries(found, chunk, kMissing, entries), thread);
  } else {
    multiply_batch_gates(job, found, chunk, thread);
  }
  const bool two_phases = found.kinds[chunk] == ChunkKind::kPredicted && two_phases_;
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    if (found.state[entry] != kMissing) continue;
    bool fires = false;
    if (job.is_single()) {
      fires = gate_fires(*config_, found.gates[entry]);
    } else {
      const float* gates = found.batch_gates + found.open[entry] * config_->batch_size;
      for (size_t t = 0; t < job.tokens && !fires; t++) fires = gate_fires(*config_, gates[t]);
    }
    if (fires) continue;
    found.set_state(entry, kDropped);
    found.gates[entry] = 0.0f;
    if (two_phases) thread_counters_[thread].stream.spared_bytes += config_->layout.part2_bytes;
  }
  if (two_phases) submit_rows(found, chunk, thread);
}

/** Rows as they land. */
void StreamedExperts::row_stage(const ExpertJob& job, Found& found, const Round& round, size_t part, size_t thread) {
  const size_t first = (round.first_chunk + kParts - 1 - part) / kParts * kParts + part;
  for (size_t chunk = first; chunk < round.end_chunk && !failure_->any(); chunk += kParts) {
    if (!land_rows(found, chunk, thread)) return;
    if (!job.is_single()) {
      activate_batch(job, found, chunk, thread);
    } else {
      uint32_t entries[kNeuronChunk];
      const size_t count = list_entries(found, chunk, kMissing, entries);
      const size_t fired = activate_entries(job, found, entries, count, thread);
      thread_counters_[thread].stream.used_bytes += fired * missing_bytes(found, chunk);
    }
  }
}

bool StreamedExperts::wait_for(ReadRequest& request, uint64_t* stall_ns) {
  if (request.state.load(std::memory_order_acquire) == ReadRequest::kDone) return true;
  const TraceSpan span(pool_->trace(), TraceStage::kWait);
  const auto start = std::chrono::steady_clock::now();
  Status status = reader_->wait(request);
  const auto waited = std::chrono::steady_clock::now() - start;
  *stall_ns += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count());
  const bool landed = status.is_ok();
  failure_->meet(std::move(status));
  return landed;
}

/** Whether bytes from flash are those that the converter wrote. */
bool StreamedExperts::is_sound(const Found& found, size_t entry, size_t part) {
  const size_t neuron = found.open[entry];
  uint32_t expected;
  std::memcpy(&expected, checksums_[found.bank] + (2 * neuron + part) * sizeof expected, sizeof expected);
  uint32_t sum = 0;
  if (part == 0) {
    sum = crc32(found.part1[entry], config_->layout.part1_bytes, 0);
  } else {
    if (config_->gated) sum = crc32(found.staged_up[entry], weight_bytes_, 0);
    sum = crc32(found.staged_down[entry], weight_bytes_, sum);
  }
  if (sum == expected) return true;
  const std::string expert =
      config_->expert_count > 1 ? ", expert " + std::to_string(found.bank % config_->expert_count) : std::string();
  failure_->meet(Status::checksum("layer " + std::to_string(found.bank / config_->expert_count) + expert + ", neuron " +
                                  std::to_string(neuron) + " of " + config_->neurons_path +
                                  ": the bytes read from flash do not match their checksum"));
  return false;
}

/** Waits for the gates of a chunk, neuron by neuron; those that are kept for good go where they belong. */
bool StreamedExperts::land_gates(Found& found, size_t chunk, size_t thread) {
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    if (found.state[entry] != kMissing) continue;
    if (!wait_for(*found.gate_read[entry], &thread_counters_[thread].stream.gate_stall_ns)) return false;
    if (!is_sound(found, entry, 0)) return false;
    uint8_t* kept = is_filled(found.bank) ? nullptr : cache_.part1(found.bank, found.open[entry]);
    if (kept != nullptr) std::memcpy(kept, found.part1[entry], config_->layout.part1_bytes);
  }
  return true;
}

/** Writes the entries of a chunk that are in a state, and returns how many. */
size_t StreamedExperts::list_entries(const Found& found, size_t chunk, EntryState state, uint32_t* entries) {
  size_t count = 0;
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    entries[count] = static_cast<uint32_t>(entry);
    count += found.state_of(entry) == state;
  }
  return count;
}

/** One token: raw products of the gates of up to kListRoom entries, wherever they are, into found.gates. */
void StreamedExperts::multiply_gates(const ExpertJob& job, Found& found, const uint32_t* entries, size_t count,
                                     size_t thread) {
  if (count == 0) return;
  const uint8_t* rows[kListRoom] = {};
  float products[kListRoom];
  for (size_t k = 0; k < count; k++) rows[k] = found.part1[entries[k]];
  multiply_list(*kernels_, config_->ffn_encoding, rows, count, job.x, products);
  thread_counters_[thread].rows += count;
  const Matrix& bias = job.layer.up_bias;
  for (size_t k = 0; k < count; k++) {
    found.gates[entries[k]] = products[k] + (bias.exists() ? bias.floats()[found.open[entries[k]]] : 0.0f);
  }
}

/**
 * Several tokens: the same for all entries of the chunk. A token that does not want a neuron gets the gate 0, which adds 0
 * with every activation.
 */
void StreamedExperts::multiply_batch_gates(const ExpertJob& job, Found& found, size_t chunk, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  const size_t count = found.open_count[chunk];
  const size_t batch = config_->batch_size;
  uint8_t* rows = compact_ + thread * kNeuronChunk * row_bytes_;
  for (size_t k = 0; k < count; k++) std::memcpy(rows + k * row_bytes_, found.part1[first + k], row_bytes_);
  float* products = ups_ + thread * batch * kNeuronChunk;  // (token, entry of the chunk)
  multiply(*kernels_, config_->ffn_encoding, {rows, rows + weight_bytes_, row_bytes_}, count, job.x, job.tokens, products,
           kNeuronChunk);
  thread_counters_[thread].rows += count;
  const Matrix& bias = job.layer.up_bias;
  const bool masked = found.kinds[chunk] == ChunkKind::kPredicted;
  for (size_t k = 0; k < count; k++) {
    const size_t neuron = found.open[first + k];
    const uint64_t* mask = found.masks + (first + k) * mask_words();
    float* gates = found.batch_gates + neuron * batch;
    for (size_t t = 0; t < job.tokens; t++) {
      const bool is_wanted = !masked || (mask[t / 64] >> t % 64 & 1) != 0;
      const float gate = products[t * kNeuronChunk + k] + (bias.exists() ? bias.floats()[neuron] : 0.0f);
      gates[t] = is_wanted ? gate : 0.0f;
    }
  }
}

/** One token: what up to kListRoom entries add of their columns, into found.gates; 0 if they do not fire. How many do. */
size_t StreamedExperts::activate_entries(const ExpertJob& job, Found& found, const uint32_t* entries, size_t count,
                                         size_t thread) {
  const uint8_t* rows[kListRoom];
  uint32_t open[kListRoom];  // entries whose gate fires
  float ups[kListRoom];
  float values[kListRoom];
  size_t open_count = 0;
  for (size_t k = 0; k < count; k++) {
    const uint32_t entry = entries[k];
    if (!gate_fires(*config_, found.gates[entry])) {
      found.gates[entry] = 0.0f;
      continue;
    }
    rows[open_count] = found.up[entry];
    values[open_count] = found.gates[entry];
    open[open_count++] = entry;
  }
  if (open_count == 0) return 0;
  if (config_->gated) {
    multiply_list(*kernels_, config_->ffn_encoding, rows, open_count, job.x, ups);
    thread_counters_[thread].rows += open_count;
  } else {
    std::fill_n(ups, open_count, 1.0f);
  }
  activate(*config_, values, ups, open_count, values);
  size_t fired = 0;
  for (size_t k = 0; k < open_count; k++) {
    const uint32_t entry = open[k];
    found.gates[entry] = job.share(0) * values[k];
    if (values[k] == 0.0f) continue;
    fired++;
    order_.place(found.open[entry], found.gates[entry], entry);
    if (job.fired.wanted()) job.fired.mark(0, found.open[entry]);
  }
  thread_counters_[thread].fired += fired;
  return fired;
}

void StreamedExperts::unpack_rows(const Found& found, size_t entry, const KeptRows& to) {
  const size_t scales = row_bytes_ - weight_bytes_;
  const uint8_t* next_scales = found.part1[entry] + weight_bytes_;
  const auto unpack = [&](const uint8_t* weights, uint8_t* row) {
    next_scales += scales;
    std::memcpy(row, weights, weight_bytes_);
    std::memcpy(row + weight_bytes_, next_scales, scales);
  };
  if (to.gate != nullptr) std::memcpy(to.gate, found.part1[entry], row_bytes_);
  if (config_->gated) unpack(found.staged_up[entry], to.up);
  unpack(found.staged_down[entry], to.down);
}

/**
 * Waits for the rows of a chunk, neuron by neuron, and puts them where kernels want them: into the places of neurons that
 * will be kept, else the up row into the thread's landing memory and the down row to those that stay until the sum. While a
 * bank is filled, what has a place there is kept although it does not fire.
 */
bool StreamedExperts::land_rows(Found& found, size_t chunk, size_t thread) {
  const bool fills = !is_filled(found.bank);
  uint64_t* stall_ns = &thread_counters_[thread].stream.row_stall_ns;
  size_t landed = 0;
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    const size_t neuron = found.open[entry];
    uint8_t* place = fills ? cache_.first_rows(found.bank, neuron) : nullptr;
    const bool is_wanted = found.state[entry] == kMissing || (found.state[entry] == kDropped && place != nullptr);
    if (!is_wanted) continue;
    if (!wait_for(*found.up_read[entry], stall_ns) || !wait_for(*found.down_read[entry], stall_ns)) return false;
    if (!is_sound(found, entry, 1)) return false;
    if (found.slot[entry] != NeuronCache::kNoSlot) place = cache_.slot(found.bank, found.slot[entry]);
    KeptRows to{nullptr, landing_ + (thread * kNeuronChunk + landed) * row_bytes_, retained_ + neuron * row_bytes_};
    if (place != nullptr) {
      to = slot_rows(place);
    } else {
      landed++;
    }
    unpack_rows(found, entry, to);
    found.up[entry] = to.up;
    found.down[entry] = to.down;
  }
  return true;
}

/**
 * Several tokens: up rows are laid one behind another for the kernels of whole matrices; down rows of neurons that fire for
 * any token are laid out by neuron, for the sum.
 */
void StreamedExperts::activate_batch(const ExpertJob& job, Found& found, size_t chunk, size_t thread) {
  const size_t batch = config_->batch_size;
  uint8_t* rows = compact_ + thread * kNeuronChunk * row_bytes_;
  uint32_t entries[kNeuronChunk];
  size_t count = 0;
  for (size_t entry = chunk * kNeuronChunk; entry < found.end_entry(chunk); entry++) {
    if (found.state[entry] == kDropped) continue;
    if (config_->gated) std::memcpy(rows + count * row_bytes_, found.up[entry], row_bytes_);
    entries[count++] = static_cast<uint32_t>(entry);
  }
  float* ups = ups_ + thread * batch * kNeuronChunk;  // (token, neuron of the chunk)
  if (config_->gated) {
    multiply(*kernels_, config_->ffn_encoding, {rows, rows + weight_bytes_, row_bytes_}, count, job.x, job.tokens, ups,
             kNeuronChunk);
  }
  ThreadCounters& counters = thread_counters_[thread];
  counters.rows += count * (config_->layout.matrices - 1);
  const bool on_tiles = takes_tiles(config_->ffn_encoding, job.x);
  for (size_t k = 0; k < count; k++) {
    float values[kNeuronChunk];
    const size_t neuron = found.open[entries[k]];
    float* gates = found.batch_gates + neuron * batch;
    float* factors = on_tiles ? gates : factors_ + neuron * config_->vector_batch();
    size_t fired = 0;
    for (size_t begin = 0; begin < job.tokens; begin += kNeuronChunk) {
      const size_t tokens = std::min(kNeuronChunk, job.tokens - begin);
      for (size_t t = 0; t < tokens; t++) values[t] = config_->gated ? ups[(begin + t) * kNeuronChunk + k] : 1.0f;
      activate(*config_, gates + begin, values, tokens, values);
      for (size_t t = 0; t < tokens; t++) {
        factors[begin + t] = job.share(begin + t) * values[t];
        if (values[t] == 0.0f) continue;
        fired++;
        if (job.fired.wanted()) job.fired.mark(begin + t, neuron);
      }
    }
    counters.fired += fired;
    if (fired == 0) continue;
    if (found.state[entries[k]] == kMissing) counters.stream.used_bytes += missing_bytes(found, chunk);
    if (on_tiles) {
      const size_t number = order_.number(neuron);
      kernels_->tiles->put_factors(factors, 1, job.tokens, number, tile_factors_);
      column_of_[number] = found.down[entries[k]];
      continue;
    }
    uint8_t* down = retained_ + neuron * row_bytes_;
    if (found.down[entries[k]] != down) std::memmove(down, found.down[entries[k]], row_bytes_);
    order_.place(neuron, 1.0f, neuron);
  }
}

/** Down columns of the neurons of a part that fire, in checkpoint order, into the part's sums. */
void StreamedExperts::add_part(const ExpertJob& job, const Found& found, size_t part, size_t thread) {
  const size_t hidden = padded_hidden(*config_);
  const size_t batch = config_->vector_batch();
  const size_t groups = group_count(config_->hidden_size);
  float* sums = part_sums_ + part * batch * hidden;
  std::memset(sums, 0, job.tokens * hidden * sizeof(float));
  size_t count = 0;
  if (job.is_single()) {
    Column* columns = columns_ + thread * part_room(config_->neuron_count);
    order_.for_part(part, [&](const SumOrder::Placed& placed) {
      const uint8_t* down = found.down[placed.where];
      columns[count++] = {down, down + weight_bytes_, placed.factor};
    });
    thread_counters_[thread].rows += count;
    return add_columns(*kernels_, config_->ffn_encoding, columns, count, groups, sums);
  }
  uint32_t* neurons = summed_ + thread * part_room(config_->neuron_count);
  order_.for_part(part, [&](const SumOrder::Placed& placed) { neurons[count++] = placed.where; });
  const ColumnList list{{retained_, retained_ + weight_bytes_, row_bytes_}, neurons, count, factors_, batch};
  for (size_t group = 0; group < groups; group++) {
    add_columns(*kernels_, config_->ffn_encoding, list, group, job.tokens, sums + group * kGroup, hidden);
  }
}

}  // namespace pi2
