#pragma once
#include <algorithm>
#include <cstddef>

#include "native/kernels/kernels.h"

namespace pi2 {

/**
 * The input of a matrix product for up to `most_tokens` tokens: floats padded with zero to whole groups, and their int8
 * form. A view of memory that the engine owns.
 */
class Activations {
 public:
  Activations() = default;
  Activations(float* values, QuantizedGroup* quantized, size_t length)
      : values_(values), quantized_(quantized), length_(length) {}

  static size_t float_bytes(size_t length, size_t most_tokens) { return 4 * kGroup * group_count(length) * most_tokens; }
  static size_t quantized_bytes(size_t length, size_t most_tokens) {
    return sizeof(QuantizedGroup) * group_count(length) * most_tokens;
  }

  size_t length() const { return length_; }
  size_t groups() const { return group_count(length_); }
  /** Floats from one token to the next. */
  size_t stride() const { return groups() * kGroup; }
  float* token(size_t t) const { return values_ + t * stride(); }
  QuantizedGroup* quantized(size_t t) const { return quantized_ + t * groups(); }

  /** Fills the int8 form of a token from its floats. */
  void quantize(const Kernels& kernels, size_t t) const { kernels.quantize(token(t), length_, quantized(t)); }

 private:
  float* values_ = nullptr;
  QuantizedGroup* quantized_ = nullptr;
  size_t length_ = 0;
};

}  // namespace pi2
