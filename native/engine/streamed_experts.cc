#include "native/engine/streamed_experts.h"

#include <chrono>
#include <cstring>
#include <utility>

#include "native/base/carver.h"
#include "native/engine/product.h"

namespace pi2 {
namespace {

/** A read no longer gains speed beyond this, and shorter ones start computing sooner. */
constexpr size_t kMostReadBytes = size_t{256} << 10;
/** Pages between two wanted ones that are read along: a request costs about as much as this many bytes. */
constexpr size_t kGapBytes = size_t{16} << 10;
/** Kernels may load a line past a vector. */
constexpr size_t kTailBytes = 64;
constexpr uint32_t kNoRead = 0xffffffffu;

size_t page_down(size_t offset) { return offset / kPageBytes * kPageBytes; }
size_t page_up(size_t offset) { return (offset + kPageBytes - 1) / kPageBytes * kPageBytes; }

/** Bytes of the rows that a slot keeps: up (if there is a gate) and down. */
size_t slot_bytes(const EngineConfig& config) {
  return (config.layout.matrices - 1) * row_bytes(config.ffn_encoding, config.hidden_size);
}

/** Most bytes of staging that one chunk can need: all units that it touches. */
size_t chunk_flash_bytes(const EngineConfig& config) {
  return (kNeuronChunk / config.layout.neurons_per_unit + 2) * page_up(config.layout.unit_bytes);
}

/** Most reads of one chunk. */
size_t chunk_reads(const EngineConfig& config) { return kNeuronChunk + chunk_flash_bytes(config) / kMostReadBytes + 1; }

/** Bytes and most reads of one of the two halves of staging memory. */
size_t half_bytes(const EngineConfig& config) {
  return page_up(std::max(config.stream.staging_bytes / 2, chunk_flash_bytes(config)));
}
size_t half_requests(const EngineConfig& config) { return half_bytes(config) / kPageBytes + chunk_reads(config); }

size_t padded_hidden(const EngineConfig& config) { return group_count(config.hidden_size) * kGroup; }

}  // namespace

StreamedExperts::~StreamedExperts() = default;

Status StreamedExperts::open(const EngineConfig& config, const Weights& weights, const Kernels& kernels, ThreadPool& pool,
                             std::unique_ptr<StreamedExperts>* result) {
  std::unique_ptr<StreamedExperts> experts(new StreamedExperts(config, kernels, pool));
  Status status = check_neurons(config);
  if (status.is_ok()) status = check_plans(config);
  if (status.is_ok()) status = experts->find_checksums(weights);
  if (status.is_ok()) status = experts->allocate();
  if (status.is_ok()) status = experts->load();
  if (status.is_ok()) {
    status = open_reader(config.neurons_path, config.stream.mode, config.stream.backend, config.stream.lanes,
                         config.stream.trial, &experts->reader_);
  }
  if (status.is_ok()) *result = std::move(experts);
  return status;
}

size_t StreamedExperts::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t entries = chunk_total(config.neuron_count) * kNeuronChunk;
  const size_t chunk_floats = config.threads * config.batch_size * kNeuronChunk;
  const size_t row = row_bytes(config.ffn_encoding, config.hidden_size);
  open_ = carver.take<uint32_t>(entries);
  part1_ = carver.take<const uint8_t*>(entries);
  staged_ = carver.take<const uint8_t*>(entries);
  rows_ = carver.take<const uint8_t*>(entries);
  read_of_ = carver.take<uint32_t>(entries);
  slot_ = carver.take<int32_t>(entries);
  gates_ = carver.take<float>(entries);
  open_count_ = carver.take<uint32_t>(chunk_total(config.neuron_count));
  factors_ = carver.take<float>(chunk_floats);
  batch_gates_ = carver.take<float>(entries * config.batch_size);
  ups_ = carver.take<float>(chunk_floats);
  landing_ = carver.take<uint8_t>(config.threads * kNeuronChunk * slot_bytes(config) + kTailBytes);
  compact_ = carver.take<uint8_t>(config.threads * 2 * kNeuronChunk * row + kTailBytes);
  columns_ = carver.take<Column>(config.threads * kNeuronChunk);
  part_sums_ = carver.take<float>(kParts * config.batch_size * padded_hidden(config));
  return carver.used();
}

size_t StreamedExperts::scratch_bytes_needed(const EngineConfig& config) {
  // The pointers that carve sets are dropped with this object.
  ThreadPool no_threads(1);
  return 2 * half_bytes(config) + 2 * half_requests(config) * sizeof(ReadRequest) +
         StreamedExperts(config, scalar_kernels(), no_threads).carve(config, nullptr);
}

size_t StreamedExperts::weight_bytes_needed(const EngineConfig& config) {
  return NeuronCache::bytes_needed(config.stream.banks, config.neuron_count, config.layout.part1_bytes, slot_bytes(config));
}

Status StreamedExperts::check_plans(const EngineConfig& config) {
  if (config.stream.banks.size() != config.expert_offsets.size()) {
    return Status::argument("banks must have one entry a layer and expert");
  }
  for (const BankPlan& plan : config.stream.banks) {
    const bool whole_chunks = plan.resident_gates % kNeuronChunk == 0 || plan.resident_gates == config.neuron_count;
    if (plan.resident_gates > config.neuron_count || !whole_chunks || plan.hot_neurons > plan.resident_gates ||
        plan.cold_slots > config.neuron_count) {
      return Status::argument("a bank's plan does not fit the model");
    }
  }
  return Status::ok();
}

Status StreamedExperts::find_checksums(const Weights& weights) {
  const std::vector<size_t>& offsets = config_->stream.checksum_offsets;
  if (!offsets.empty() && offsets.size() != config_->expert_offsets.size()) {
    return Status::argument("checksumOffsets must have one entry a layer and expert");
  }
  for (const size_t offset : offsets) {
    const uint8_t* sums = weights.resident_at(*config_, offset, config_->neuron_count * 2 * sizeof(uint32_t));
    if (sums == nullptr) return Status::argument("the extents do not hold the bundle checksums");
    checksums_.push_back(sums);
  }
  return Status::ok();
}

Status StreamedExperts::allocate() {
  const EngineConfig& config = *config_;
  row_bytes_ = row_bytes(config.ffn_encoding, config.hidden_size);
  Status status = cache_.allocate(config.stream.banks, config.neuron_count, config.layout.part1_bytes, slot_bytes(config));
  if (status.is_ok()) status = staging_.allocate(2 * half_bytes(config), "reads from flash");
  if (status.is_ok()) status = scratch_.allocate(carve(config, nullptr), "scratch of streamed experts");
  if (!status.is_ok()) return status;
  carve(config, scratch_.data());
  half_requests_ = half_requests(config);
  requests_ = std::make_unique<ReadRequest[]>(2 * half_requests_);
  thread_counters_ = std::make_unique<ThreadCounters[]>(config.threads);
  return status;
}

/** Gates and hot neurons come in with one sequential pass over the file, which also compares every checksum. */
Status StreamedExperts::load() {
  return load_bundles(*config_, [&](size_t bank, size_t neuron, const uint8_t* part1, const uint8_t* part2) {
    if (uint8_t* gate = cache_.part1(bank, neuron)) std::memcpy(gate, part1, config_->layout.part1_bytes);
    uint8_t* rows = cache_.hot_rows(bank, neuron);
    if (rows == nullptr) return;
    uint8_t* const places[3] = {nullptr, rows, rows + row_bytes_};
    unpack_bundle(*config_, part1, part2, places);
  });
}

Status StreamedExperts::run(const ExpertJob& job) {
  const size_t bank = job.layer_index * config_->expert_count + job.expert_index;
  counters_.neurons_seen += config_->neuron_count * job.tokens;
  cache_.begin_tick(bank);
  find_open(job, bank);
  FirstFailure failure;
  failure_ = &failure;
  const size_t half = staging_.bytes() / 2;
  Round rounds[2];
  for (size_t i = 0; i < 2; i++) {
    rounds[i].staging = staging_.data() + i * half;
    rounds[i].reads = requests_.get() + i * half_requests_;
  }
  size_t current = 0;
  bool more = plan_round(bank, 0, &rounds[current]);
  while (true) {
    const Round& round = rounds[current];
    const bool last = !more;
    if (!last) more = plan_round(bank, round.end_chunk, &rounds[1 - current]);
    compute_round(job, bank, round);
    settle_round(bank, round, failure.any());
    if (last) break;
    current = 1 - current;
  }
  failure_ = nullptr;
  add_parts(job);
  for (size_t thread = 0; thread < config_->threads; thread++) {
    ThreadCounters& counters = thread_counters_[thread];
    counters_.neurons_fired += std::exchange(counters.fired, 0);
    stream_counters_.stall_ns += std::exchange(counters.stall_ns, 0);
  }
  return failure.take();
}

/** Products of the resident gates; the neurons that are open for any token become entries of their chunk. */
void StreamedExperts::find_open(const ExpertJob& job, size_t bank) {
  const size_t batch = config_->batch_size;
  const size_t weights = pi2::weight_bytes(config_->ffn_encoding, config_->hidden_size);
  const Matrix& bias = job.layer.up_bias;
  pool_->run(chunks(), [&](size_t chunk, size_t thread) {
    const size_t first = chunk * kNeuronChunk;
    const size_t count = std::min(kNeuronChunk, config_->neuron_count - first);
    if (is_whole(bank, chunk)) return open_all(chunk, count);
    const uint8_t* gate = cache_.part1(bank, first);
    float* products = ups_ + thread * batch * kNeuronChunk;  // (token, neuron of the chunk)
    const Rows rows{gate, gate + weights, config_->layout.part1_bytes};
    multiply(*kernels_, config_->ffn_encoding, rows, count, job.x, job.tokens, products, kNeuronChunk);
    uint32_t open = 0;
    for (size_t j = 0; j < count; j++) {
      float* gates = batch_gates_ + (first + j) * batch;
      bool fires = false;
      for (size_t t = 0; t < job.tokens; t++) {
        gates[t] = products[t * kNeuronChunk + j] + (bias.exists() ? bias.floats()[first + j] : 0.0f);
        fires |= gate_fires(*config_, gates[t]);
      }
      if (!fires) continue;
      const size_t entry = first + open++;
      open_[entry] = static_cast<uint32_t>(first + j);
      part1_[entry] = cache_.part1(bank, first + j);
      gates_[entry] = gates[0];
      cache_.touch(bank, first + j);
    }
    open_count_[chunk] = open;
  });
  const size_t resident = std::min(cache_.plan(bank).resident_gates, config_->neuron_count);
  counters_.weight_bytes_read += resident * row_bytes_;
}

/** Nothing is known of a chunk without gates: all of it is read. */
void StreamedExperts::open_all(size_t chunk, size_t count) {
  for (size_t j = 0; j < count; j++) open_[chunk * kNeuronChunk + j] = static_cast<uint32_t>(chunk * kNeuronChunk + j);
  open_count_[chunk] = static_cast<uint32_t>(count);
}

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
    read_of_[entry] = kNoRead;
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

void StreamedExperts::compute_round(const ExpertJob& job, size_t bank, const Round& round) {
  pool_->run(kParts, [&](size_t part, size_t thread) { compute_part(job, bank, round, part, thread); });
  // Whatever happened, no read may arrive in memory that is used again.
  for (size_t i = 0; i < round.read_count; i++) failure_->meet(reader_->wait(round.reads[i]));
}

void StreamedExperts::compute_part(const ExpertJob& job, size_t bank, const Round& round, size_t part, size_t thread) {
  const size_t hidden = padded_hidden(*config_);
  if (round.first_chunk == 0) {
    std::memset(part_sums_ + part * config_->batch_size * hidden, 0, job.tokens * hidden * sizeof(float));
  }
  // The part's first chunk of the round.
  const size_t first = (round.first_chunk + kParts - 1 - part) / kParts * kParts + part;
  if (job.tokens > 1) {
    for (size_t chunk = first; chunk < round.end_chunk && !failure_->any(); chunk += kParts) {
      add_tokens(job, bank, round, chunk, part, thread);
    }
    return;
  }
  // What is in memory needs no flash: it is computed while reads are on their way.
  for (size_t chunk = first; chunk < round.end_chunk; chunk += kParts) {
    if (!is_whole(bank, chunk)) activate_entries(job, chunk, false, thread);
  }
  for (size_t chunk = first; chunk < round.end_chunk && !failure_->any(); chunk += kParts) {
    if (!land_chunk(job, bank, round, chunk, thread)) return;
    activate_entries(job, chunk, true, thread);
    add_token(chunk, part, thread);
  }
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

/** Whether bytes from flash are those that the converter wrote, as far as that is looked at. */
bool StreamedExperts::is_sound(size_t bank, size_t neuron, size_t part, const uint8_t* bytes) {
  if (checksums_.empty()) return true;
  uint32_t expected;
  std::memcpy(&expected, checksums_[bank] + (2 * neuron + part) * sizeof expected, sizeof expected);
  if (crc32(bytes, part == 0 ? config_->layout.part1_bytes : config_->layout.part2_bytes, 0) == expected) return true;
  const std::string expert =
      config_->expert_count > 1 ? ", expert " + std::to_string(bank % config_->expert_count) : std::string();
  failure_->meet(Status::checksum("layer " + std::to_string(bank / config_->expert_count) + expert + ", neuron " +
                                  std::to_string(neuron) + " of " + config_->neurons_path +
                                  ": the bytes read from flash do not match their checksum"));
  return false;
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

/** Gates of a chunk that was read whole; entries that fire for no token are dropped. */
void StreamedExperts::keep_firing(const ExpertJob& job, size_t chunk, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  const size_t batch = config_->batch_size;
  const Matrix& bias = job.layer.up_bias;
  float* products = ups_ + thread * batch * kNeuronChunk;  // (token, neuron of the chunk)
  if (job.tokens == 1) {
    multiply_list(*kernels_, config_->ffn_encoding, part1_ + first, open_count_[chunk], job.x, products);
  } else {
    uint8_t* rows = compact_ + thread * 2 * kNeuronChunk * row_bytes_;
    for (size_t k = 0; k < open_count_[chunk]; k++) std::memcpy(rows + k * row_bytes_, part1_[first + k], row_bytes_);
    const size_t weights = pi2::weight_bytes(config_->ffn_encoding, config_->hidden_size);
    multiply(*kernels_, config_->ffn_encoding, {rows, rows + weights, row_bytes_}, open_count_[chunk], job.x, job.tokens,
             products, kNeuronChunk);
  }
  uint32_t kept = 0;
  for (size_t k = 0; k < open_count_[chunk]; k++) {
    const size_t neuron = open_[first + k];
    float* gates = batch_gates_ + neuron * batch;
    bool fires = false;
    for (size_t t = 0; t < job.tokens; t++) {
      gates[t] = products[t * kNeuronChunk + k] + (bias.exists() ? bias.floats()[neuron] : 0.0f);
      fires |= gate_fires(*config_, gates[t]);
    }
    if (!fires) continue;
    const size_t entry = first + kept++;
    open_[entry] = static_cast<uint32_t>(neuron);
    part1_[entry] = part1_[first + k];
    staged_[entry] = staged_[first + k];
    gates_[entry] = gates[0];
  }
  open_count_[chunk] = kept;
}

/** One token: factors of the chunk's entries that were read (`landed`), or of those that were in memory, into gates_. */
void StreamedExperts::activate_entries(const ExpertJob& job, size_t chunk, bool landed, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  const uint8_t* rows[kNeuronChunk];
  uint32_t entries[kNeuronChunk];
  float ups[kNeuronChunk];
  size_t count = 0;
  for (size_t entry = first; entry < first + open_count_[chunk]; entry++) {
    if ((staged_[entry] != nullptr) != landed) continue;
    rows[count] = rows_[entry];
    entries[count++] = static_cast<uint32_t>(entry);
  }
  if (config_->gated) {
    multiply_list(*kernels_, config_->ffn_encoding, rows, count, job.x, ups);
  } else {
    std::fill_n(ups, count, 1.0f);
  }
  float values[kNeuronChunk];
  for (size_t k = 0; k < count; k++) values[k] = gates_[entries[k]];
  activate(*config_, values, ups, count, values);
  for (size_t k = 0; k < count; k++) {
    gates_[entries[k]] = job.share(0) * values[k];
    if (values[k] == 0.0f) continue;
    thread_counters_[thread].fired++;
    if (job.fired.wanted()) job.fired.mark(0, open_[entries[k]]);
  }
}

/** One token: adds the chunk's down columns, in order. */
void StreamedExperts::add_token(size_t chunk, size_t part, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  const size_t weights = pi2::weight_bytes(config_->ffn_encoding, config_->hidden_size);
  Column* columns = columns_ + thread * kNeuronChunk;
  size_t count = 0;
  for (size_t entry = first; entry < first + open_count_[chunk]; entry++) {
    if (gates_[entry] == 0.0f) continue;
    const uint8_t* down = rows_[entry] + (config_->gated ? row_bytes_ : 0);
    columns[count++] = {down, down + weights, gates_[entry]};
  }
  add_columns(*kernels_, config_->ffn_encoding, columns, count, group_count(config_->hidden_size),
              part_sums_ + part * config_->batch_size * padded_hidden(*config_));
}

/** Several tokens: the chunk's rows are laid one behind another, and kernels for whole matrices do the rest. */
void StreamedExperts::add_tokens(const ExpertJob& job, size_t bank, const Round& round, size_t chunk, size_t part,
                                 size_t thread) {
  if (!land_chunk(job, bank, round, chunk, thread)) return;
  const size_t first = chunk * kNeuronChunk;
  const size_t count = open_count_[chunk];
  const size_t batch = config_->batch_size;
  const size_t weights = pi2::weight_bytes(config_->ffn_encoding, config_->hidden_size);
  uint8_t* up = compact_ + thread * 2 * kNeuronChunk * row_bytes_;
  uint8_t* down = up + kNeuronChunk * row_bytes_;
  uint32_t numbers[kNeuronChunk];
  for (size_t k = 0; k < count; k++) {
    numbers[k] = static_cast<uint32_t>(k);
    const uint8_t* rows = rows_[first + k];
    if (config_->gated) std::memcpy(up + k * row_bytes_, rows, row_bytes_);
    std::memcpy(down + k * row_bytes_, rows + (config_->gated ? row_bytes_ : 0), row_bytes_);
  }
  float* ups = ups_ + thread * batch * kNeuronChunk;  // (token, neuron of the chunk)
  if (config_->gated) {
    multiply(*kernels_, config_->ffn_encoding, {up, up + weights, row_bytes_}, count, job.x, job.tokens, ups, kNeuronChunk);
  }
  float* factors = factors_ + thread * batch * kNeuronChunk;  // (neuron of the chunk, token)
  for (size_t k = 0; k < count; k++) {
    float values[kNeuronChunk];
    const float* gates = batch_gates_ + open_[first + k] * batch;
    for (size_t begin = 0; begin < job.tokens; begin += kNeuronChunk) {
      const size_t tokens = std::min(kNeuronChunk, job.tokens - begin);
      for (size_t t = 0; t < tokens; t++) values[t] = config_->gated ? ups[(begin + t) * kNeuronChunk + k] : 1.0f;
      activate(*config_, gates + begin, values, tokens, values);
      for (size_t t = 0; t < tokens; t++) {
        factors[k * batch + begin + t] = job.share(begin + t) * values[t];
        if (values[t] == 0.0f) continue;
        thread_counters_[thread].fired++;
        if (job.fired.wanted()) job.fired.mark(begin + t, open_[first + k]);
      }
    }
  }
  const size_t hidden = padded_hidden(*config_);
  const ColumnList list{{down, down + weights, row_bytes_}, numbers, count, factors, batch};
  for (size_t group = 0; group < group_count(config_->hidden_size); group++) {
    add_columns(*kernels_, config_->ffn_encoding, list, group, job.tokens,
                part_sums_ + part * batch * hidden + group * kGroup, hidden);
  }
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

void StreamedExperts::add_parts(const ExpertJob& job) {
  const size_t hidden = padded_hidden(*config_);
  const size_t batch = config_->batch_size;
  const auto one = [&](size_t t, size_t) {
    float* out = job.out + t * job.out_stride;
    for (size_t part = 0; part < kParts; part++) {
      const float* sums = part_sums_ + (part * batch + t) * hidden;
      for (size_t i = 0; i < hidden; i++) out[i] += sums[i];
    }
    kernels_->to_natural_order(config_->ffn_encoding, out, hidden / kGroup);
  };
  if (job.tokens == 1) {
    one(0, 0);
  } else {
    pool_->run(job.tokens, one);
  }
}

}  // namespace pi2
