#include "native/engine/ffn.h"

#include <cmath>
#include <cstring>

#include "native/base/carver.h"
#include "native/engine/exponential.h"
#include "native/engine/product.h"

namespace pi2 {
namespace {

/** Neurons that one thread takes at a time. */
constexpr size_t kNeuronChunk = 64;

size_t neuron_chunks(size_t neurons) { return (neurons + kNeuronChunk - 1) / kNeuronChunk; }

}  // namespace

size_t Ffn::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t batch = config.batch_size;
  factors_ = carver.take<float>(config.neuron_count * batch);
  tiles_ = carver.take<float>(config.threads * 2 * batch * kNeuronChunk);
  columns_ = carver.take<Column>(neuron_chunks(config.neuron_count) * kNeuronChunk);
  fired_ = carver.take<uint32_t>(neuron_chunks(config.neuron_count));
  expert_out_ = carver.take<float>(batch * kGroup * group_count(config.hidden_size));
  shares_ = carver.take<float>(config.expert_count * batch);
  router_logits_ = carver.take<float>(config.expert_count);
  token_shares_ = carver.take<float>(batch);
  tokens_ = carver.take<uint32_t>(batch);
  return carver.used();
}

size_t Ffn::scratch_bytes(const EngineConfig& config) { return Ffn().carve(config, nullptr); }

void Ffn::bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch, Activations routed) {
  config_ = &config;
  kernels_ = &kernels;
  pool_ = &pool;
  routed_ = routed;
  carve(config, scratch);
}

bool Ffn::gate_fires(float gate) const {
  switch (config_->activation) {
    case ActivationKind::kSilu: return true;
    case ActivationKind::kRelu:
    case ActivationKind::kDRelu: return gate > 0;
    case ActivationKind::kFatRelu: return gate >= config_->threshold;
  }
  return true;
}

void Ffn::activate(const float* gates, const float* ups, size_t count, float* values) const {
  const float threshold = config_->threshold;
  switch (config_->activation) {
    case ActivationKind::kSilu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] / (1.0f + exponential(-gates[j])) * ups[j];
      return;
    case ActivationKind::kRelu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] > 0 ? gates[j] * ups[j] : 0.0f;
      return;
    case ActivationKind::kDRelu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] > 0 && ups[j] > 0 ? gates[j] * ups[j] : 0.0f;
      return;
    case ActivationKind::kFatRelu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] >= threshold ? gates[j] * ups[j] : 0.0f;
      return;
  }
}

void Ffn::compute(const LayerWeights& layer, const Activations& x, size_t tokens, float* out, size_t out_stride) {
  for (size_t t = 0; t < tokens; t++) std::memset(out + t * out_stride, 0, out_stride * sizeof(float));
  if (config_->expert_count == 1) {
    run_expert(layer.experts[0], layer, x, tokens, nullptr, out, out_stride);
  } else {
    route(layer, x, tokens);
    const size_t stride = x.stride();
    for (size_t e = 0; e < config_->expert_count; e++) {
      size_t count = 0;
      for (size_t t = 0; t < tokens; t++) {
        const float share = shares_[e * config_->batch_size + t];
        if (share == 0.0f) continue;
        tokens_[count] = static_cast<uint32_t>(t);
        token_shares_[count] = share;
        std::memcpy(routed_.token(count), x.token(t), stride * sizeof(float));
        std::memcpy(routed_.quantized(count), x.quantized(t), x.groups() * sizeof(QuantizedGroup));
        count++;
      }
      if (count == 0) continue;
      std::memset(expert_out_, 0, count * stride * sizeof(float));
      run_expert(layer.experts[e], layer, routed_, count, token_shares_, expert_out_, stride);
      for (size_t i = 0; i < count; i++) {
        float* y = out + tokens_[i] * out_stride;
        for (size_t j = 0; j < config_->hidden_size; j++) y[j] += expert_out_[i * stride + j];
      }
    }
  }
  if (layer.down_bias.exists()) {
    for (size_t t = 0; t < tokens; t++) {
      for (size_t j = 0; j < config_->hidden_size; j++) out[t * out_stride + j] += layer.down_bias.floats()[j];
    }
  }
}

/** The chosen experts are those of the largest logits (lowest number first on a tie), weighted by softmax over them alone.
 */
void Ffn::route(const LayerWeights& layer, const Activations& x, size_t tokens) {
  const size_t experts = config_->expert_count;
  const size_t batch = config_->batch_size;
  std::memset(shares_, 0, experts * batch * sizeof(float));
  counters_.weight_bytes_read += layer.router.bytes();
  for (size_t t = 0; t < tokens; t++) {
    const float* logits = router_logits_;
    kernels_->dot_f32(layer.router.floats(), experts, config_->hidden_size, x.token(t), router_logits_);
    float first = 0;
    float sum = 0;
    for (size_t k = 0; k < config_->experts_per_token; k++) {
      size_t best = experts;
      for (size_t e = 0; e < experts; e++) {
        if (shares_[e * batch + t] == 0.0f && (best == experts || logits[e] > logits[best])) best = e;
      }
      if (k == 0) first = logits[best];
      // At least the smallest float, so that a chosen expert is never taken twice.
      const float weight = std::max(std::exp(logits[best] - first), 1e-38f);
      shares_[best * batch + t] = weight;
      sum += weight;
    }
    for (size_t e = 0; e < experts; e++) shares_[e * batch + t] /= sum;
  }
}

void Ffn::run_expert(const ExpertWeights& expert, const LayerWeights& layer, const Activations& x, size_t tokens,
                     const float* shares, float* out, size_t out_stride) {
  counters_.neurons_seen += config_->neuron_count * tokens;
  if (tokens == 1) return run_one(expert, layer, x, shares != nullptr ? shares[0] : 1.0f, out);

  const size_t neurons = config_->neuron_count;
  const Matrix& first_matrix = expert.gate.exists() ? expert.gate : expert.up;
  pool_->run(neuron_chunks(neurons), [&](size_t chunk, size_t thread) {
    const size_t first = chunk * kNeuronChunk;
    const size_t count = std::min(kNeuronChunk, neurons - first);
    float* gates = tiles_ + thread * 2 * config_->batch_size * kNeuronChunk;  // (token, neuron of the chunk)
    float* ups = gates + config_->batch_size * kNeuronChunk;
    multiply_rows(*kernels_, first_matrix, first, count, x, tokens, gates, kNeuronChunk);
    if (expert.gate.exists()) multiply_rows(*kernels_, expert.up, first, count, x, tokens, ups, kNeuronChunk);
    if (!expert.gate.exists()) std::fill_n(ups, tokens * kNeuronChunk, 1.0f);
    uint32_t fired = 0;
    for (size_t t = 0; t < tokens; t++) {
      float* values = gates + t * kNeuronChunk;
      if (layer.up_bias.exists()) {
        for (size_t j = 0; j < count; j++) values[j] += layer.up_bias.floats()[first + j];
      }
      activate(values, ups + t * kNeuronChunk, count, values);
      for (size_t j = 0; j < count; j++) fired += values[j] != 0.0f;
      if (shares == nullptr) continue;
      for (size_t j = 0; j < count; j++) values[j] *= shares[t];
    }
    fired_[chunk] = fired;
    for (size_t j = 0; j < count; j++) {
      float* factors = factors_ + (first + j) * config_->batch_size;
      for (size_t t = 0; t < tokens; t++) factors[t] = gates[t * kNeuronChunk + j];
    }
  });
  for (size_t chunk = 0; chunk < neuron_chunks(neurons); chunk++) counters_.neurons_fired += fired_[chunk];
  counters_.weight_bytes_read += config_->layout.matrices * expert.down.bytes();
  pool_->run(group_count(config_->hidden_size), [&](size_t group, size_t) {
    add_columns(*kernels_, expert.down, group, group + 1, factors_, config_->batch_size, tokens, out, out_stride);
  });
}

/** Fills columns_ with the chunk's neurons that fire, in order, and returns how many; counts the up rows read. */
size_t Ffn::find_fired(const ExpertWeights& expert, const LayerWeights& layer, const Activations& x, float share,
                       size_t first, size_t count) {
  float gates[kNeuronChunk];
  float ups[kNeuronChunk];
  uint32_t open[kNeuronChunk];  // neurons of the chunk whose gate fires
  size_t open_count = 0;
  multiply_rows(*kernels_, expert.gate.exists() ? expert.gate : expert.up, first, count, x, 1, gates, 0);
  for (size_t j = 0; j < count; j++) {
    if (layer.up_bias.exists()) gates[j] += layer.up_bias.floats()[first + j];
    if (gate_fires(gates[j])) open[open_count++] = static_cast<uint32_t>(j);
  }
  if (!expert.gate.exists()) {
    for (size_t k = 0; k < open_count; k++) ups[k] = 1.0f;
  } else if (open_count == count) {
    multiply_rows(*kernels_, expert.up, first, count, x, 1, ups, 0);
  } else {
    const uint8_t* rows[kNeuronChunk];
    for (size_t k = 0; k < open_count; k++) rows[k] = expert.up.rows_from(first + open[k]).weights;
    const size_t scales_offset = weight_bytes(expert.up.encoding, expert.up.columns);
    switch (expert.up.encoding) {
      case Encoding::kQ4: kernels_->dot_list_q4(rows, scales_offset, open_count, x.groups(), x.quantized(0), ups); break;
      case Encoding::kQ8: kernels_->dot_list_q8(rows, scales_offset, open_count, x.groups(), x.quantized(0), ups); break;
      case Encoding::kF16: kernels_->dot_list_f16(rows, open_count, x.groups(), x.token(0), ups); break;
      case Encoding::kF32: std::abort();
    }
  }
  for (size_t k = 0; k < open_count; k++) gates[k] = gates[open[k]];
  activate(gates, ups, open_count, gates);
  Column* columns = columns_ + first;
  size_t fired = 0;
  for (size_t k = 0; k < open_count; k++) {
    if (gates[k] == 0.0f) continue;
    const Rows down = expert.down.rows_from(first + open[k]);
    columns[fired++] = {down.weights, down.scales, share * gates[k]};
  }
  return fired;
}

void Ffn::run_one(const ExpertWeights& expert, const LayerWeights& layer, const Activations& x, float share, float* out) {
  const size_t neurons = config_->neuron_count;
  const size_t chunks = neuron_chunks(neurons);
  pool_->run(chunks, [&](size_t chunk, size_t) {
    const size_t first = chunk * kNeuronChunk;
    const size_t count = std::min(kNeuronChunk, neurons - first);
    fired_[chunk] = static_cast<uint32_t>(find_fired(expert, layer, x, share, first, count));
  });
  // Chunks' lists become one, in ascending order of neurons.
  size_t fired = 0;
  for (size_t chunk = 0; chunk < chunks; chunk++) {
    if (fired != chunk * kNeuronChunk) {
      std::memmove(columns_ + fired, columns_ + chunk * kNeuronChunk, fired_[chunk] * sizeof(Column));
    }
    fired += fired_[chunk];
  }
  counters_.neurons_fired += fired;
  counters_.weight_bytes_read += expert.down.bytes() + (config_->layout.matrices - 1) * fired * expert.down.row_bytes();
  const size_t groups = group_count(config_->hidden_size);
  const size_t ranges = std::min(groups, pool_->threads());
  pool_->run(ranges, [&](size_t range, size_t) {
    add_columns(*kernels_, expert.down.encoding, columns_, fired, groups * range / ranges, groups * (range + 1) / ranges,
                out);
  });
}

}  // namespace pi2
