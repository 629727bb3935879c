#pragma once
#include <algorithm>
#include <cstddef>

#include "native/base/thread_pool.h"
#include "native/kernels/kernels.h"
#include "native/kernels/tiles.h"

namespace pi2 {

/**
 * The input of a matrix product for up to `most_tokens` tokens: floats padded with zero to whole groups, and a second form
 * that kernels take: int8 of each token, or packed for the matrix unit. A view of memory that the engine owns.
 */
class Activations {
 public:
  Activations() = default;
  Activations(float* values, uint8_t* form, size_t length) : values_(values), form_(form), length_(length) {}

  static size_t float_bytes(size_t length, size_t most_tokens) { return 4 * kGroup * group_count(length) * most_tokens; }
  /** Bytes of the second form, whichever it is. `tiles` may be null. */
  static size_t form_bytes(const TileKernels* tiles, size_t length, size_t most_tokens) {
    const size_t packed = tiles == nullptr ? 0 : packed_length(group_count(length), most_tokens) * sizeof(uint16_t);
    return std::max(sizeof(QuantizedGroup) * group_count(length) * most_tokens, packed);
  }

  size_t length() const { return length_; }
  size_t groups() const { return group_count(length_); }
  /** Floats from one token to the next. */
  size_t stride() const { return groups() * kGroup; }
  float* token(size_t t) const { return values_ + t * stride(); }
  const QuantizedGroup* quantized(size_t t) const { return quantized_form() + t * groups(); }
  /** One token of it alone, not packed. */
  Activations of_token(size_t t) const {
    return {token(t), reinterpret_cast<uint8_t*>(quantized_form() + t * groups()), length_};
  }
  /** Whether the second form is the matrix unit's. */
  bool is_packed() const { return is_packed_; }
  const uint16_t* packed() const { return reinterpret_cast<const uint16_t*>(form_); }

  /** Fills the second form of `tokens` tokens from their floats: that of the matrix unit, if `pack` and there is one. */
  void prepare(const Kernels& kernels, ThreadPool& pool, size_t tokens, bool pack) {
    is_packed_ = pack && kernels.tiles != nullptr;
    if (is_packed_) {
      auto* packed = reinterpret_cast<uint16_t*>(form_);
      pool.run(lots_of_tokens(tokens) / kTokenLot, [&](size_t lot, size_t) {
        kernels.tiles->pack(values_, stride(), groups(), lot * kTokenLot, tokens, packed);
      });
    } else if (tokens == 1) {
      kernels.quantize(token(0), length_, quantized_form());
    } else {
      pool.run(tokens, [&](size_t t, size_t) { kernels.quantize(token(t), length_, quantized_form() + t * groups()); });
    }
  }

 private:
  QuantizedGroup* quantized_form() const { return reinterpret_cast<QuantizedGroup*>(form_); }

  float* values_ = nullptr;
  uint8_t* form_ = nullptr;
  size_t length_ = 0;
  bool is_packed_ = false;
};

}  // namespace pi2
