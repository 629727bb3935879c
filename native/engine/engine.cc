#include "native/engine/engine.h"

#include <array>

#include "native/base/bandwidth.h"
#include "native/engine/load.h"
#include "native/engine/mapped_experts.h"
#include "native/engine/norm.h"
#include "native/engine/product.h"
#include "native/engine/resident_experts.h"
#include "native/engine/streamed_experts.h"
#include "native/engine/unit_plan.h"
#include "native/kernels/dispatch.h"
#include "native/quantize/encode.h"

namespace pi2 {
namespace {

Status check(const EngineConfig& c) {
  const bool sizes = c.hidden_size > 0 && c.layer_count > 0 && c.head_count > 0 && c.kv_head_count > 0 && c.head_dim > 0 &&
                     c.neuron_count > 0 && c.vocab_size > 0 && c.context_length > 0 && c.threads > 0 && c.batch_size > 0 &&
                     c.expert_count > 0 && c.experts_per_token > 0 && c.sequences > 0;
  if (!sizes) return Status::argument("a size is zero");
  // Tight enough that no product of them overflows, here or in any allocation.
  if (c.hidden_size > 1 << 20 || c.layer_count > 1 << 12 || c.head_count > 1 << 11 || c.head_dim > 1 << 11 ||
      c.neuron_count > 1 << 24 || c.vocab_size > 1 << 26 || c.context_length > 1 << 26 || c.threads > 1024 ||
      c.batch_size > 1 << 14 || c.trace_records > 1 << 24 || c.expert_count > 1 << 14 || c.sequences > 1 << 10) {
    return Status::argument("a size is absurd");
  }
  if (c.head_count % c.kv_head_count != 0) return Status::argument("headCount must be a multiple of kvHeadCount");
  if (c.experts_per_token > c.expert_count) return Status::argument("expertsPerToken exceeds expertCount");
  if (c.windows.size() != c.layer_count) return Status::argument("windows must have one entry a layer");
  if (!c.rope_frequencies.empty() && c.rope_frequencies.size() * 2 != c.head_dim) {
    return Status::argument("ropeFrequencies must have headDim / 2 entries");
  }
  if (c.mapped && (c.stream.enabled() || c.predictor.enabled())) {
    return Status::argument("a mapped model is computed without stream and predictor");
  }
  return check_unit(c);
}

/** Bytes of the pieces of an engine's scratch; Engine::allocate says what they are. */
constexpr size_t kPieces = 20;
/** Of more tokens nearly every neuron is wanted by one of them: there is nothing to guess. */
constexpr size_t kPrefetchTokens = 4;
std::array<size_t, kPieces> scratch_pieces(const EngineConfig& config) {
  const size_t batch = config.batch_size;
  const size_t hidden = config.hidden_size;
  const size_t heads = config.query_size();
  const size_t stream_bytes = Activations::float_bytes(hidden, batch);
  const size_t routed = config.expert_count > 1 ? batch : 0;
  const TileKernels* tiles = find_tiles(config.kernel_set);
  const bool from_residual = config.predictor.enabled() && config.predictor.input == PredictorInput::kResidual;
  const size_t guessed = from_residual ? batch : 0;
  const size_t guessed_routed = from_residual ? routed : 0;
  return {stream_bytes,
          stream_bytes,
          Activations::float_bytes(hidden, batch),
          Activations::form_bytes(tiles, hidden, batch),
          Activations::float_bytes(heads, batch),
          Activations::form_bytes(tiles, heads, batch),
          Activations::float_bytes(hidden, routed),
          Activations::form_bytes(tiles, hidden, routed),
          (Attention::scratch_bytes(config) + 63) / 64 * 64,
          (Ffn::scratch_bytes(config) + 63) / 64 * 64,
          config.stream.enabled() ? 0
          : config.mapped         ? MappedExperts::scratch_bytes(config)
                                  : ResidentExperts::scratch_bytes(config),
          Activations::form_bytes(tiles, hidden, guessed),
          Activations::float_bytes(hidden, guessed_routed),
          Activations::form_bytes(tiles, hidden, guessed_routed),
          (Predictor::scratch_bytes(config) + 63) / 64 * 64,
          Trace::bytes_needed(config.threads, config.trace_records),
          Activations::float_bytes(hidden, routed),
          Activations::form_bytes(tiles, hidden, routed),
          Activations::float_bytes(hidden, guessed_routed),
          Activations::form_bytes(tiles, hidden, guessed_routed)};
}

}  // namespace

Status Engine::memory_needed(const EngineConfig& config, EngineMemory* memory) {
  Status status = check(config);
  if (status.is_ok()) status = check_neurons(config);
  if (!status.is_ok()) return status;
  memory->kv_bytes = KvCache::bytes_needed(config);
  for (const size_t piece : scratch_pieces(config)) memory->scratch_bytes += piece;
  if (config.predictor.enabled()) memory->weight_bytes += Predictor::bytes_needed(config);
  memory->unit_bytes = unit_bytes_needed(config);
  memory->load_bytes = config.threads * kLoadersPerThread * kLoadBytes;
  // Mapped pages are the kernel's.
  if (config.mapped) return status;
  memory->weight_bytes += Weights::resident_bytes_needed(config);
  if (!config.stream.enabled()) {
    memory->weight_bytes += Weights::neuron_bytes_needed(config);
    return status;
  }
  status = StreamedExperts::check_plans(config);
  if (!status.is_ok()) return status;
  memory->weight_bytes += StreamedExperts::weight_bytes_needed(config);
  memory->scratch_bytes += StreamedExperts::scratch_bytes_needed(config);
  return status;
}

Status Engine::open(EngineConfig config, std::unique_ptr<Engine>* result) {
  Status status = check(config);
  if (!status.is_ok()) return status;
  std::unique_ptr<Engine> engine(new Engine(std::move(config)));
  engine->kernels_ = find_kernels(engine->config_.kernel_set);
  if (engine->kernels_ == nullptr) return Status::cpu("this CPU cannot run the " + engine->config_.kernel_set + " kernels");
  status = engine->weights_.load(engine->config_);
  if (status.is_ok()) status = engine->order_.bind(engine->config_, engine->weights_.resident());
  if (status.is_ok() && engine->config_.predictor.enabled()) status = engine->predictor_.load(engine->config_);
  if (status.is_ok()) status = engine->allocate();
  if (status.is_ok()) *result = std::move(engine);
  return status;
}

Status Engine::allocate() {
  Status status = cache_.allocate(config_);
  if (!status.is_ok()) return status;
  places_.resize(config_.batch_size);
  const std::array<size_t, kPieces> sizes = scratch_pieces(config_);
  size_t total = 0;
  for (const size_t size : sizes) total += size;
  status = scratch_.allocate(total, "scratch");
  if (!status.is_ok()) return status;
  uint8_t* pieces[kPieces];
  uint8_t* next = scratch_.data();
  for (size_t i = 0; i < kPieces; i++) {
    pieces[i] = next;
    next += sizes[i];
  }
  const auto activations = [&](size_t floats, size_t length) {
    return Activations(reinterpret_cast<float*>(pieces[floats]), pieces[floats + 1], length);
  };
  const size_t hidden = config_.hidden_size;
  const size_t heads = config_.query_size();
  if (config_.trace_records > 0) trace_.emplace(pieces[15], config_.threads, config_.trace_records);
  pool_ = std::make_unique<ThreadPool>(config_.threads, trace());
  hidden_ = reinterpret_cast<float*>(pieces[0]);
  update_ = reinterpret_cast<float*>(pieces[1]);
  normed_ = activations(2, hidden);
  residual_ = Activations(hidden_, pieces[11], hidden);
  attention_.bind(config_, *kernels_, *pool_, pieces[8], activations(4, heads));
  if (config_.predictor.enabled()) predictor_.bind(config_, *kernels_, *pool_, pieces[14]);
  Predictor* predictor = config_.predictor.enabled() ? &predictor_ : nullptr;
  if (config_.stream.enabled()) {
    std::unique_ptr<StreamedExperts> streamed;
    status = StreamedExperts::open(config_, weights_, *kernels_, *pool_, predictor, order_, &streamed);
    if (!status.is_ok()) return status;
    streamed_ = streamed.get();
    experts_ = std::move(streamed);
  } else if (config_.mapped) {
    status = MappedExperts::open(config_, *kernels_, *pool_, pieces[10], &experts_);
    if (!status.is_ok()) return status;
  } else {
    experts_ = std::make_unique<ResidentExperts>(config_, *kernels_, *pool_, predictor, order_, pieces[10]);
  }
  status = open_unit();
  if (!status.is_ok()) return status;
  Experts& experts = hybrid_ ? static_cast<Experts&>(*hybrid_) : *experts_;
  ffn_.bind(config_, *kernels_, *pool_, experts, pieces[9], {activations(6, hidden), activations(16, hidden)},
            {activations(12, hidden), activations(18, hidden)});
  return status;
}

void Engine::embed(const int32_t* tokens, const Step& step) {
  const TraceSpan span(trace(), TraceStage::kEmbed);
  const size_t stride = normed_.stride();
  for (size_t t = 0; t < step.tokens; t++) {
    float* x = hidden_ + t * stride;
    const Rows row = weights_.embedding.rows_from(static_cast<size_t>(tokens[t]));
    decode_vector(row.weights, row.scales, weights_.embedding.encoding, config_.hidden_size, x);
    if (weights_.position_embedding.exists()) {
      const Rows place = weights_.position_embedding.rows_from(step.places[t].position);
      float* learned = update_ + t * stride;
      decode_vector(place.weights, place.scales, weights_.position_embedding.encoding, config_.hidden_size, learned);
      for (size_t i = 0; i < config_.hidden_size; i++) x[i] += learned[i];
    }
  }
}

void Engine::normalize_batch(const Matrix& weight, const Matrix& bias, size_t count) {
  const auto one = [&](size_t t, size_t) {
    normalize(config_.norm_kind, config_.norm_epsilon, hidden_ + t * normed_.stride(), weight.floats(),
              bias.exists() ? bias.floats() : nullptr, config_.hidden_size, normed_.token(t));
  };
  if (count == 1) {
    one(0, 0);
  } else {
    pool_->run(count, one);
  }
  normed_.prepare(*kernels_, *pool_, count, is_prompt_);
}

void Engine::add_update(size_t count) {
  for (size_t t = 0; t < count; t++) {
    float* x = hidden_ + t * normed_.stride();
    const float* u = update_ + t * normed_.stride();
    for (size_t i = 0; i < config_.hidden_size; i++) x[i] += u[i];
  }
}

const Activations* Engine::predictor_input(const Step& step) {
  if (step.exact || !config_.predictor.enabled()) return nullptr;
  if (config_.predictor.input == PredictorInput::kFfnNorm) return &normed_;
  residual_.prepare(*kernels_, *pool_, step.tokens, is_prompt_);
  return &residual_;
}

void Engine::prefetch(size_t index, const Step& step) {
  // Of a mixture of experts it is not known yet which will be used.
  if (streamed_ == nullptr || config_.stream.prefetch_bytes == 0 || config_.expert_count > 1) return;
  const TraceSpan span(trace(), TraceStage::kPrefetch);
  const LayerWeights& layer = weights_.layers[index];
  if (config_.predictor.input == PredictorInput::kFfnNorm) normalize_batch(layer.ffn_norm, layer.ffn_norm_bias, step.tokens);
  const Activations* x = predictor_input(step);
  streamed_->prefetch({index, 0, layer, normed_, x, step.tokens, nullptr, nullptr, 0, {}});
}

Status Engine::run_layer(size_t index, const Step& step) {
  const size_t count = step.tokens;
  const FiringRecord& record = step.record;
  const LayerWeights& layer = weights_.layers[index];
  const size_t stride = normed_.stride();
  if (Trace* traced = trace()) traced->set_layer(static_cast<uint32_t>(index));
  const TraceSpan span(trace(), TraceStage::kLayer);
  if (config_.predictor.enabled() && !step.exact && count <= kPrefetchTokens) prefetch(index, step);
  normalize_batch(layer.attention_norm, layer.attention_norm_bias, count);
  attention_.compute(layer, cache_, index, normed_, step, update_, stride);
  add_update(count);
  normalize_batch(layer.ffn_norm, layer.ffn_norm_bias, count);
  const size_t layer_bytes = config_.expert_count * fired_bytes(config_.neuron_count);
  ffn_.record_routes(record.routed == nullptr ? nullptr : record.routed + index * routed_bytes(config_.expert_count),
                     routed_bytes_per_token());
  const size_t layer_activations = config_.experts_per_token * config_.neuron_count;
  ffn_.record_activations(record.activations == nullptr ? nullptr : record.activations + index * layer_activations,
                          activations_per_token());
  for (size_t t = 0; record.inputs != nullptr && t < count; t++) {
    const float* input = record.residual_inputs ? hidden_ + t * stride : normed_.token(t);
    std::copy_n(input, config_.hidden_size, record.inputs + t * inputs_per_token() + index * config_.hidden_size);
  }
  const TraceSpan ffn(trace(), TraceStage::kFfn);
  Status status =
      ffn_.compute(index, layer, normed_, predictor_input(step), count, update_, stride,
                   record.fired == nullptr ? nullptr : record.fired + index * layer_bytes, fired_bytes_per_token());
  add_update(count);
  resident_bytes_read_ += layer.q.bytes() + layer.k.bytes() + layer.v.bytes() + layer.o.bytes();
  return status;
}

size_t Engine::gather_last(const StepInput& input, size_t first, size_t count) {
  size_t found = 0;
  size_t end = 0;
  for (size_t i = 0; i < input.run_count; i++) {
    end += input.runs[i].count;
    if (end <= first || end > first + count) continue;
    const size_t last = end - 1 - first;
    if (last != found) {
      std::copy_n(hidden_ + last * normed_.stride(), config_.hidden_size, hidden_ + found * normed_.stride());
    }
    found++;
  }
  return found;
}

void Engine::compute_logits(size_t count, float* logits) {
  const TraceSpan span(trace(), TraceStage::kHead);
  normalize_batch(weights_.output_norm, weights_.output_norm_bias, count);
  const Matrix& head = weights_.head;
  pool_->run(chunk_count(head.rows), [&](size_t chunk, size_t) {
    const size_t row = chunk * kRowChunk;
    multiply_rows(*kernels_, head, row, std::min(kRowChunk, head.rows - row), normed_, count, logits + row, head.rows);
  });
  resident_bytes_read_ += head.bytes();
}

Status Engine::check_input(const StepInput& input, const FiringRecord& record, size_t* tokens) const {
  *tokens = 0;
  for (size_t i = 0; i < input.run_count; i++) {
    const Run& run = input.runs[i];
    if (run.count == 0) return Status::argument("a run of a step needs at least one token");
    if (run.position > config_.context_length || run.count > config_.context_length - run.position) {
      return Status::argument("the step reaches past the context of " + std::to_string(config_.context_length) + " tokens");
    }
    *tokens += run.count;
  }
  if (*tokens == 0) return Status::argument("a step needs at least one token");
  const Status places = cache_.check(input.runs, input.run_count);
  if (!places.is_ok()) return places;
  for (size_t i = 0; i < *tokens; i++) {
    if (input.tokens[i] < 0 || static_cast<size_t>(input.tokens[i]) >= config_.vocab_size) {
      return Status::argument("token " + std::to_string(input.tokens[i]) + " is not in the vocabulary");
    }
  }
  if (record.activations != nullptr && streamed_ != nullptr) {
    return Status::argument("activations are recorded only with every neuron in memory");
  }
  return Status::ok();
}

void Engine::place(const StepInput& input, size_t first, size_t count) {
  size_t begin = 0;  // the run's first token
  for (size_t i = 0; i < input.run_count && begin < first + count; begin += input.runs[i++].count) {
    const Run& run = input.runs[i];
    const size_t from = std::max(begin, first);
    const size_t end = std::min(begin + run.count, first + count);
    if (end <= from) continue;
    cache_.extend(run.sequence, run.position + (from - begin), end - from);
    for (size_t t = from; t < end; t++) places_[t - first] = {run.sequence, run.position + (t - begin)};
  }
}

Status Engine::step(const StepInput& input, float* logits, FiringRecord record) {
  size_t count = 0;
  const Status wanted = check_input(input, record, &count);
  if (!wanted.is_ok()) return wanted;
  if (record.fired != nullptr) std::fill_n(record.fired, count * fired_bytes_per_token(), uint8_t{0});
  if (record.routed != nullptr) std::fill_n(record.routed, count * routed_bytes_per_token(), uint8_t{0});
  if (record.activations != nullptr) std::fill_n(record.activations, count * activations_per_token(), 0.0f);
  const TraceSpan span(trace(), TraceStage::kStep, count);
  // Whatever happens below, positions from here on no longer hold what they held.
  for (size_t i = 0; i < input.run_count; i++) cache_.rewind(input.runs[i].sequence, input.runs[i].position);
  is_prompt_ = input.prompt && !config_.mapped;
  const bool integers = config_.ffn_encoding == Encoding::kQ4 || config_.ffn_encoding == Encoding::kQ8;
  const bool on_tiles = is_prompt_ && kernels_->tiles != nullptr && integers;
  size_t most = on_tiles ? config_.batch_size : config_.vector_batch();
  if (hybrid_) {
    // What is recorded is what the CPU sees fire.
    const bool is_recorded = record.fired != nullptr || record.routed != nullptr || record.activations != nullptr;
    hybrid_->use_unit(!is_recorded);
    if (!is_recorded && hybrid_->schedule()[kSmallBatches] > 0) most = std::min(most, kChunkTokens);
  }
  for (size_t done = 0; done < count;) {
    const Step step{std::min(most, count - done), places_.data(), input.exact, is_prompt_, record};
    place(input, done, step.tokens);
    embed(input.tokens + done, step);
    attention_.begin(step);
    for (size_t i = 0; i < config_.layer_count; i++) {
      Status status = run_layer(i, step);
      // The positions of this batch stay unfilled: the next step may begin there again.
      if (!status.is_ok()) return status;
    }
    if (Trace* traced = trace()) traced->set_layer(TraceRecord::kNoLayer);
    if (record.fired != nullptr) record.fired += step.tokens * fired_bytes_per_token();
    if (record.routed != nullptr) record.routed += step.tokens * routed_bytes_per_token();
    if (record.inputs != nullptr) record.inputs += step.tokens * inputs_per_token();
    if (record.activations != nullptr) record.activations += step.tokens * activations_per_token();
    const size_t told = input.all ? step.tokens : gather_last(input, done, step.tokens);
    if (told > 0) compute_logits(told, logits);
    logits += told * config_.vocab_size;
    const Status readable = weights_.resident().check();
    if (!readable.is_ok()) return readable;
    for (size_t t = 0; t < step.tokens; t++) cache_.fill(places_[t].sequence, places_[t].position + 1);
    done += step.tokens;
    tokens_ += step.tokens;
  }
  return Status::ok();
}

Bandwidths Engine::measure_bandwidths(size_t flash_read_bytes) {
  Bandwidths found;
  found.memory = measure_read_bandwidth(*pool_, weights_.memory());
  if (streamed_ != nullptr && flash_read_bytes > 0) found.flash = streamed_->measure_flash(flash_read_bytes);
  return found;
}

EngineCounters Engine::counters() const {
  const FfnCounters& ffn = experts_->counters();
  const uint64_t unit_bytes_read = hybrid_ ? hybrid_->unit_counters().weight_bytes_read : 0;
  const uint64_t predictor_bytes = predictor() == nullptr ? 0 : predictor_.counters().weight_bytes_read;
  return {tokens_,
          resident_bytes_read_ + ffn_.router_bytes_read() + ffn.weight_bytes_read + unit_bytes_read + predictor_bytes,
          attention_.kv_bytes_read(),
          ffn.neurons_fired,
          ffn.neurons_seen,
          weights_.bytes() + predictor_.bytes() + (streamed_ != nullptr ? streamed_->weight_bytes() : 0),
          cache_.bytes(),
          scratch_.bytes() + (streamed_ != nullptr ? streamed_->scratch_bytes() : 0),
          unit_ != nullptr ? unit_->bytes() : 0};
}

}  // namespace pi2
