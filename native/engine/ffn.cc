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
  for (Gathered& gathered : gathered_) {
    gathered.shares = carver.take<float>(batch);
    gathered.tokens = carver.take<uint32_t>(batch);
    gathered.rows = carver.take<float*>(batch);
  }
  used_ = carver.take<uint32_t>(batch);
  return carver.used();
}

size_t Ffn::scratch_bytes(const EngineConfig& config) { return Ffn().carve(config, nullptr); }

void Ffn::bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, Experts& experts, uint8_t* scratch,
               const std::array<Activations, kGathered>& routed, const std::array<Activations, kGathered>& routed_residual) {
  config_ = &config;
  kernels_ = &kernels;
  pool_ = &pool;
  experts_ = &experts;
  for (size_t i = 0; i < kGathered; i++) {
    gathered_[i].x = routed[i];
    gathered_[i].residual = routed_residual[i];
  }
  carve(config, scratch);
}

Status Ffn::compute(size_t layer_index, const LayerWeights& layer, const Activations& x, const Activations* predictor_x,
                    size_t tokens, float* out, size_t out_stride, uint8_t* fired_bits, size_t fired_stride) {
  for (size_t t = 0; t < tokens; t++) std::memset(out + t * out_stride, 0, out_stride * sizeof(float));
  Status status;
  ExpertJob job{layer_index, 0, layer, x, predictor_x, tokens, nullptr, out, out_stride, {fired_bits, fired_stride}};
  if (config_->expert_count == 1) {
    for (size_t t = 0; routed_bits_ != nullptr && t < tokens; t++) routed_bits_[t * routed_stride_] = 1;
    float** rows = gathered_[0].rows;
    for (size_t t = 0; activations_ != nullptr && t < tokens; t++) rows[t] = activations_ + t * activation_stride_;
    if (activations_ != nullptr) job.fired.activations = rows;
    status = experts_->run(job);
  } else {
    route(layer, x, tokens);
    std::fill_n(used_, tokens, 0u);
    // While one expert is computed, the reads of the next are on their way.
    size_t next = 0;
    for (size_t e = 0; e < config_->expert_count && status.is_ok(); e++) {
      if (!gather(e, job, &gathered_[next])) continue;
      experts_->begin(*gathered_[next].job);
      next = (next + 1) % kGathered;
      status = run_gathered(job, &gathered_[next]);
    }
    if (status.is_ok()) status = run_gathered(job, &gathered_[(next + 1) % kGathered]);
    if (!status.is_ok()) experts_->cancel();
    for (Gathered& gathered : gathered_) gathered.job.reset();
  }
  if (layer.down_bias.exists()) {
    for (size_t t = 0; t < tokens; t++) {
      for (size_t j = 0; j < config_->hidden_size; j++) out[t * out_stride + j] += layer.down_bias.floats()[j];
    }
  }
  return status;
}

/** Gathers the tokens of a job for all experts that chose this one; whether there are any. */
bool Ffn::gather(size_t expert, const ExpertJob& all, Gathered* gathered) {
  const size_t stride = all.x.stride();
  const bool from_residual = all.predictor_x != nullptr && all.predictor_x != &all.x;
  size_t count = 0;
  for (size_t t = 0; t < all.tokens; t++) {
    const float share = shares_[expert * config_->batch_size + t];
    if (share == 0.0f) continue;
    if (routed_bits_ != nullptr) {
      uint8_t& byte = routed_bits_[t * routed_stride_ + expert / 8];
      byte = static_cast<uint8_t>(byte | (1u << (expert % 8)));
    }
    gathered->tokens[count] = static_cast<uint32_t>(t);
    gathered->shares[count] = share;
    if (activations_ != nullptr) {
      gathered->rows[count] = activations_ + t * activation_stride_ + used_[t]++ * config_->neuron_count;
    }
    std::memcpy(gathered->x.token(count), all.x.token(t), stride * sizeof(float));
    if (from_residual) std::memcpy(gathered->residual.token(count), all.predictor_x->token(t), stride * sizeof(float));
    count++;
  }
  if (count == 0) return false;
  gathered->x.prepare(*kernels_, *pool_, count, all.x.is_packed());
  if (from_residual) gathered->residual.prepare(*kernels_, *pool_, count, all.x.is_packed());
  const Activations* predictor_x = from_residual ? &gathered->residual : &gathered->x;
  FiredBits fired{all.fired.base, all.fired.stride, gathered->tokens, activations_ == nullptr ? nullptr : gathered->rows};
  if (fired.wanted()) fired.base += expert * fired_bytes(config_->neuron_count);
  gathered->job.emplace(ExpertJob{all.layer_index, expert, all.layer, gathered->x,
                                  all.predictor_x == nullptr ? nullptr : predictor_x, count, gathered->shares, expert_out_,
                                  stride, fired});
  return true;
}

/** Computes an expert whose tokens were gathered, if there is one, and adds it to their outputs. */
Status Ffn::run_gathered(const ExpertJob& all, Gathered* gathered) {
  if (!gathered->job) return Status::ok();
  const ExpertJob& job = *gathered->job;
  const size_t stride = job.out_stride;
  std::memset(expert_out_, 0, job.tokens * stride * sizeof(float));
  Status status = experts_->run(job);
  for (size_t i = 0; i < job.tokens; i++) {
    float* y = all.out + gathered->tokens[i] * all.out_stride;
    for (size_t j = 0; j < config_->hidden_size; j++) y[j] += expert_out_[i * stride + j];
  }
  gathered->job.reset();
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
