#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "native/base/memory.h"
#include "native/engine/config.h"

namespace pi2 {

/**
 * Keys and values of all past positions, half floats, each head's positions one after another: [kv head][slot][padded head
 * dim]. A layer with an attention window keeps a ring of window + batch slots, others the whole context.
 */
class KvCache {
 public:
  struct Layer {
    uint16_t* keys;
    uint16_t* values;
    size_t slots;

    size_t slot_of(size_t position) const { return position % slots; }
  };

  Status allocate(const EngineConfig& config) {
    padded_dim_ = padded(config.head_dim);
    const size_t per_slot = config.kv_head_count * padded_dim_;
    Status status = memory_.allocate(bytes_needed(config), "the KV cache");
    if (!status.is_ok()) return status;
    uint16_t* next = memory_.as<uint16_t>();
    for (const size_t window : config.windows) {
      const size_t count = slots(config, window);
      layers_.push_back({next, next + count * per_slot, count});
      next += 2 * count * per_slot;
    }
    return Status::ok();
  }

  /** Bytes that `allocate` takes. */
  static size_t bytes_needed(const EngineConfig& config) {
    size_t total = 0;
    for (const size_t window : config.windows) total += slots(config, window);
    return 2 * sizeof(uint16_t) * total * config.kv_head_count * padded(config.head_dim);
  }

  const Layer& layer(size_t index) const { return layers_[index]; }
  /** Halves of one position of one head; positions of a head follow each other. */
  size_t padded_dim() const { return padded_dim_; }
  size_t bytes() const { return memory_.bytes(); }
  /** Slots that hold every position below `position` that a later token may attend to, whatever was written since. */
  bool can_rewind(size_t filled, size_t position) const {
    if (position == 0 || position == filled) return true;
    for (const Layer& layer : layers_) {
      if (filled > layer.slots) return false;
    }
    return position < filled;
  }

 private:
  static size_t padded(size_t head_dim) { return (head_dim + 15) / 16 * 16; }
  static size_t slots(const EngineConfig& config, size_t window) {
    return std::min(window == 0 ? config.context_length : window + config.batch_size, config.context_length);
  }

  HugeMemory memory_;
  std::vector<Layer> layers_;
  size_t padded_dim_ = 0;
};

}  // namespace pi2
