#pragma once
/**
 * What a core's matrix unit computes: dense products of many tokens, for prompts. Weights are decoded to bf16, once for all
 * tokens; so are activations and what neurons contribute; sums are float. Such a unit does more multiplications than lists
 * of neurons that fire could leave out: a neuron that does not fire is a factor of exactly zero.
 *
 * A result depends on its row and token alone, not on how many tokens or rows are computed together: the order of its sum is
 * fixed. It is another order and precision than those of the other kernels.
 */
#include <cstddef>
#include <cstdint>

#include "native/kernels/kernels.h"

namespace pi2 {

/** Tokens are packed, and factors kept, in lots of so many. */
inline constexpr size_t kTokenLot = 32;
/** Neurons whose factors lie together. */
inline constexpr size_t kFactorChunk = 128;

constexpr size_t lots_of_tokens(size_t tokens) { return (tokens + kTokenLot - 1) / kTokenLot * kTokenLot; }
/** bf16 numbers of the packed activations of so many tokens. */
constexpr size_t packed_length(size_t groups, size_t tokens) { return lots_of_tokens(tokens) * groups * kGroup; }
/** bf16 numbers of the factors of so many neurons and tokens. */
constexpr size_t factors_length(size_t neurons, size_t tokens) {
  return lots_of_tokens(tokens) * ((neurons + kFactorChunk - 1) / kFactorChunk * kFactorChunk);
}

/** The down columns of a bank in checkpoint order: column i has weights at columns[i], scales `scales_offset` bytes on. */
struct TileColumns {
  const uint8_t* const* columns;  // null: the factors of all tokens are zero
  size_t scales_offset;
  size_t count;
};

struct TileKernels {
  /** Packs the tokens [first, first + kTokenLot) of `tokens`; x_t at x + t * x_stride is padded to whole groups. */
  void (*pack)(const float* x, size_t x_stride, size_t groups, size_t first, size_t tokens, uint16_t* packed);

  /** y[t * y_stride + r] = row r . x_t. */
  void (*multiply_q4)(Rows rows, size_t row_count, size_t groups, const uint16_t* packed, size_t tokens, float* y,
                      size_t y_stride);
  void (*multiply_q8)(Rows rows, size_t row_count, size_t groups, const uint16_t* packed, size_t tokens, float* y,
                      size_t y_stride);

  /**
   * Factors of one neuron: token t gets values[t * stride]. Returns whether one of them is not zero. Every neuron up to a
   * multiple of 32 has to be put, or zero: that there is no column does not make zero of what is no number.
   */
  bool (*put_factors)(const float* values, size_t stride, size_t tokens, size_t neuron, uint16_t* factors);

  /**
   * y[t * y_stride + i] = sum over columns of factor * column, for the 256 outputs i of a group, in the order that
   * to_natural_order sorts.
   */
  void (*sum_columns_q4)(TileColumns columns, const uint16_t* factors, size_t group, size_t tokens, float* y,
                         size_t y_stride);
  void (*sum_columns_q8)(TileColumns columns, const uint16_t* factors, size_t group, size_t tokens, float* y,
                         size_t y_stride);
};

}  // namespace pi2
