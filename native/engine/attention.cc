#include "native/engine/attention.h"

#include <cmath>
#include <cstring>

#include "native/base/carver.h"
#include "native/engine/exponential.h"
#include "native/engine/norm.h"
#include "native/engine/product.h"

namespace pi2 {
namespace {

/** Floats are padded to whole lines of 16. */
size_t padded_floats(size_t count) { return (count + 15) / 16 * 16; }

/** In place: e^(x - max) / sum. Maximum and sum are taken in lanes, which compilers make vectors of. */
void softmax(float* x, size_t n) {
  constexpr size_t kLanes = 16;
  const size_t whole = n / kLanes * kLanes;
  float lanes[kLanes];
  for (size_t k = 0; k < kLanes; k++) lanes[k] = x[0];
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t k = 0; k < kLanes; k++) lanes[k] = lanes[k] < x[i + k] ? x[i + k] : lanes[k];
  }
  for (size_t i = whole; i < n; i++) lanes[i - whole] = std::max(lanes[i - whole], x[i]);
  const float largest = *std::max_element(lanes, lanes + kLanes);
  for (size_t i = 0; i < n; i++) x[i] = exponential(x[i] - largest);
  for (size_t k = 0; k < kLanes; k++) lanes[k] = 0;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t k = 0; k < kLanes; k++) lanes[k] += x[i + k];
  }
  for (size_t i = whole; i < n; i++) lanes[i - whole] += x[i];
  float sum = 0;
  for (size_t k = 0; k < kLanes; k++) sum += lanes[k];
  const float inverse = 1.0f / sum;
  for (size_t i = 0; i < n; i++) x[i] *= inverse;
}

void add_bias(const Matrix& bias, size_t first, size_t count, size_t tokens, float* y, size_t y_stride) {
  if (!bias.exists()) return;
  for (size_t t = 0; t < tokens; t++) {
    for (size_t i = 0; i < count; i++) y[t * y_stride + i] += bias.floats()[first + i];
  }
}

}  // namespace

size_t Attention::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  qkv_ = carver.take<float>(config.batch_size * (config.query_size() + 2 * config.kv_size()));
  scores_ = carver.take<float>(config.threads * padded_floats(config.context_length));
  heads_ = carver.take<float>(config.threads * 2 * padded_floats(config.head_dim));
  turns_ = carver.take<float>(config.batch_size * config.head_dim);
  return carver.used();
}

size_t Attention::scratch_bytes(const EngineConfig& config) { return Attention().carve(config, nullptr); }

void Attention::bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch,
                     Activations mixed) {
  config_ = &config;
  kernels_ = &kernels;
  pool_ = &pool;
  padded_dim_ = padded_floats(config.head_dim);
  mixed_ = mixed;
  carve(config, scratch);
}

void Attention::project(const LayerWeights& w, const Activations& x, size_t tokens) {
  struct Part {
    const Matrix& matrix;
    const Matrix& bias;
    size_t first_chunk;
    size_t first_output;
  };
  const size_t q_chunks = chunk_count(w.q.rows);
  const size_t kv_chunks = chunk_count(w.k.rows);
  const Part parts[] = {{w.q, w.q_bias, 0, 0},
                        {w.k, w.k_bias, q_chunks, w.q.rows},
                        {w.v, w.v_bias, q_chunks + kv_chunks, w.q.rows + w.k.rows}};
  pool_->run(q_chunks + 2 * kv_chunks, [&](size_t chunk, size_t) {
    const Part& part = parts[chunk < q_chunks ? 0 : chunk < q_chunks + kv_chunks ? 1 : 2];
    const size_t first = (chunk - part.first_chunk) * kRowChunk;
    const size_t count = std::min(kRowChunk, part.matrix.rows - first);
    float* y = qkv_ + part.first_output + first;
    multiply_rows(*kernels_, part.matrix, first, count, x, tokens, y, qkv_size());
    add_bias(part.bias, first, count, tokens, y, qkv_size());
  });
}

void Attention::begin(const Step& step) {
  if (config_->rope_frequencies.empty()) return;
  const size_t dim = config_->head_dim;
  const auto one = [&](size_t t, size_t) {
    find_turns(config_->rope_frequencies.data(), dim, step.places[t].position, turns_ + t * dim);
  };
  if (step.tokens == 1) {
    one(0, 0);
  } else {
    pool_->run(step.tokens, one);
  }
}

void Attention::store(const LayerWeights& w, const KvCache::Layer& layer, size_t token, size_t slot) {
  const size_t dim = config_->head_dim;
  for (size_t h = 0; h < config_->kv_head_count; h++) {
    float* key = qkv_ + token * qkv_size() + config_->query_size() + h * dim;
    const float* value = key + config_->kv_size();
    if (w.k_norm.exists()) {
      normalize(NormKind::kRms, config_->norm_epsilon, key, w.k_norm.floats(), nullptr, dim, key);
    }
    if (!config_->rope_frequencies.empty()) rotate(key, turns_ + token * dim, dim);
    // Padding stays zero, as allocated.
    const size_t at = (h * layer.slots + slot) * padded_dim_;
    kernels_->float_to_half(key, dim, layer.keys + at);
    kernels_->float_to_half(value, dim, layer.values + at);
  }
}

Attention::Seen Attention::seen_from(size_t layer_index, size_t position) const {
  const size_t window = config_->windows[layer_index];
  const size_t begin = window != 0 && position + 1 > window ? position + 1 - window : 0;
  return {begin, position + 1 - begin};
}

void Attention::attend(const LayerWeights& w, const KvCache& cache, size_t layer_index, size_t token, size_t head,
                       const Place& place, size_t thread) {
  const size_t dim = config_->head_dim;
  const size_t kv_head = head / (config_->head_count / config_->kv_head_count);
  float* query = heads_ + thread * 2 * padded_dim_;
  float* output = query + padded_dim_;
  std::memset(query, 0, 2 * padded_dim_ * sizeof(float));
  std::memcpy(query, qkv_ + token * qkv_size() + head * dim, dim * sizeof(float));
  if (w.q_norm.exists()) {
    normalize(NormKind::kRms, config_->norm_epsilon, query, w.q_norm.floats(), nullptr, dim, query);
  }
  if (!config_->rope_frequencies.empty()) rotate(query, turns_ + token * dim, dim);

  const auto [begin, count] = seen_from(layer_index, place.position);
  const KvCache::Layer& layer = cache.layer(layer_index);
  const size_t first = kv_head * layer.slots;
  float* scores = scores_ + thread * padded_floats(config_->context_length);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  size_t done = 0;
  cache.for_slots(layer, place.sequence, begin, count, [&](size_t slot, size_t run) {
    const uint16_t* keys = layer.keys + (first + slot) * padded_dim_;
    kernels_->attention_scores(query, keys, padded_dim_, padded_dim_, run, scale, scores + done);
    done += run;
  });
  softmax(scores, count);
  done = 0;
  cache.for_slots(layer, place.sequence, begin, count, [&](size_t slot, size_t run) {
    const uint16_t* values = layer.values + (first + slot) * padded_dim_;
    kernels_->attention_mix(scores + done, values, padded_dim_, padded_dim_, run, output);
    done += run;
  });
  std::memcpy(mixed_.token(token) + head * dim, output, dim * sizeof(float));
}

void Attention::compute(const LayerWeights& w, const KvCache& cache, size_t layer_index, const Activations& x,
                        const Step& step, float* out, size_t out_stride) {
  const TraceSpan span(pool_->trace(), TraceStage::kAttention);
  const KvCache::Layer& layer = cache.layer(layer_index);
  const size_t tokens = step.tokens;
  project(w, x, tokens);
  if (tokens == 1) {
    store(w, layer, 0, cache.slot_of(layer, step.places[0]));
  } else {
    pool_->run(tokens, [&](size_t t, size_t) { store(w, layer, t, cache.slot_of(layer, step.places[t])); });
  }
  pool_->run(tokens * config_->head_count, [&](size_t chunk, size_t thread) {
    // Tokens of one head one after another: the keys that they share stay in the core's cache.
    const size_t t = chunk % tokens;
    attend(w, cache, layer_index, t, chunk / tokens, step.places[t], thread);
  });
  for (size_t t = 0; t < tokens; t++) {
    kv_bytes_read_ += 2 * 2 * seen_from(layer_index, step.places[t].position).count * config_->kv_head_count * padded_dim_;
  }
  mixed_.prepare(*kernels_, *pool_, tokens, x.is_packed());
  pool_->run(chunk_count(w.o.rows), [&](size_t chunk, size_t) {
    const size_t first = chunk * kRowChunk;
    const size_t count = std::min(kRowChunk, w.o.rows - first);
    multiply_rows(*kernels_, w.o, first, count, mixed_, tokens, out + first, out_stride);
    add_bias(w.o_bias, first, count, tokens, out + first, out_stride);
  });
}

}  // namespace pi2
