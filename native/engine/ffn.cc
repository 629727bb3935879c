#include "native/engine/ffn.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/base/carver.h"

namespace pi2 {

size_t Ffn::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t batch = config.batch_size;
  expert_out_ = carver.take<float>(batch * kGroup * group_count(config.hidden_size));
  shares_ = carver.take<float>(config.expert_count * batch);
  router_logits_ = carver.take<float>(config.expert_count);
  token_shares_ = carver.take<float>(batch);
  tokens_ = carver.take<uint32_t>(batch);
  rows_ = carver.take<float*>(batch);
  used_ = carver.take<uint32_t>(batch);
  return carver.used();
}

size_t Ffn::scratch_bytes(const EngineConfig& config) { return Ffn().carve(config, nullptr); }

void Ffn::bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, Experts& experts, uint8_t* scratch,
               Activations routed, Activations routed_residual) {
  config_ = &config;
  kernels_ = &kernels;
  pool_ = &pool;
  experts_ = &experts;
  routed_ = routed;
  routed_residual_ = routed_residual;
  carve(config, scratch);
}

Status Ffn::compute(size_t layer_index, const LayerWeights& layer, const Activations& x, const Activations* predictor_x,
                    size_t tokens, float* out, size_t out_stride, uint8_t* fired_bits, size_t fired_stride) {
  for (size_t t = 0; t < tokens; t++) std::memset(out + t * out_stride, 0, out_stride * sizeof(float));
  Status status;
  if (config_->expert_count == 1) {
    for (size_t t = 0; routed_bits_ != nullptr && t < tokens; t++) routed_bits_[t * routed_stride_] = 1;
    for (size_t t = 0; activations_ != nullptr && t < tokens; t++) rows_[t] = activations_ + t * activation_stride_;
    const FiredBits fired{fired_bits, fired_stride, nullptr, activations_ == nullptr ? nullptr : rows_};
    status = experts_->run({layer_index, 0, layer, x, predictor_x, tokens, nullptr, out, out_stride, fired});
  } else {
    route(layer, x, tokens);
    std::fill_n(used_, tokens, 0u);
    for (size_t e = 0; e < config_->expert_count && status.is_ok(); e++) {
      uint8_t* bits = fired_bits == nullptr ? nullptr : fired_bits + e * fired_bytes(config_->neuron_count);
      status = run_routed(layer_index, e, layer, x, predictor_x, tokens, out, out_stride, bits, fired_stride);
    }
  }
  if (layer.down_bias.exists()) {
    for (size_t t = 0; t < tokens; t++) {
      for (size_t j = 0; j < config_->hidden_size; j++) out[t * out_stride + j] += layer.down_bias.floats()[j];
    }
  }
  return status;
}

/** Gathers the tokens that chose the expert, computes them together and adds them to their outputs. */
Status Ffn::run_routed(size_t layer_index, size_t expert, const LayerWeights& layer, const Activations& x,
                       const Activations* predictor_x, size_t tokens, float* out, size_t out_stride, uint8_t* fired_bits,
                       size_t fired_stride) {
  const size_t stride = x.stride();
  const bool from_residual = predictor_x != nullptr && predictor_x != &x;
  size_t count = 0;
  for (size_t t = 0; t < tokens; t++) {
    const float share = shares_[expert * config_->batch_size + t];
    if (share == 0.0f) continue;
    if (routed_bits_ != nullptr) {
      uint8_t& byte = routed_bits_[t * routed_stride_ + expert / 8];
      byte = static_cast<uint8_t>(byte | (1u << (expert % 8)));
    }
    tokens_[count] = static_cast<uint32_t>(t);
    token_shares_[count] = share;
    if (activations_ != nullptr) {
      rows_[count] = activations_ + t * activation_stride_ + used_[t]++ * config_->neuron_count;
    }
    std::memcpy(routed_.token(count), x.token(t), stride * sizeof(float));
    if (from_residual) std::memcpy(routed_residual_.token(count), predictor_x->token(t), stride * sizeof(float));
    count++;
  }
  if (count == 0) return Status::ok();
  routed_.prepare(*kernels_, *pool_, count, x.is_packed());
  if (from_residual) routed_residual_.prepare(*kernels_, *pool_, count, x.is_packed());
  std::memset(expert_out_, 0, count * stride * sizeof(float));
  if (predictor_x != nullptr) predictor_x = from_residual ? &routed_residual_ : &routed_;
  const FiredBits fired{fired_bits, fired_stride, tokens_, activations_ == nullptr ? nullptr : rows_};
  Status status =
      experts_->run({layer_index, expert, layer, routed_, predictor_x, count, token_shares_, expert_out_, stride, fired});
  for (size_t i = 0; i < count; i++) {
    float* y = out + tokens_[i] * out_stride;
    for (size_t j = 0; j < config_->hidden_size; j++) y[j] += expert_out_[i * stride + j];
  }
  return status;
}

/** The chosen experts are those of the largest logits (lowest number first on a tie), weighted by softmax over them alone.
 */
void Ffn::route(const LayerWeights& layer, const Activations& x, size_t tokens) {
  const size_t experts = config_->expert_count;
  const size_t batch = config_->batch_size;
  std::memset(shares_, 0, experts * batch * sizeof(float));
  router_bytes_read_ += layer.router.bytes();
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

}  // namespace pi2
