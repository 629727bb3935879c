#include "native/engine/product.h"

#include <algorithm>
#include <cstdlib>

#include "native/engine/neurons.h"

namespace pi2 {

void multiply_rows(const Kernels& kernels, const Matrix& matrix, size_t first, size_t count, const Activations& x,
                   size_t tokens, float* y, size_t y_stride) {
  if (matrix.encoding == Encoding::kF32) {
    for (size_t t = 0; t < tokens; t++) {
      kernels.dot_f32(matrix.floats() + first * matrix.columns, count, matrix.columns, x.token(t), y + t * y_stride);
    }
    return;
  }
  multiply(kernels, matrix.encoding, matrix.rows_from(first), count, x, tokens, y, y_stride);
}

namespace {

/** Rows of a block that few tokens multiply together, and how far ahead of them rows are fetched. */
constexpr size_t kBlockRows = 4;
constexpr size_t kRowsAhead = 8;

void prefetch_bytes(const uint8_t* begin, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(begin + at, 0, 2);
}

}  // namespace

void multiply(const Kernels& kernels, Encoding encoding, Rows rows, size_t count, const Activations& x, size_t tokens,
              float* y, size_t y_stride) {
  const size_t groups = x.groups();
  if (takes_tiles(encoding, x)) {
    const auto tiled = encoding == Encoding::kQ4 ? kernels.tiles->multiply_q4 : kernels.tiles->multiply_q8;
    return tiled(rows, count, groups, x.packed(), tokens, y, y_stride);
  }
  if (tokens == 1) {
    switch (encoding) {
      case Encoding::kQ4: return kernels.dot_q4(rows, count, groups, x.quantized(0), y);
      case Encoding::kQ8: return kernels.dot_q8(rows, count, groups, x.quantized(0), y);
      case Encoding::kF16: return kernels.dot_f16(rows, count, groups, x.token(0), y);
      case Encoding::kF32: std::abort();
    }
  }
  if (tokens <= kFewTokens && count > kBlockRows) {
    // Kernels of several tokens are made for rows that are in the core's cache by the second token.
    for (size_t r = 0; r < count; r += kBlockRows) {
      const size_t block = std::min(kBlockRows, count - r);
      for (size_t k = r + kRowsAhead; k < std::min(r + kRowsAhead + kBlockRows, count); k++) {
        prefetch_bytes(rows.weights + k * rows.stride, weight_bytes(encoding, groups * kGroup));
        prefetch_bytes(rows.scales + k * rows.stride, scale_bytes(encoding, groups * kGroup));
      }
      const Rows some{rows.weights + r * rows.stride, rows.scales + r * rows.stride, rows.stride};
      multiply(kernels, encoding, some, block, x, tokens, y + r, y_stride);
    }
    return;
  }
  switch (encoding) {
    case Encoding::kQ4: return kernels.matmul_q4(rows, count, groups, x.quantized(0), tokens, y, y_stride);
    case Encoding::kQ8: return kernels.matmul_q8(rows, count, groups, x.quantized(0), tokens, y, y_stride);
    case Encoding::kF16: return kernels.matmul_f16(rows, count, groups, x.token(0), x.stride(), tokens, y, y_stride);
    case Encoding::kF32: std::abort();
  }
}

void multiply_list(const Kernels& kernels, Encoding encoding, const uint8_t* const* rows, size_t count, const Activations& x,
                   float* y) {
  const size_t scales_offset = weight_bytes(encoding, x.length());
  switch (encoding) {
    case Encoding::kQ4: return kernels.dot_list_q4(rows, scales_offset, count, x.groups(), x.quantized(0), y);
    case Encoding::kQ8: return kernels.dot_list_q8(rows, scales_offset, count, x.groups(), x.quantized(0), y);
    case Encoding::kF16: return kernels.dot_list_f16(rows, count, x.groups(), x.token(0), y);
    case Encoding::kF32: std::abort();
  }
}

void add_columns(const Kernels& kernels, Encoding encoding, const Column* columns, size_t count, size_t groups, float* y) {
  add_columns_of_groups(kernels, encoding, columns, count, 0, groups, y);
}

void add_columns_of_groups(const Kernels& kernels, Encoding encoding, const Column* columns, size_t count, size_t first,
                           size_t groups, float* y) {
  float* start = y - first * kGroup;
  switch (encoding) {
    case Encoding::kQ4: return kernels.add_columns_q4(columns, count, first, first + groups, start);
    case Encoding::kQ8: return kernels.add_columns_q8(columns, count, first, first + groups, start);
    case Encoding::kF16: return kernels.add_columns_f16(columns, count, first, first + groups, start);
    case Encoding::kF32: std::abort();
  }
}

void sum_columns(const Kernels& kernels, Encoding encoding, const TileColumns& columns, const uint16_t* factors,
                 size_t group, size_t tokens, float* y, size_t y_stride) {
  const auto sum = encoding == Encoding::kQ4 ? kernels.tiles->sum_columns_q4 : kernels.tiles->sum_columns_q8;
  sum(columns, factors, group, tokens, y, y_stride);
  for (size_t t = 0; t < tokens; t++) kernels.to_natural_order(encoding, y + t * y_stride, 1);
}

void add_columns(const Kernels& kernels, Encoding encoding, ColumnList list, size_t group, size_t tokens, float* y,
                 size_t y_stride) {
  list.columns.weights += weight_bytes(encoding, group * kGroup);
  list.columns.scales += scale_bytes(encoding, group * kGroup);
  switch (encoding) {
    case Encoding::kQ4: return kernels.add_columns_batch_q4(list, 0, 1, tokens, y, y_stride);
    case Encoding::kQ8: return kernels.add_columns_batch_q8(list, 0, 1, tokens, y, y_stride);
    case Encoding::kF16: return kernels.add_columns_batch_f16(list, 0, 1, tokens, y, y_stride);
    case Encoding::kF32: std::abort();
  }
}

}  // namespace pi2
