#include "native/engine/ffn.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/base/carver.h"
#include "native/engine/exponential.h"
#include "native/engine/product.h"

namespace pi2 {
namespace {

/** Neurons that one thread takes at a time; as many as rows of other matrices. */
constexpr size_t kNeuronChunk = kRowChunk;

/** Parts of the down sum; more than threads on any phone, few enough that adding them up costs nothing. */
constexpr size_t kParts = 8;

/** Tokens whose sums one thread keeps at a time. */
constexpr size_t kTokenTile = 16;

size_t chunk_total(size_t neurons) { return (neurons + kNeuronChunk - 1) / kNeuronChunk; }

/** Room for the neurons of one part. */
size_t part_room(size_t neurons) { return (chunk_total(neurons) + kParts - 1) / kParts * kNeuronChunk; }

}  // namespace

size_t Ffn::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t batch = config.batch_size;
  factors_ = carver.take<float>(config.neuron_count * batch);
  tiles_ = carver.take<float>(config.threads * 2 * batch * kNeuronChunk);
  columns_ = carver.take<Column>(chunk_total(config.neuron_count) * kNeuronChunk);
  part_columns_ = carver.take<Column>(kParts * part_room(config.neuron_count));
  neurons_ = carver.take<uint32_t>(kParts * part_room(config.neuron_count));
  fired_ = carver.take<uint32_t>(chunk_total(config.neuron_count));
  part_sums_ = carver.take<float>(kParts * kGroup * group_count(config.hidden_size));
  tile_sums_ = carver.take<float>(config.threads * kTokenTile * kGroup);
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

size_t Ffn::chunks() const { return chunk_total(config_->neuron_count); }

size_t Ffn::part_size() const { return part_room(config_->neuron_count); }

/** A chunk is a multiple of 8 neurons, so no two threads share a byte. */
void Ffn::mark_fired(size_t t, size_t neuron) const {
  uint8_t* bits = fired_bits_ + token_of(t) * fired_stride_ + expert_index_ * fired_bytes(config_->neuron_count);
  bits[neuron / 8] = static_cast<uint8_t>(bits[neuron / 8] | (1u << (neuron % 8)));
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

void Ffn::compute(const LayerWeights& layer, const Activations& x, size_t tokens, float* out, size_t out_stride,
                  uint8_t* fired_bits, size_t fired_stride) {
  fired_bits_ = fired_bits;
  fired_stride_ = fired_stride;
  expert_index_ = 0;
  for (size_t t = 0; t < tokens; t++) std::memset(out + t * out_stride, 0, out_stride * sizeof(float));
  if (config_->expert_count == 1) {
    for (size_t t = 0; routed_bits_ != nullptr && t < tokens; t++) routed_bits_[t * routed_stride_] = 1;
    run_expert(layer.experts[0], layer, x, tokens, nullptr, out, out_stride);
  } else {
    route(layer, x, tokens);
    const size_t stride = x.stride();
    for (size_t e = 0; e < config_->expert_count; e++) {
      size_t count = 0;
      for (size_t t = 0; t < tokens; t++) {
        const float share = shares_[e * config_->batch_size + t];
        if (share == 0.0f) continue;
        if (routed_bits_ != nullptr) routed_bits_[t * routed_stride_ + e / 8] |= static_cast<uint8_t>(1u << (e % 8));
        tokens_[count] = static_cast<uint32_t>(t);
        token_shares_[count] = share;
        std::memcpy(routed_.token(count), x.token(t), stride * sizeof(float));
        std::memcpy(routed_.quantized(count), x.quantized(t), x.groups() * sizeof(QuantizedGroup));
        count++;
      }
      if (count == 0) continue;
      std::memset(expert_out_, 0, count * stride * sizeof(float));
      expert_index_ = e;
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
  const size_t batch = config_->batch_size;
  const Matrix& first_matrix = expert.gate.exists() ? expert.gate : expert.up;
  pool_->run(chunks(), [&](size_t chunk, size_t thread) {
    const size_t first = chunk * kNeuronChunk;
    const size_t count = std::min(kNeuronChunk, neurons - first);
    float* gates = tiles_ + thread * 2 * batch * kNeuronChunk;  // (token, neuron of the chunk)
    float* ups = gates + batch * kNeuronChunk;
    multiply_rows(*kernels_, first_matrix, first, count, x, tokens, gates, kNeuronChunk);
    if (expert.gate.exists()) {
      multiply_rows(*kernels_, expert.up, first, count, x, tokens, ups, kNeuronChunk);
    } else {
      std::fill_n(ups, tokens * kNeuronChunk, 1.0f);
    }
    uint32_t fired = 0;
    for (size_t t = 0; t < tokens; t++) {
      float* values = gates + t * kNeuronChunk;
      if (layer.up_bias.exists()) {
        for (size_t j = 0; j < count; j++) values[j] += layer.up_bias.floats()[first + j];
      }
      activate(values, ups + t * kNeuronChunk, count, values);
      for (size_t j = 0; j < count; j++) fired += values[j] != 0.0f;
      for (size_t j = 0; fired_bits_ != nullptr && j < count; j++) {
        if (values[j] != 0.0f) mark_fired(t, first + j);
      }
      for (size_t j = 0; shares != nullptr && j < count; j++) values[j] *= shares[t];
    }
    fired_[chunk] = fired;
    for (size_t j = 0; j < count; j++) {
      float* factors = factors_ + (first + j) * batch;
      for (size_t t = 0; t < tokens; t++) factors[t] = gates[t * kNeuronChunk + j];
    }
  });
  // Which neurons each part adds: those that fired for any token.
  size_t part_counts[kParts] = {};
  for (size_t chunk = 0; chunk < chunks(); chunk++) {
    counters_.neurons_fired += fired_[chunk];
    if (fired_[chunk] == 0) continue;
    const size_t part = chunk % kParts;
    const size_t end = std::min((chunk + 1) * kNeuronChunk, neurons);
    for (size_t i = chunk * kNeuronChunk; i < end; i++) {
      const float* factors = factors_ + i * batch;
      bool used = false;
      for (size_t t = 0; t < tokens && !used; t++) used = factors[t] != 0.0f;
      if (used) neurons_[part * part_size() + part_counts[part]++] = static_cast<uint32_t>(i);
    }
  }
  counters_.weight_bytes_read += config_->layout.matrices * expert.down.bytes();

  const size_t groups = group_count(config_->hidden_size);
  const size_t tiles = (tokens + kTokenTile - 1) / kTokenTile;
  pool_->run(groups * tiles, [&](size_t task, size_t thread) {
    const size_t group = task / tiles;
    const size_t first = task % tiles * kTokenTile;
    const size_t count = std::min(kTokenTile, tokens - first);
    float* sums = tile_sums_ + thread * kTokenTile * kGroup;  // (token of the tile, output of the group)
    for (size_t part = 0; part < kParts; part++) {
      std::memset(sums, 0, count * kGroup * sizeof(float));
      const ColumnList list{expert.down.rows_from(0), neurons_ + part * part_size(), part_counts[part], factors_ + first,
                            batch};
      add_columns(*kernels_, expert.down.encoding, list, group, count, sums, kGroup);
      for (size_t t = 0; t < count; t++) {
        float* y = out + (first + t) * out_stride + group * kGroup;
        for (size_t i = 0; i < kGroup; i++) y[i] += sums[t * kGroup + i];
      }
    }
    for (size_t t = 0; t < count; t++) {
      kernels_->to_natural_order(expert.down.encoding, out + (first + t) * out_stride + group * kGroup, 1);
    }
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
    if (fired_bits_ != nullptr) mark_fired(0, first + open[k]);
  }
  return fired;
}

/** Sums the fired neurons of every kParts-th chunk into part_sums_. */
void Ffn::add_part(const ExpertWeights& expert, size_t part) {
  Column* columns = part_columns_ + part * part_size();
  size_t count = 0;
  for (size_t chunk = part; chunk < chunks(); chunk += kParts) {
    std::copy_n(columns_ + chunk * kNeuronChunk, fired_[chunk], columns + count);
    count += fired_[chunk];
  }
  const size_t groups = group_count(config_->hidden_size);
  float* sums = part_sums_ + part * groups * kGroup;
  std::memset(sums, 0, groups * kGroup * sizeof(float));
  add_columns(*kernels_, expert.down.encoding, columns, count, groups, sums);
}

void Ffn::run_one(const ExpertWeights& expert, const LayerWeights& layer, const Activations& x, float share, float* out) {
  const size_t neurons = config_->neuron_count;
  pool_->run(chunks(), [&](size_t chunk, size_t) {
    const size_t first = chunk * kNeuronChunk;
    const size_t count = std::min(kNeuronChunk, neurons - first);
    fired_[chunk] = static_cast<uint32_t>(find_fired(expert, layer, x, share, first, count));
  });
  pool_->run(kParts, [&](size_t part, size_t) { add_part(expert, part); });
  const size_t length = group_count(config_->hidden_size) * kGroup;
  for (size_t part = 0; part < kParts; part++) {
    for (size_t i = 0; i < length; i++) out[i] += part_sums_[part * length + i];
  }
  kernels_->to_natural_order(expert.down.encoding, out, length / kGroup);

  size_t fired = 0;
  for (size_t chunk = 0; chunk < chunks(); chunk++) fired += fired_[chunk];
  counters_.neurons_fired += fired;
  counters_.weight_bytes_read += expert.down.bytes() + (config_->layout.matrices - 1) * fired * expert.down.row_bytes();
}

}  // namespace pi2
