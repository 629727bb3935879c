#pragma once
#include "native/base/thread_pool.h"
#include "native/engine/activations.h"
#include "native/engine/kv_cache.h"
#include "native/engine/weights.h"

namespace pi2 {

/**
 * Attention of one layer over a batch of tokens: q, k, v products of all together, norms and rotary embedding of the heads,
 * keys and values into the cache, for each token a softmax over the past of its own sequence, output product.
 */
class Attention {
 public:
  /** Bytes that `bind` needs as `scratch`. */
  static size_t scratch_bytes(const EngineConfig& config);
  /** `mixed_*`: the heads' outputs, input of the output product. */
  void bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch, Activations mixed);

  /** Finds what all layers share for the tokens of a step. Before the first layer's `compute`. */
  void begin(const Step& step);

  /** out[t * out_stride + i] = attention of token t at its place, for normed inputs x. The cache has room for all places. */
  void compute(const LayerWeights& weights, const KvCache& cache, size_t layer_index, const Activations& x, const Step& step,
               float* out, size_t out_stride);

  /** Bytes of keys and values read since bind. */
  uint64_t kv_bytes_read() const { return kv_bytes_read_; }

 private:
  /** Positions that a token attends to. */
  struct Seen {
    size_t begin;
    size_t count;
  };

  size_t qkv_size() const { return config_->query_size() + 2 * config_->kv_size(); }
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);
  void project(const LayerWeights& weights, const Activations& x, size_t tokens);
  Seen seen_from(size_t layer_index, size_t position) const;
  void store(const LayerWeights& weights, const KvCache::Layer& layer, size_t token, size_t slot);
  void attend(const LayerWeights& weights, const KvCache& cache, size_t layer_index, size_t token, size_t head,
              const Place& place, size_t thread);

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
