#pragma once
#include "native/base/thread_pool.h"
#include "native/engine/activations.h"
#include "native/engine/kv_cache.h"
#include "native/engine/weights.h"

namespace pi2 {

/**
 * Attention of one layer over a batch of tokens of one sequence: q, k, v products, norms and rotary embedding of the heads,
 * keys and values into the cache, softmax over the past, output product.
 */
class Attention {
 public:
  /** Bytes that `bind` needs as `scratch`. */
  static size_t scratch_bytes(const EngineConfig& config);
  /** `mixed_*`: the heads' outputs, input of the output product. */
  void bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch, Activations mixed);

  /** Finds what all layers share for `tokens` tokens from `position` on. Before the first layer's `compute`. */
  void begin(size_t position, size_t tokens);

  /** out[t * out_stride + i] = attention of token t at `position + t`, for normed inputs x. */
  void compute(const LayerWeights& weights, const KvCache& cache, size_t layer_index, const Activations& x, size_t tokens,
               size_t position, float* out, size_t out_stride);

  /** Bytes of keys and values read since bind. */
  uint64_t kv_bytes_read() const { return kv_bytes_read_; }

 private:
  size_t qkv_size() const { return config_->query_size() + 2 * config_->kv_size(); }
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);
  void project(const LayerWeights& weights, const Activations& x, size_t tokens);
  void store(const LayerWeights& weights, const KvCache::Layer& cache, size_t token, size_t position);
  void attend(const LayerWeights& weights, const KvCache::Layer& cache, size_t token, size_t head, size_t position,
              size_t window, size_t thread);

  const EngineConfig* config_ = nullptr;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  float* qkv_ = nullptr;     // (batch, query | key | value)
  float* scores_ = nullptr;  // (thread, context)
  float* heads_ = nullptr;   // (thread, 2, padded head dim): a query or key, an output
  float* turns_ = nullptr;   // (batch, head dim): the rotary embedding's cosines | sines
  size_t padded_dim_ = 0;
  Activations mixed_;
  uint64_t kv_bytes_read_ = 0;
};

}  // namespace pi2
