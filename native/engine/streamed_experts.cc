#include "native/engine/streamed_experts.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "native/base/carver.h"
#include "native/engine/product.h"
#include "native/engine/stream_sizes.h"
#include "native/kernels/dispatch.h"

namespace pi2 {
namespace {

/** Of the neurons that a predictor has fetched, those that fire: about half, whose up row is above zero too. */
constexpr double kFiringShare = 0.5;

}  // namespace

void StreamCounters::add(const StreamCounters& other) {
  hot_hits += other.hot_hits;
  cold_hits += other.cold_hits;
  misses += other.misses;
  reads += other.reads;
  asked_bytes += other.asked_bytes;
  read_bytes += other.read_bytes;
  used_bytes += other.used_bytes;
  spared_bytes += other.spared_bytes;
  gate_stall_ns += other.gate_stall_ns;
  row_stall_ns += other.row_stall_ns;
  prefetched += other.prefetched;
  prefetch_used += other.prefetch_used;
}

StreamedExperts::~StreamedExperts() {
  // No read may arrive in memory that is given back.
  end_ahead();
}

Status StreamedExperts::open(const EngineConfig& config, const Weights& weights, const Kernels& kernels, ThreadPool& pool,
                             Predictor* predictor, const SumOrder& order, std::unique_ptr<StreamedExperts>* result) {
  std::unique_ptr<StreamedExperts> experts(new StreamedExperts(config, kernels, pool, predictor, order));
  Status status = check_neurons(config);
  if (status.is_ok()) status = check_plans(config);
  if (status.is_ok()) status = experts->find_checksums(weights);
  if (status.is_ok()) status = experts->allocate();
  if (status.is_ok()) {
    status = open_reader(config.neurons_path, config.stream.mode, config.stream.backend, config.stream.lanes,
                         config.stream.trial, &experts->reader_);
  }
  if (status.is_ok() && has_split_parts(config)) {
    experts->two_phases_ = config.stream.two_phase.has_value() ? *config.stream.two_phase : experts->are_two_phases_faster();
  }
  if (status.is_ok()) *result = std::move(experts);
  return status;
}

size_t StreamedExperts::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t chunk_count = chunk_total(config.neuron_count);
  const size_t entries = chunk_count * kNeuronChunk;
  const size_t chunk_floats = config.threads * config.batch_size * kNeuronChunk;
  const size_t row = row_bytes(config.ffn_encoding, config.hidden_size);
  for (size_t i = 0; i < found_count(config); i++) {
    Found& found = found_[i];
    found.open = carver.take<uint32_t>(entries);
    found.state = carver.take<uint8_t>(entries);
    found.part1 = carver.take<const uint8_t*>(entries);
    found.staged_up = carver.take<const uint8_t*>(entries);
    found.staged_down = carver.take<const uint8_t*>(entries);
    found.up = carver.take<const uint8_t*>(entries);
    found.down = carver.take<const uint8_t*>(entries);
    found.gate_read = carver.take<ReadRequest*>(entries);
    found.up_read = carver.take<ReadRequest*>(entries);
    found.down_read = carver.take<ReadRequest*>(entries);
    found.slot = carver.take<int32_t>(entries);
    found.gates = carver.take<float>(entries);
    found.masks = carver.take<uint64_t>(config.predictor.enabled() ? entries * ((config.batch_size + 63) / 64) : 0);
    found.batch_gates = carver.take<float>(entries * config.batch_size);
    found.open_count = carver.take<uint32_t>(chunk_count);
    found.kinds = carver.take<ChunkKind>(chunk_count);
    found.later = carver.take<ReadList>(chunk_count);
  }
  order_.use(carver.take<SumOrder::Placed>(config.neuron_count));
  const bool has_tiles = find_tiles(config.kernel_set) != nullptr;
  tile_factors_ = carver.take<uint16_t>(has_tiles ? factors_length(config.neuron_count, config.batch_size) : 0);
  column_of_ = carver.take<const uint8_t*>(has_tiles ? config.neuron_count : 0);
  factors_ = carver.take<float>(entries * config.vector_batch());
  ups_ = carver.take<float>(chunk_floats);
  landing_ = carver.take<uint8_t>(config.threads * kNeuronChunk * row + kTailBytes);
  retained_ = carver.take<uint8_t>(entries * row + kTailBytes);
  compact_ = carver.take<uint8_t>(config.threads * kNeuronChunk * row + kTailBytes);
  columns_ = carver.take<Column>(config.threads * part_room(config.neuron_count));
  summed_ = carver.take<uint32_t>(config.threads * part_room(config.neuron_count));
  ahead_neurons_ = carver.take<uint32_t>(config.neuron_count);
  ahead_read_ = carver.take<ReadRequest*>(config.neuron_count);
  part_sums_ = carver.take<float>(kParts * config.vector_batch() * padded_hidden(config));
  return carver.used();
}

size_t StreamedExperts::scratch_bytes_needed(const EngineConfig& config) {
  // The pointers that carve sets are dropped with this object.
  ThreadPool no_threads(1);
  return 2 * half_bytes(config) + page_up(config.stream.prefetch_bytes) + request_total(config) * sizeof(ReadRequest) +
         StreamedExperts(config, scalar_kernels(), no_threads, nullptr, SumOrder()).carve(config, nullptr);
}

size_t StreamedExperts::weight_bytes_needed(const EngineConfig& config) {
  return NeuronCache::bytes_needed(config.stream.banks, config.neuron_count, config.layout.part1_bytes, slot_bytes(config));
}

Status StreamedExperts::check_plans(const EngineConfig& config) {
  if (config.stream.banks.size() != config.expert_offsets.size()) {
    return Status::argument("banks must have one entry a layer and expert");
  }
  const std::vector<float>& rates = config.stream.firing_rates;
  if (!rates.empty() && rates.size() != config.stream.banks.size() * config.neuron_count) {
    return Status::argument("firingRates must have one entry a neuron");
  }
  for (const BankPlan& plan : config.stream.banks) {
    const bool whole_chunks = plan.resident_gates % kNeuronChunk == 0 || plan.resident_gates == config.neuron_count;
    // Slots of neurons with their gates need no gates beside them; others are of use only where gates say what fires.
    const size_t most_gates = keeps_gates(config) ? 0 : config.neuron_count;
    const size_t most_hot = keeps_gates(config) ? config.neuron_count : plan.resident_gates;
    if (plan.resident_gates > most_gates || !whole_chunks || plan.hot_neurons > most_hot ||
        plan.cold_slots > config.neuron_count) {
      return Status::argument("a bank's plan does not fit the model");
    }
  }
  return Status::ok();
}

Status StreamedExperts::find_checksums(const Weights& weights) {
  const std::vector<size_t>& offsets = config_->checksum_offsets;
  if (offsets.size() != config_->expert_offsets.size()) {
    return Status::argument("checksums must have one offset a layer and expert");
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
  weight_bytes_ = pi2::weight_bytes(config.ffn_encoding, config.hidden_size);
  Status status = cache_.allocate(config.stream.banks, config.neuron_count, config.layout.part1_bytes, slot_bytes(config),
                                  config.stream.firing_rates, config.stream.policy);
  if (status.is_ok())
    status = staging_.allocate(2 * half_bytes(config) + page_up(config.stream.prefetch_bytes), "reads from flash");
  if (status.is_ok()) status = scratch_.allocate(carve(config, nullptr), "scratch of streamed experts");
  if (!status.is_ok()) return status;
  carve(config, scratch_.data());
  half_requests_ = half_requests(config);
  requests_ = std::make_unique<ReadRequest[]>(request_total(config));
  forget_ahead();
  ahead_bytes_ = config.stream.prefetch_bytes / 4;
  thread_counters_ = std::make_unique<ThreadCounters[]>(config.threads);
  progress_ = std::make_unique<Progress[]>(kParts);
  filled_.resize(config.stream.banks.size());
  return status;
}

/**
 * Reads parts 1 and whole bundles of neurons all over the file. A gate and then the rows of those that fire, or all at once:
 * UFS likes the former, a disk whose price is by request the latter. Where it is not known it is taken to be the paper's.
 */
bool StreamedExperts::are_two_phases_faster() {
  constexpr size_t kTrials = 64;
  constexpr size_t kRounds = 3;
  const BundleLayout& layout = config_->layout;
  const size_t neurons = config_->expert_offsets.size() * config_->neuron_count;
  const size_t most = half_bytes(*config_) / (layout.unit_bytes + kPageBytes);
  const size_t trials = std::min({kTrials, half_requests_, most, neurons});
  if (config_->stream.trial.enabled() || trials < 8) return true;
  uint64_t random = 0x9e3779b97f4a7c15ull;
  const auto read = [&](bool whole) {
    double best = 0;
    for (size_t round = 0; round < kRounds; round++) {
      ReadList list{requests_.get(), 0, staging_.data(), 0};
      for (size_t i = 0; i < trials; i++) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        const size_t neuron = (random >> 20) % neurons;
        const size_t begin =
            config_->expert_offsets[neuron / config_->neuron_count] + layout.part1_at(neuron % config_->neuron_count);
        const size_t part2 =
            config_->expert_offsets[neuron / config_->neuron_count] + layout.part2_at(neuron % config_->neuron_count);
        add_range(begin, whole ? part2 + layout.part2_bytes : begin + layout.part1_bytes, &list, list.count);
      }
      const auto start = std::chrono::steady_clock::now();
      reader_->submit(list.reads, list.count);
      // A read that fails now fails again when it is needed.
      for (size_t i = 0; i < list.count; i++) static_cast<void>(reader_->wait(list.reads[i]));
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      if (round == 0 || seconds.count() < best) best = seconds.count();
    }
    return best;
  };
  return (1 + kFiringShare) * read(false) < read(true);
}

void StreamedExperts::begin(const ExpertJob& job) {
  // Filling a bank takes all of the staging memory; jobs behind one that waits for its run with that wait too.
  const bool is_next = announced_++ == begun_;
  if (is_next && config_->stream.pipeline && is_filled(bank_of(job))) find_and_plan(job);
}

void StreamedExperts::find_and_plan(const ExpertJob& job) {
  const Found& before = found_of(0);
  Found& found = found_of(begun_);
  const bool is_next = begun_++ == 0;
  found.bank = bank_of(job);
  found.first_chunk = job.first_chunk();
  found.is_planned = false;
  counters_.neurons_seen += (config_->neuron_count - job.first_neuron) * job.tokens;
  if (ahead_bank_ != found.bank) end_ahead();
  cache_.begin_tick(found.bank);
  find(job, found);
  tune_ahead();
  // What was begun while the bank before was computed is of the first round, in whose half it lies.
  if (!is_ahead_guess_ && found.first_chunk > 0) end_ahead();
  if (is_next) {
    plan_first(found, ahead_half_);
  } else if (!before.has_more) {
    plan_first(found, 1 - before.half);
  }
}

Status StreamedExperts::run(const ExpertJob& job) {
  if (announced_ > 0) announced_--;
  if (!passes_through(job)) {
    Status filled = fill(bank_of(job));
    if (!filled.is_ok()) return filled;
  }
  const bool could_ask = std::exchange(could_ask_, false);
  const uint64_t stall_before = stream_counters_.gate_stall_ns + stream_counters_.row_stall_ns;
  if (begun_ == 0) find_and_plan(job);
  Found& found = found_of(0);
  order_.begin(found.bank);
  if (takes_tiles(config_->ffn_encoding, job.x)) begin_tiles(job.tokens);
  FirstFailure failure;
  failure_ = &failure;
  compute_rounds(job, found);
  failure_ = nullptr;
  if (ahead_bank_ == found.bank || failure.any()) end_ahead();
  if (!failure.any()) {
    add_parts(job, found);
    filled_[found.bank] = 1;
  }
  collect_counters(job);
  first_found_++;
  begun_--;
  const uint64_t stall = stream_counters_.gate_stall_ns + stream_counters_.row_stall_ns - stall_before;
  if (could_ask) judge_asking(static_cast<double>(stall) * 1e-9);
  return failure.take();
}

void StreamedExperts::compute_rounds(const ExpertJob& job, Found& found) {
  Found* next = begun_ > 1 ? &found_of(1) : nullptr;
  const bool reads_next = job.predictor_x == nullptr && found.first_chunk == 0 && knows_next_bank(found.bank);
  size_t half = found.half;
  bool more = found.has_more;
  while (true) {
    const Round& round = rounds_[half];
    const bool last = !more;
    if (!last && config_->stream.pipeline) more = plan_round(found, round.end_chunk, 1 - half);
    if (last && !failure_->any()) {
      if (next != nullptr && !next->is_planned) plan_first(*next, 1 - half);
      // Both halves are taken while a round that was begun ahead is computed.
      if (reads_next && ahead_.count == 0) read_ahead(found.bank + 1, 1 - half);
    }
    compute_round(job, found, round);
    settle_round(found, round, failure_->any());
    if (!is_ahead_guess_ && ahead_bank_ == found.bank) end_ahead();
    if (last) break;
    if (!config_->stream.pipeline) more = plan_round(found, round.end_chunk, 1 - half);
    half = 1 - half;
  }
}

void StreamedExperts::cancel() {
  announced_ = 0;
  for (; begun_ > 0; begun_--) {
    Found& found = found_of(0);
    first_found_++;
    if (!found.is_planned) continue;
    const Round& round = rounds_[found.half];
    // A read that fails now fails again when it is needed.
    for (size_t i = 0; i < round.first_phase.count; i++) static_cast<void>(reader_->wait(round.first_phase.reads[i]));
    trace_reads(round.first_phase);
    settle_round(found, round, true);
  }
}

HotRows StreamedExperts::hot_rows(size_t bank) const {
  if (cache_.plan(bank).hot_neurons == 0) return {};
  // Rows of hot neurons lie one neuron behind another, as slots do: (gate,) up (if there is a gate), down.
  const auto slots_from = [&](const uint8_t* row) { return Rows{row, row + weight_bytes_, slot_bytes(*config_)}; };
  const uint8_t* slot = cache_.rows(bank, 0);
  const uint8_t* gate = cache_.part1(bank, 0);
  const uint8_t* up = slot + (keeps_gates(*config_) ? row_bytes_ : 0);
  return {gate == nullptr ? slots_from(slot) : Rows{gate, gate + weight_bytes_, config_->layout.part1_bytes}, slots_from(up),
          slots_from(up + (config_->gated ? row_bytes_ : 0)), nullptr};
}

/** No neuron fires yet. */
void StreamedExperts::begin_tiles(size_t tokens) {
  std::fill_n(column_of_, config_->neuron_count, nullptr);
  const size_t chunk_length = factors_length(kFactorChunk, tokens);
  pool_->run(factors_length(config_->neuron_count, tokens) / chunk_length,
             [&](size_t chunk, size_t) { std::fill_n(tile_factors_ + chunk * chunk_length, chunk_length, uint16_t{0}); });
}

void StreamedExperts::add_parts(const ExpertJob& job, const Found& found) {
  const TraceSpan span(pool_->trace(), TraceStage::kSum);
  const size_t hidden = padded_hidden(*config_);
  const size_t batch = config_->vector_batch();
  if (takes_tiles(config_->ffn_encoding, job.x)) {
    const TileColumns columns{column_of_, weight_bytes_, config_->neuron_count};
    pool_->run(group_count(config_->hidden_size), [&](size_t group, size_t) {
      sum_columns(*kernels_, config_->ffn_encoding, columns, tile_factors_, group, job.tokens, job.out + group * kGroup,
                  job.out_stride);
    });
    return;
  }
  pool_->run(kParts, [&](size_t part, size_t thread) { add_part(job, found, part, thread); });
  const auto one = [&](size_t t, size_t) {
    float* out = job.out + t * job.out_stride;
    for (size_t part = 0; part < kParts; part++) {
      const float* sums = part_sums_ + (part * batch + t) * hidden;
      for (size_t i = 0; i < hidden; i++) out[i] += sums[i];
    }
    kernels_->to_natural_order(config_->ffn_encoding, out, hidden / kGroup);
  };
  if (job.is_single()) {
    one(0, 0);
  } else {
    pool_->run(job.tokens, one);
  }
}

void StreamedExperts::collect_counters(const ExpertJob& job) {
  size_t chosen = 0;
  size_t skipped_on_flash = 0;
  for (size_t thread = 0; thread < config_->threads; thread++) {
    const ThreadCounters counters = std::exchange(thread_counters_[thread], {});
    counters_.neurons_fired += counters.fired;
    counters_.weight_bytes_read += counters.rows * row_bytes_;
    chosen += counters.chosen;
    skipped_on_flash += counters.skipped_on_flash;
    stream_counters_.add(counters.stream);
  }
  if (job.predictor_x != nullptr) {
    predictor_->count((config_->neuron_count - job.first_neuron) * job.tokens, chosen, skipped_on_flash);
  }
  trace_counters();
}

}  // namespace pi2
