#include "native/engine/streamed_experts.h"

#include <cstring>
#include <utility>

#include "native/base/carver.h"
#include "native/engine/product.h"
#include "native/engine/stream_sizes.h"

namespace pi2 {

StreamedExperts::~StreamedExperts() = default;

Status StreamedExperts::open(const EngineConfig& config, const Weights& weights, const Kernels& kernels, ThreadPool& pool,
                             Predictor* predictor, std::unique_ptr<StreamedExperts>* result) {
  std::unique_ptr<StreamedExperts> experts(new StreamedExperts(config, kernels, pool, predictor));
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
         StreamedExperts(config, scalar_kernels(), no_threads, nullptr).carve(config, nullptr);
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
    const uint8_t* sums = weights.resident().at(offset, config_->neuron_count * 2 * sizeof(uint32_t));
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
