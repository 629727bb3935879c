/**
 * The reference kernels: plain loops that read like docs/FORMAT.md section 1. Every other set is tested against this one,
 * and it runs where no other does.
 */
#include <cmath>
#include <cstring>

#include "native/kernels/half.h"
#include "native/kernels/kernels.h"

namespace pi2 {
namespace {

/** The scale of block `block` (0..7) of group `group`. */
float block_scale(const uint8_t* scales, size_t group, size_t block) {
  uint16_t half;
  std::memcpy(&half, scales + group * kGroupScaleBytes + 2 * block, sizeof half);
  return half_to_float_scalar(half);
}

float half_at(const uint8_t* weights, size_t index) {
  uint16_t half;
  std::memcpy(&half, weights + 2 * index, sizeof half);
  return half_to_float_scalar(half);
}

/** The unsigned nibble (0..15) of a weight in a q4 group. */
int nibble_of(const uint8_t* group, size_t block, size_t element) {
  const uint8_t byte = group[q4_byte(block, element)];
  return q4_is_high(element) ? byte >> 4 : byte & 15;
}

int signed_of(const uint8_t* group, size_t block, size_t element) {
  return static_cast<int8_t>(group[q8_byte(block, element)]);
}

// -- Quantization of activations --------------------------------------------------------------------------------------

/** One block of `count` (<= 32) activations; the rest of the block is zero. */
void quantize_block(const float* x, size_t count, size_t block, QuantizedGroup* out) {
  float largest = 0;
  bool finite = true;
  for (size_t e = 0; e < count; e++) {
    const float magnitude = std::fabs(x[e]);
    finite = finite && magnitude <= 3.402823466e38f;
    if (magnitude > largest) largest = magnitude;
  }
  const float inverse = 127.0f / largest;
  const bool zero = !finite || std::isinf(inverse);
  int32_t sum = 0;
  for (size_t e = 0; e < kBlock; e++) {
    const int value = zero || e >= count ? 0 : static_cast<int>(std::nearbyint(x[e] * inverse));
    out->values[q8_byte(block, e)] = static_cast<int8_t>(value);
    sum += value;
  }
  const float scale = !finite ? NAN : zero ? 0.0f : largest / 127.0f;
  out->q4_offset[block] = -8 * sum;
  out->q4_offset[block + kGroupBlocks] = 0;
  out->scales[block] = scale;
  out->scales[block + kGroupBlocks] = scale;
}

void quantize(const float* x, size_t n, QuantizedGroup* out) {
  const size_t groups = group_count(n);
  for (size_t g = 0; g < groups; g++) {
    for (size_t b = 0; b < kGroupBlocks; b++) {
      const size_t begin = g * kGroup + b * kBlock;
      const size_t left = begin < n ? n - begin : 0;
      quantize_block(x + (left ? begin : 0), left < kBlock ? left : kBlock, b, out + g);
    }
  }
}

// -- Dot products -----------------------------------------------------------------------------------------------------

float row_dot_q4(const uint8_t* weights, const uint8_t* scales, size_t groups, const QuantizedGroup* x) {
  float result = 0;
  for (size_t g = 0; g < groups; g++, weights += kQ4GroupBytes) {
    for (size_t b = 0; b < kGroupBlocks; b++) {
      int32_t sum = x[g].q4_offset[b];
      for (size_t e = 0; e < kBlock; e++) sum += nibble_of(weights, b, e) * x[g].values[q8_byte(b, e)];
      result += block_scale(scales, g, b) * x[g].scales[b] * static_cast<float>(sum);
    }
  }
  return result;
}

float row_dot_q8(const uint8_t* weights, const uint8_t* scales, size_t groups, const QuantizedGroup* x) {
  float result = 0;
  for (size_t g = 0; g < groups; g++, weights += kQ8GroupBytes) {
    for (size_t b = 0; b < kGroupBlocks; b++) {
      int32_t sum = 0;
      for (size_t e = 0; e < kBlock; e++) sum += signed_of(weights, b, e) * x[g].values[q8_byte(b, e)];
      result += block_scale(scales, g, b) * x[g].scales[b] * static_cast<float>(sum);
    }
  }
  return result;
}

float row_dot_f16(const uint8_t* weights, size_t groups, const float* x) {
  float result = 0;
  for (size_t i = 0; i < groups * kGroup; i++) result += half_at(weights, i) * x[i];
  return result;
}

void matmul_q4(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, size_t tokens, float* y,
               size_t y_stride) {
  for (size_t r = 0; r < row_count; r++) {
    for (size_t t = 0; t < tokens; t++) {
      y[t * y_stride + r] =
          row_dot_q4(rows.weights + r * rows.stride, rows.scales + r * rows.stride, groups, x + t * groups);
    }
  }
}

void matmul_q8(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, size_t tokens, float* y,
               size_t y_stride) {
  for (size_t r = 0; r < row_count; r++) {
    for (size_t t = 0; t < tokens; t++) {
      y[t * y_stride + r] =
          row_dot_q8(rows.weights + r * rows.stride, rows.scales + r * rows.stride, groups, x + t * groups);
    }
  }
}

void matmul_f16(Rows rows, size_t row_count, size_t groups, const float* x, size_t x_stride, size_t tokens, float* y,
                size_t y_stride) {
  for (size_t r = 0; r < row_count; r++) {
    for (size_t t = 0; t < tokens; t++) {
      y[t * y_stride + r] = row_dot_f16(rows.weights + r * rows.stride, groups, x + t * x_stride);
    }
  }
}

void dot_q4(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y) {
  matmul_q4(rows, row_count, groups, x, 1, y, 0);
}

void dot_q8(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y) {
  matmul_q8(rows, row_count, groups, x, 1, y, 0);
}

void dot_f16(Rows rows, size_t row_count, size_t groups, const float* x, float* y) {
  matmul_f16(rows, row_count, groups, x, 0, 1, y, 0);
}

void dot_f32(const float* rows, size_t row_count, size_t n, const float* x, float* y) {
  for (size_t r = 0; r < row_count; r++) {
    float result = 0;
    for (size_t i = 0; i < n; i++) result += rows[r * n + i] * x[i];
    y[r] = result;
  }
}

// -- Sums of down columns ---------------------------------------------------------------------------------------------

void add_column_q4(const Column& column, size_t group_begin, size_t group_end, float* y) {
  for (size_t g = group_begin; g < group_end; g++) {
    for (size_t b = 0; b < kGroupBlocks; b++) {
      const float factor = column.factor * block_scale(column.scales, g, b);
      const uint8_t* group = column.weights + g * kQ4GroupBytes;
      float* block_y = y + g * kGroup + b * kBlock;
      for (size_t e = 0; e < kBlock; e++) block_y[e] += factor * static_cast<float>(nibble_of(group, b, e) - 8);
    }
  }
}

void add_column_q8(const Column& column, size_t group_begin, size_t group_end, float* y) {
  for (size_t g = group_begin; g < group_end; g++) {
    for (size_t b = 0; b < kGroupBlocks; b++) {
      const float factor = column.factor * block_scale(column.scales, g, b);
      const uint8_t* group = column.weights + g * kQ8GroupBytes;
      float* block_y = y + g * kGroup + b * kBlock;
      for (size_t e = 0; e < kBlock; e++) block_y[e] += factor * static_cast<float>(signed_of(group, b, e));
    }
  }
}

void add_column_f16(const Column& column, size_t group_begin, size_t group_end, float* y) {
  for (size_t i = group_begin * kGroup; i < group_end * kGroup; i++) y[i] += column.factor * half_at(column.weights, i);
}

using AddColumn = void (*)(const Column& column, size_t group_begin, size_t group_end, float* y);

void add_batch(AddColumn add_column, const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
               size_t y_stride) {
  for (size_t c = 0; c < list.count; c++) {
    const size_t neuron = list.neurons[c];
    for (size_t t = 0; t < tokens; t++) {
      const float factor = list.factors[neuron * list.factor_stride + t];
      if (factor == 0) continue;
      const size_t place = neuron * list.columns.stride;
      add_column({list.columns.weights + place, list.columns.scales + place, factor}, group_begin, group_end,
                 y + t * y_stride);
    }
  }
}

void add_columns_q4(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  for (size_t c = 0; c < count; c++) add_column_q4(columns[c], group_begin, group_end, y);
}

void add_columns_q8(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  for (size_t c = 0; c < count; c++) add_column_q8(columns[c], group_begin, group_end, y);
}

void add_columns_f16(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  for (size_t c = 0; c < count; c++) add_column_f16(columns[c], group_begin, group_end, y);
}

void add_columns_batch_q4(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                          size_t y_stride) {
  add_batch(add_column_q4, list, group_begin, group_end, tokens, y, y_stride);
}

void add_columns_batch_q8(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                          size_t y_stride) {
  add_batch(add_column_q8, list, group_begin, group_end, tokens, y, y_stride);
}

void add_columns_batch_f16(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                           size_t y_stride) {
  add_batch(add_column_f16, list, group_begin, group_end, tokens, y, y_stride);
}

/** Sums are kept in natural order here. */
void to_natural_order(Encoding, float*, size_t) {}

// -- Attention and conversions ----------------------------------------------------------------------------------------

void attention_scores(const float* q, const uint16_t* keys, size_t stride, size_t n, size_t count, float scale,
                      float* scores) {
  for (size_t p = 0; p < count; p++) {
    float sum = 0;
    for (size_t i = 0; i < n; i++) sum += q[i] * half_to_float_scalar(keys[p * stride + i]);
    scores[p] = scale * sum;
  }
}

void attention_mix(const float* weights, const uint16_t* values, size_t stride, size_t n, size_t count, float* out) {
  for (size_t p = 0; p < count; p++) {
    for (size_t i = 0; i < n; i++) out[i] += weights[p] * half_to_float_scalar(values[p * stride + i]);
  }
}

void float_to_half(const float* in, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; i++) out[i] = float_to_half_scalar(in[i]);
}

void dot_list_q4(const uint8_t* const* rows, size_t scales_offset, size_t row_count, size_t groups, const QuantizedGroup* x,
                 float* y) {
  for (size_t r = 0; r < row_count; r++) dot_q4({rows[r], rows[r] + scales_offset, 0}, 1, groups, x, y + r);
}

void dot_list_q8(const uint8_t* const* rows, size_t scales_offset, size_t row_count, size_t groups, const QuantizedGroup* x,
                 float* y) {
  for (size_t r = 0; r < row_count; r++) dot_q8({rows[r], rows[r] + scales_offset, 0}, 1, groups, x, y + r);
}

void dot_list_f16(const uint8_t* const* rows, size_t row_count, size_t groups, const float* x, float* y) {
  for (size_t r = 0; r < row_count; r++) dot_f16({rows[r], nullptr, 0}, 1, groups, x, y + r);
}

constexpr Kernels kTable{
    .name = "scalar",
    .quantize = quantize,
    .dot_q4 = dot_q4,
    .dot_q8 = dot_q8,
    .dot_f16 = dot_f16,
    .dot_list_q4 = dot_list_q4,
    .dot_list_q8 = dot_list_q8,
    .dot_list_f16 = dot_list_f16,
    .dot_f32 = dot_f32,
    .matmul_q4 = matmul_q4,
    .matmul_q8 = matmul_q8,
    .matmul_f16 = matmul_f16,
    .add_columns_q4 = add_columns_q4,
    .add_columns_q8 = add_columns_q8,
    .add_columns_f16 = add_columns_f16,
    .add_columns_batch_q4 = add_columns_batch_q4,
    .add_columns_batch_q8 = add_columns_batch_q8,
    .add_columns_batch_f16 = add_columns_batch_f16,
    .to_natural_order = to_natural_order,
    .attention_scores = attention_scores,
    .attention_mix = attention_mix,
    .float_to_half = float_to_half,
};

}  // namespace

const Kernels& scalar_kernels() { return kTable; }

}  // namespace pi2
