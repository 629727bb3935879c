#pragma once
/**
 * The inner loops, one table of functions for each instruction set. The scalar table is the reference: every other one is
 * tested against it (native/kernels/kernels_test.cc).
 *
 * Rules for implementers:
 *  - The result of a row or an output depends only on its inputs, never on how a caller cuts the work: same kernel set, same
 *    bits, whatever the thread count.
 *  - Weights need no alignment. QuantizedGroup and all float arrays are 64-byte aligned and padded to whole groups.
 *  - An instruction-set file holds no inline or template code that another file could share: the linker may keep its copy
 * for every CPU.
 */
#include <cstddef>
#include <cstdint>

#include "native/kernels/encoding.h"

namespace pi2 {

/**
 * 256 activations as int8 with a scale for each block of 32, in the lane order of q8 weights (FORMAT.md section 1).
 * Activation e of block b is `scales[b] * values[q8_byte(b, e)]`, values in -127..127.
 */
struct alignas(64) QuantizedGroup {
  int8_t values[kGroup];
  /** -8 * (sum of the block's values) in lanes 0..7, zero in 8..15: undoes the offset of q4 weights. */
  int32_t q4_offset[16];
  /** The block scales, twice, one for each half of a 512-bit line. */
  float scales[16];
};

/** Where the vectors of a matrix lie: vector v has weights at `weights + v * stride` and scales at `scales + v * stride`. */
struct Rows {
  const uint8_t* weights;
  const uint8_t* scales;
  size_t stride;
};

/** A neuron's down column and how much of it the output gets. */
struct Column {
  const uint8_t* weights;
  const uint8_t* scales;
  float factor;
};

/**
 * Columns that several tokens add: column c is vector number neurons[c] of `columns`, and token t takes
 * factors[neurons[c] * factor_stride + t] of it.
 */
struct ColumnList {
  Rows columns;
  const uint32_t* neurons;
  size_t count;
  const float* factors;
  size_t factor_stride;
};

struct TileKernels;

struct Kernels {
  const char* name;
  /** The matrix unit (tiles.h), or null. */
  const TileKernels* tiles = nullptr;

  /**
   * out[0 .. group_count(n)) = x[0 .. n) quantized, padded with zero. With `largest` the greatest magnitude of a block, a
   * value is x * (127 / largest) rounded to nearest even and the scale is largest / 127, all in float, so that every set
   * gives the same bits. A block whose 127 / largest overflows is zero; one with an infinity or NaN has zero values and a
   * NaN scale, so that the trouble stays visible.
   */
  void (*quantize)(const float* x, size_t n, QuantizedGroup* out);

  /**
   * y[r] = row r . x for `row_count` consecutive rows of `groups` groups, for one token. Block sums are exact integers;
   * their scaled sum is accumulated in float.
   */
  void (*dot_q4)(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y);
  void (*dot_q8)(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y);
  /** Float activations, padded with zero to whole groups. */
  void (*dot_f16)(Rows rows, size_t row_count, size_t groups, const float* x, float* y);
  /**
   * The same for rows at any address: row r has weights at `rows[r]` and scales `scales_offset` bytes further. For the rows
   * of neurons that fired; bit for bit the result of dot_*.
   */
  void (*dot_list_q4)(const uint8_t* const* rows, size_t scales_offset, size_t row_count, size_t groups,
                      const QuantizedGroup* x, float* y);
  void (*dot_list_q8)(const uint8_t* const* rows, size_t scales_offset, size_t row_count, size_t groups,
                      const QuantizedGroup* x, float* y);
  void (*dot_list_f16)(const uint8_t* const* rows, size_t row_count, size_t groups, const float* x, float* y);
  /** Unpadded float rows of n. */
  void (*dot_f32)(const float* rows, size_t row_count, size_t n, const float* x, float* y);

  /**
   * The same for several tokens: y[t * y_stride + r] = row r . x_t. Activations of token t begin at `x + t * groups`
   * (dot_q*) or `x + t * x_stride` (f16).
   */
  void (*matmul_q4)(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, size_t tokens, float* y,
                    size_t y_stride);
  void (*matmul_q8)(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, size_t tokens, float* y,
                    size_t y_stride);
  void (*matmul_f16)(Rows rows, size_t row_count, size_t groups, const float* x, size_t x_stride, size_t tokens, float* y,
                     size_t y_stride);

  /**
   * Sums down columns into one token's output: for groups g in [group_begin, group_end), the 256 outputs of group g grow by
   * the sum over columns, in order, of factor * column. Inside a group the outputs are in an order of the kernel set's own,
   * the same for one token and for several: start from zeros, add up, then sort once with `to_natural_order`.
   */
  void (*add_columns_q4)(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y);
  void (*add_columns_q8)(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y);
  void (*add_columns_f16)(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y);

  /** The same for several tokens; y_t begins at y + t * y_stride. A column that no token uses is not read. */
  void (*add_columns_batch_q4)(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                               size_t y_stride);
  void (*add_columns_batch_q8)(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                               size_t y_stride);
  void (*add_columns_batch_f16)(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                                size_t y_stride);

  /** Sorts the outputs of `groups` groups that add_columns_* of this encoding has summed, in place. */
  void (*to_natural_order)(Encoding encoding, float* y, size_t groups);

  /** scores[p] = scale * (q . k_p) over `count` half-float keys, `stride` halves apart; n is a multiple of 16. */
  void (*attention_scores)(const float* q, const uint16_t* keys, size_t stride, size_t n, size_t count, float scale,
                           float* scores);
  /** out[0 .. n) += sum over p of weights[p] * v_p, half-float values `stride` halves apart; n is a multiple of 16. */
  void (*attention_mix)(const float* weights, const uint16_t* values, size_t stride, size_t n, size_t count, float* out);

  /** Rounds to nearest even; n is any number. */
  void (*float_to_half)(const float* in, size_t n, uint16_t* out);
};

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
/** Only for a CPU that has AMX, and a process that may use it (dispatch.h). */
const Kernels& amx_kernels();
#endif
#if defined(__aarch64__)
const Kernels& neon_kernels();
#endif

}  // namespace pi2
