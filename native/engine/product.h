#pragma once
/** Products of encoded rows with activations: the choice of kernel by encoding and number of tokens, in one place. */
#include <cstddef>

#include "native/engine/activations.h"
#include "native/engine/weights.h"

namespace pi2 {

/**
 * Rows of a matrix that one thread takes at a time. Kernels begin a chunk without prefetched rows, and some prefetch
 * past its end, which another thread reads: with 64 rows that costs a tenth of the bandwidth.
 */
inline constexpr size_t kRowChunk = 128;

constexpr size_t chunk_count(size_t rows) { return (rows + kRowChunk - 1) / kRowChunk; }

/** Whether products of this encoding with these activations are the matrix unit's: of integers, since it rounds to bf16. */
inline bool takes_tiles(Encoding encoding, const Activations& x) {
  return x.is_packed() && (encoding == Encoding::kQ4 || encoding == Encoding::kQ8);
}

/** y[t * y_stride + r] = rows_r . x_t for `count` encoded rows (not f32) and `tokens` tokens. x holds both forms. */
void multiply(const Kernels& kernels, Encoding encoding, Rows rows, size_t count, const Activations& x, size_t tokens,
              float* y, size_t y_stride);

/** y[r] = row r . x for one token and rows anywhere, each followed by its scales. */
void multiply_list(const Kernels& kernels, Encoding encoding, const uint8_t* const* rows, size_t count, const Activations& x,
                   float* y);

/** y[t * y_stride + r] = row (first + r) . x_t, for `count` rows and `tokens` tokens. x holds both forms. */
void multiply_rows(const Kernels& kernels, const Matrix& matrix, size_t first, size_t count, const Activations& x,
                   size_t tokens, float* y, size_t y_stride);

/** Kernels::add_columns_* of the encoding, over all groups [0, groups) of one token. */
void add_columns(const Kernels& kernels, Encoding encoding, const Column* columns, size_t count, size_t groups, float* y);

/** The same for groups [first, first + groups): y are their outputs. Columns begin at group 0. */
void add_columns_of_groups(const Kernels& kernels, Encoding encoding, const Column* columns, size_t count, size_t first,
                           size_t groups, float* y);

/**
 * y[t * y_stride + i] = sum over columns of their factors times them, for the 256 outputs i of a group in natural order: on
 * the matrix unit.
 */
void sum_columns(const Kernels& kernels, Encoding encoding, const TileColumns& columns, const uint16_t* factors,
                 size_t group, size_t tokens, float* y, size_t y_stride);

/** Kernels::add_columns_batch_* of the encoding, for one group of several tokens; y_t = y + t * y_stride are its 256
 * outputs. */
void add_columns(const Kernels& kernels, Encoding encoding, ColumnList list, size_t group, size_t tokens, float* y,
                 size_t y_stride);

}  // namespace pi2
