/**
 * Kernels for arm64 with dot products and half floats (ARMv8.2-A: phones since 2018).
 *
 * Half a 32-byte vector of q8 or q4 weights (FORMAT.md section 1) is a NEON register: its 32-bit lanes hold 4 bytes of each
 * of 4 blocks, the first half blocks 0..3, the second blocks 4..7. `vdotq_s32` adds 4 products to each lane.
 */
#include <arm_neon.h>

#include <cstring>

#include "native/kernels/half.h"
#include "native/kernels/kernels.h"

/** For small functions that take and return vectors. */
#define INLINE inline __attribute__((always_inline))

namespace pi2 {
namespace {

INLINE uint8x16_t load_bytes(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }

/** Eight halves; weights and scales need no alignment. */
INLINE float16x8_t load_halves(const void* from) { return vreinterpretq_f16_u8(load_bytes(from)); }

/** The sum of 4 lanes, always in the same order. */
INLINE float sum_lanes(float32x4_t v) {
  const float32x2_t pairs = vadd_f32(vget_low_f32(v), vget_high_f32(v));
  return vget_lane_f32(pairs, 0) + vget_lane_f32(pairs, 1);
}

// -- Quantization of activations --------------------------------------------------------------------------------------

/** One block, whose 32 values are x[0 .. 32). */
void quantize_block(const float* x, size_t block, QuantizedGroup* out) {
  float32x4_t v[8];
  uint32x4_t largest = vdupq_n_u32(0);
  for (size_t i = 0; i < 8; i++) {
    v[i] = vld1q_f32(x + 4 * i);
    // Magnitudes compare as integers, with infinities and NaNs greatest.
    largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(v[i])));
  }
  const uint32_t bits = vmaxvq_u32(largest);
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof magnitude);
  const bool finite = bits < 0x7f800000u;
  const float inverse = 127.0f / magnitude;
  const bool zero = !finite || inverse > 3.402823466e38f;
  const float scale = !finite ? __builtin_nanf("") : zero ? 0.0f : magnitude / 127.0f;

  int32x4_t sums = vdupq_n_s32(0);
  for (size_t i = 0; i < 8; i++) {
    const int32x4_t rounded = zero ? vdupq_n_s32(0) : vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse));
    sums = vaddq_s32(sums, rounded);
    const int16x4_t narrow = vmovn_s32(rounded);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(narrow, narrow));
    const uint32_t quad = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
    std::memcpy(out->values + 32 * i + 4 * block, &quad, sizeof quad);
  }
  out->q4_offset[block] = -8 * vaddvq_s32(sums);
  out->q4_offset[block + kGroupBlocks] = 0;
  out->scales[block] = scale;
  out->scales[block + kGroupBlocks] = scale;
}

void quantize(const float* x, size_t n, QuantizedGroup* out) {
  for (size_t begin = 0; begin < n; begin += kGroup, out++) {
    for (size_t b = 0; b < kGroupBlocks; b++) {
      const size_t block_begin = begin + b * kBlock;
      if (block_begin + kBlock <= n) {
        quantize_block(x + block_begin, b, out);
        continue;
      }
      float padded[kBlock] = {};
      if (block_begin < n) std::memcpy(padded, x + block_begin, (n - block_begin) * sizeof(float));
      quantize_block(padded, b, out);
    }
  }
}

// -- How matrix products are cut --------------------------------------------------------------------------------------

/** Rows at any address: row r has weights at weights[r] and scales `scales_offset` bytes further, or before if negative. */
struct RowList {
  const uint8_t* const* weights;
  ptrdiff_t scales_offset;
  /** Rows that follow those of a tile in this call. */
  size_t following;
};

/**
 * R rows times T tokens. Token t begins at x + t * x_stride. The operations of one row and token are the same in every tile
 * of an encoding, so that every cut gives the same bits.
 */
template <typename X>
using Tile = void (*)(RowList rows, size_t groups, const X* x, size_t x_stride, float* y, size_t y_stride);

/** The tiles of one encoding: for one token, and for `width` tokens. */
template <typename X>
struct Tiles {
  Tile<X> rows4, rows1;
  size_t width;
  Tile<X> rows2_wide, rows1_wide;
};

/** All rows of a list for one token. */
template <typename X>
void dot_list(const Tiles<X>& tiles, const uint8_t* const* rows, ptrdiff_t scales_offset, size_t row_count, size_t groups,
              const X* x, float* y) {
  for (size_t r = 0; r < row_count;) {
    const size_t left = row_count - r;
    const size_t step = left >= 4 ? 4 : 1;
    (step == 4 ? tiles.rows4 : tiles.rows1)({rows + r, scales_offset, left - step}, groups, x, 0, y + r, 0);
    r += step;
  }
}

/** A few rows stay in the second-level cache while the tokens pass; a few tokens in the first while these rows pass. */
template <typename X>
void matmul(const Tiles<X>& tiles, Rows rows, size_t row_count, size_t groups, const X* x, size_t x_stride, size_t tokens,
            float* y, size_t y_stride) {
  constexpr size_t rows_together = 16, rows_ahead = 4;
  const auto scales_offset =
      static_cast<ptrdiff_t>(reinterpret_cast<uintptr_t>(rows.scales) - reinterpret_cast<uintptr_t>(rows.weights));
  for (size_t begin = 0; begin < row_count; begin += rows_together) {
    const size_t left = row_count - begin;
    const size_t count = left < rows_together ? left : rows_together;
    const size_t listed = left < rows_together + rows_ahead ? left : rows_together + rows_ahead;
    const uint8_t* list[rows_together + rows_ahead];
    for (size_t r = 0; r < listed; r++) list[r] = rows.weights + (begin + r) * rows.stride;
    for (size_t t = 0; t < tokens;) {
      const bool wide = tokens - t >= tiles.width;
      for (size_t r = 0; r < count;) {
        const size_t step = wide ? (count - r >= 2 ? 2 : 1) : (count - r >= 4 ? 4 : 1);
        const Tile<X> tile =
            wide ? (step == 2 ? tiles.rows2_wide : tiles.rows1_wide) : (step == 4 ? tiles.rows4 : tiles.rows1);
        const size_t following = tokens == 1 ? listed - r - step : 0;
        tile({list + r, scales_offset, following}, groups, x + t * x_stride, x_stride, y + t * y_stride + begin + r,
             y_stride);
        r += step;
      }
      t += wide ? tiles.width : 1;
    }
  }
}

/** Fetches group g of the next R rows: rows are too short for the hardware to see where they lead. */
template <size_t R>
INLINE void prefetch_rows(RowList rows, size_t g, size_t group_bytes) {
  for (size_t r = R; r < 2 * R && r < R + rows.following; r++) {
    const uint8_t* weights = rows.weights[r] + g * group_bytes;
    for (size_t line = 0; line < group_bytes; line += 64) __builtin_prefetch(weights + line);
    if (group_bytes != kF16GroupBytes && g % 4 == 0) {
      __builtin_prefetch(rows.weights[r] + rows.scales_offset + g * kGroupScaleBytes);
    }
  }
}

// -- Dot products of int8 activations ---------------------------------------------------------------------------------

/** Adds a group's sums of blocks 4 h .. 4 h + 3, scaled, to a row's result. */
INLINE float32x4_t add_scaled(float32x4_t result, int32x4_t sums, float32x4_t row_scales, const float* x_scales) {
  return vfmaq_f32(result, vcvtq_f32_s32(sums), vmulq_f32(row_scales, vld1q_f32(x_scales)));
}

INLINE float32x4_t half_of_scales(const uint8_t* scales, size_t h) {
  const float16x8_t all = load_halves(scales);
  return h == 0 ? vcvt_f32_f16(vget_low_f16(all)) : vcvt_high_f32_f16(all);
}

/** Nibbles are multiplied as they are, 0..15; the sums begin at the offset that undoes it. */
template <size_t R, size_t T>
void tile_q4(RowList rows, size_t groups, const QuantizedGroup* x, size_t x_stride, float* y, size_t y_stride) {
  const uint8x16_t low_nibbles = vdupq_n_u8(15);
  float32x4_t result[R][T] = {};
  for (size_t g = 0; g < groups; g++) {
    prefetch_rows<R>(rows, g, kQ4GroupBytes);
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; h++) {
      int32x4_t sums[R][T];
      for (size_t r = 0; r < R; r++) {
        for (size_t t = 0; t < T; t++) sums[r][t] = vld1q_s32(x[t * x_stride + g].q4_offset + 4 * h);
      }
#pragma GCC unroll 2
      for (size_t i = 0; i < 4; i++) {
        // Vector i is half i % 2 of line i / 2; its low nibbles meet line 2 (i / 2) of the activations, its high ones the
        // next.
        const size_t at = 128 * (i / 2) + 32 * (i % 2) + 16 * h;
        int8x16_t low[R], high[R];
        for (size_t r = 0; r < R; r++) {
          const uint8x16_t w = load_bytes(rows.weights[r] + g * kQ4GroupBytes + 32 * i + 16 * h);
          low[r] = vreinterpretq_s8_u8(vandq_u8(w, low_nibbles));
          high[r] = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
        }
        for (size_t t = 0; t < T; t++) {
          const int8_t* values = x[t * x_stride + g].values + at;
          const int8x16_t x_low = vld1q_s8(values), x_high = vld1q_s8(values + 64);
          for (size_t r = 0; r < R; r++) sums[r][t] = vdotq_s32(vdotq_s32(sums[r][t], low[r], x_low), high[r], x_high);
        }
      }
      for (size_t r = 0; r < R; r++) {
        const float32x4_t scales = half_of_scales(rows.weights[r] + rows.scales_offset + g * kGroupScaleBytes, h);
        for (size_t t = 0; t < T; t++) {
          result[r][t] = add_scaled(result[r][t], sums[r][t], scales, x[t * x_stride + g].scales + 4 * h);
        }
      }
    }
  }
  for (size_t r = 0; r < R; r++) {
    for (size_t t = 0; t < T; t++) y[t * y_stride + r] = sum_lanes(result[r][t]);
  }
}

template <size_t R, size_t T>
void tile_q8(RowList rows, size_t groups, const QuantizedGroup* x, size_t x_stride, float* y, size_t y_stride) {
  float32x4_t result[R][T] = {};
  for (size_t g = 0; g < groups; g++) {
    prefetch_rows<R>(rows, g, kQ8GroupBytes);
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; h++) {
      int32x4_t sums[R][T] = {};
#pragma GCC unroll 4
      for (size_t i = 0; i < 8; i++) {
        int8x16_t w[R];
        for (size_t r = 0; r < R; r++) {
          w[r] = vreinterpretq_s8_u8(load_bytes(rows.weights[r] + g * kQ8GroupBytes + 32 * i + 16 * h));
        }
        for (size_t t = 0; t < T; t++) {
          const int8x16_t values = vld1q_s8(x[t * x_stride + g].values + 32 * i + 16 * h);
          for (size_t r = 0; r < R; r++) sums[r][t] = vdotq_s32(sums[r][t], w[r], values);
        }
      }
      for (size_t r = 0; r < R; r++) {
        const float32x4_t scales = half_of_scales(rows.weights[r] + rows.scales_offset + g * kGroupScaleBytes, h);
        for (size_t t = 0; t < T; t++) {
          result[r][t] = add_scaled(result[r][t], sums[r][t], scales, x[t * x_stride + g].scales + 4 * h);
        }
      }
    }
  }
  for (size_t r = 0; r < R; r++) {
    for (size_t t = 0; t < T; t++) y[t * y_stride + r] = sum_lanes(result[r][t]);
  }
}

constexpr Tiles<QuantizedGroup> kTilesQ4{tile_q4<4, 1>, tile_q4<1, 1>, 4, tile_q4<2, 4>, tile_q4<1, 4>};
constexpr Tiles<QuantizedGroup> kTilesQ8{tile_q8<4, 1>, tile_q8<1, 1>, 4, tile_q8<2, 4>, tile_q8<1, 4>};

void matmul_q4(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, size_t tokens, float* y,
               size_t y_stride) {
  matmul(kTilesQ4, rows, row_count, groups, x, groups, tokens, y, y_stride);
}

void matmul_q8(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, size_t tokens, float* y,
               size_t y_stride) {
  matmul(kTilesQ8, rows, row_count, groups, x, groups, tokens, y, y_stride);
}

void dot_q4(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y) {
  matmul_q4(rows, row_count, groups, x, 1, y, 0);
}

void dot_q8(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y) {
  matmul_q8(rows, row_count, groups, x, 1, y, 0);
}

void dot_list_q4(const uint8_t* const* rows, size_t scales_offset, size_t row_count, size_t groups, const QuantizedGroup* x,
                 float* y) {
  dot_list(kTilesQ4, rows, scales_offset, row_count, groups, x, y);
}

void dot_list_q8(const uint8_t* const* rows, size_t scales_offset, size_t row_count, size_t groups, const QuantizedGroup* x,
                 float* y) {
  dot_list(kTilesQ8, rows, scales_offset, row_count, groups, x, y);
}

// -- Dot products of float activations --------------------------------------------------------------------------------

/** Two partial sums for each (row, token), so that one row alone does not wait for each addition. */
template <size_t R, size_t T>
void tile_f16(RowList rows, size_t groups, const float* x, size_t x_stride, float* y, size_t y_stride) {
  float32x4_t result[R][T][2] = {};
  for (size_t i = 0; i < groups * kGroup; i += 8) {
    if (i % kGroup == 0) prefetch_rows<R>(rows, i / kGroup, kF16GroupBytes);
    for (size_t r = 0; r < R; r++) {
      const float16x8_t w = load_halves(rows.weights[r] + 2 * i);
      const float32x4_t low = vcvt_f32_f16(vget_low_f16(w)), high = vcvt_high_f32_f16(w);
      for (size_t t = 0; t < T; t++) {
        result[r][t][0] = vfmaq_f32(result[r][t][0], low, vld1q_f32(x + t * x_stride + i));
        result[r][t][1] = vfmaq_f32(result[r][t][1], high, vld1q_f32(x + t * x_stride + i + 4));
      }
    }
  }
  for (size_t r = 0; r < R; r++) {
    for (size_t t = 0; t < T; t++) y[t * y_stride + r] = sum_lanes(vaddq_f32(result[r][t][0], result[r][t][1]));
  }
}

constexpr Tiles<float> kTilesF16{tile_f16<4, 1>, tile_f16<1, 1>, 4, tile_f16<2, 4>, tile_f16<1, 4>};

void matmul_f16(Rows rows, size_t row_count, size_t groups, const float* x, size_t x_stride, size_t tokens, float* y,
                size_t y_stride) {
  matmul(kTilesF16, rows, row_count, groups, x, x_stride, tokens, y, y_stride);
}

void dot_f16(Rows rows, size_t row_count, size_t groups, const float* x, float* y) {
  matmul_f16(rows, row_count, groups, x, 0, 1, y, 0);
}

void dot_list_f16(const uint8_t* const* rows, size_t row_count, size_t groups, const float* x, float* y) {
  dot_list(kTilesF16, rows, 0, row_count, groups, x, y);
}

/** Row by row: these matrices (routers) are small. */
void dot_f32(const float* rows, size_t row_count, size_t n, const float* x, float* y) {
  for (size_t r = 0; r < row_count; r++) {
    const float* row = rows + r * n;
    float32x4_t result[4] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
      for (size_t k = 0; k < 4; k++) result[k] = vfmaq_f32(result[k], vld1q_f32(row + i + 4 * k), vld1q_f32(x + i + 4 * k));
    }
    float rest = 0;
    for (; i < n; i++) rest = __builtin_fmaf(row[i], x[i], rest);
    y[r] = sum_lanes(vaddq_f32(vaddq_f32(result[0], result[1]), vaddq_f32(result[2], result[3]))) + rest;
  }
}

// -- Sums of down columns ---------------------------------------------------------------------------------------------
//
// The 4 bytes of a 32-bit lane are neighbours in their block, so widening a register of bytes gives floats in natural order,
// 4 of each block. The unit of work is half a tile: 8 registers of outputs over a chunk of columns.

/** Columns summed before moving on to the next group: few enough for their next lines to be fetched ahead. */
constexpr size_t kChunk = 8;

/** The eight values factor * scale of a group's blocks. */
struct BlockFactors {
  float32x4_t half[2];
};

INLINE BlockFactors block_factors(const uint8_t* scales, size_t group, float factor) {
  const float16x8_t all = load_halves(scales + group * kGroupScaleBytes);
  return {{vmulq_n_f32(vcvt_f32_f16(vget_low_f16(all)), factor), vmulq_n_f32(vcvt_high_f32_f16(all), factor)}};
}

/** out[b] = q - 8 for 4 nibbles q of block b: half floats of these integers need only their upper byte, from a table. */
INLINE void unpack_nibbles(uint8x16_t nibbles, float32x4_t (&out)[4]) {
  const uint8_t halves[16] = {0xc8, 0xc7, 0xc6, 0xc5, 0xc4, 0xc2, 0xc0, 0xbc,
                              0x00, 0x3c, 0x40, 0x42, 0x44, 0x45, 0x46, 0x47};
  const uint8x16_t upper = vqtbl1q_u8(vld1q_u8(halves), nibbles);
  const float16x8_t first = vreinterpretq_f16_u8(vzip1q_u8(vdupq_n_u8(0), upper));
  const float16x8_t second = vreinterpretq_f16_u8(vzip2q_u8(vdupq_n_u8(0), upper));
  out[0] = vcvt_f32_f16(vget_low_f16(first));
  out[1] = vcvt_high_f32_f16(first);
  out[2] = vcvt_f32_f16(vget_low_f16(second));
  out[3] = vcvt_high_f32_f16(second);
}

INLINE void unpack_bytes(uint8x16_t bytes, float32x4_t (&out)[4]) {
  const int8x16_t values = vreinterpretq_s8_u8(bytes);
  const int16x8_t first = vmovl_s8(vget_low_s8(values)), second = vmovl_high_s8(values);
  out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(first)));
  out[1] = vcvtq_f32_s32(vmovl_high_s16(first));
  out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(second)));
  out[3] = vcvtq_f32_s32(vmovl_high_s16(second));
}

/** A tile's weights of blocks 4 h .. 4 h + 3: out[0] and out[1] are the first and second 4 elements of each block. */
template <bool q4>
INLINE void unpack_tile(const uint8_t* group, size_t tile, size_t h, float32x4_t (&out)[2][4]) {
  if (q4) {
    const uint8x16_t w = load_bytes(group + 32 * tile + 16 * h);
    unpack_nibbles(vandq_u8(w, vdupq_n_u8(15)), out[0]);
    unpack_nibbles(vshrq_n_u8(w, 4), out[1]);
  } else {
    const uint8_t* bytes = group + 64 * tile + 16 * h;
    unpack_bytes(load_bytes(bytes), out[0]);
    unpack_bytes(load_bytes(bytes + 32), out[1]);
  }
}

/** Element of a block where part `part` of tile `tile` (0..3) begins. */
template <bool q4>
INLINE size_t part_element(size_t tile, size_t part) {
  return q4 ? 16 * (tile / 2) + 4 * (tile % 2) + 8 * part : 8 * tile + 4 * part;
}

/** acc[b] += weights[b] * factors[b]. */
INLINE void add_weights(float32x4_t (&acc)[4], const float32x4_t (&weights)[4], float32x4_t factors) {
  acc[0] = vfmaq_laneq_f32(acc[0], weights[0], factors, 0);
  acc[1] = vfmaq_laneq_f32(acc[1], weights[1], factors, 1);
  acc[2] = vfmaq_laneq_f32(acc[2], weights[2], factors, 2);
  acc[3] = vfmaq_laneq_f32(acc[3], weights[3], factors, 3);
}

/** Outputs of 4 blocks that a tile's half adds to; `block` is the first output of the first of them. */
template <bool q4>
INLINE void load_outputs(const float* block, size_t tile, float32x4_t (&acc)[2][4]) {
  for (size_t part = 0; part < 2; part++) {
    for (size_t b = 0; b < 4; b++) acc[part][b] = vld1q_f32(block + b * kBlock + part_element<q4>(tile, part));
  }
}

template <bool q4>
INLINE void store_outputs(const float32x4_t (&acc)[2][4], size_t tile, float* block) {
  for (size_t part = 0; part < 2; part++) {
    for (size_t b = 0; b < 4; b++) vst1q_f32(block + b * kBlock + part_element<q4>(tile, part), acc[part][b]);
  }
}

/**
 * Fetches what a pass over `chunk` needs `groups_ahead` groups after group g: further groups of its columns or, behind the
 * last, groups of the columns that follow. `left` columns are left, with those of the chunk.
 */
INLINE void prefetch_columns(const Column* chunk, size_t left, size_t group_begin, size_t group_end, size_t g,
                             size_t group_bytes) {
  constexpr size_t groups_ahead = 8;
  const size_t span = group_end - group_begin;
  const size_t position = g - group_begin + groups_ahead;
  const size_t first = position / span * kChunk;
  const size_t ahead = group_begin + position % span;
  for (size_t c = first; c < first + kChunk && c < left; c++) {
    for (size_t line = 0; line < group_bytes; line += 64) __builtin_prefetch(chunk[c].weights + ahead * group_bytes + line);
    if (ahead % 4 == 0 || ahead == group_begin) __builtin_prefetch(chunk[c].scales + ahead * kGroupScaleBytes);
  }
}

template <bool q4>
void add_columns(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  constexpr size_t group_bytes = q4 ? kQ4GroupBytes : kQ8GroupBytes;
  for (size_t begin = 0; begin < count; begin += kChunk) {
    const Column* chunk = columns + begin;
    const size_t chunk_count = count - begin < kChunk ? count - begin : kChunk;
    for (size_t g = group_begin; g < group_end; g++) {
      prefetch_columns(chunk, count - begin, group_begin, group_end, g, group_bytes);
      BlockFactors factors[kChunk];
      for (size_t c = 0; c < chunk_count; c++) factors[c] = block_factors(chunk[c].scales, g, chunk[c].factor);
      for (size_t tile = 0; tile < 4; tile++) {
        for (size_t h = 0; h < 2; h++) {
          float* block = y + g * kGroup + 4 * h * kBlock;
          float32x4_t acc[2][4];
          load_outputs<q4>(block, tile, acc);
          for (size_t c = 0; c < chunk_count; c++) {
            float32x4_t weights[2][4];
            unpack_tile<q4>(chunk[c].weights + g * group_bytes, tile, h, weights);
            add_weights(acc[0], weights[0], factors[c].half[h]);
            add_weights(acc[1], weights[1], factors[c].half[h]);
          }
          store_outputs<q4>(acc, tile, block);
        }
      }
    }
  }
}

void add_columns_q4(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  add_columns<true>(columns, count, group_begin, group_end, y);
}

void add_columns_q8(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  add_columns<false>(columns, count, group_begin, group_end, y);
}

void add_columns_f16(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  for (size_t begin = 0; begin < count; begin += kChunk) {
    const size_t end = count - begin < kChunk ? count : begin + kChunk;
    for (size_t i = group_begin * kGroup; i < group_end * kGroup; i += 64) {
      float32x4_t acc[16];
      for (size_t k = 0; k < 16; k++) acc[k] = vld1q_f32(y + i + 4 * k);
      for (size_t c = begin; c < end; c++) {
        const float factor = columns[c].factor;
        __builtin_prefetch(columns[c].weights + 2 * i + 512);
        __builtin_prefetch(columns[c].weights + 2 * i + 576);
#pragma GCC unroll 8
        for (size_t k = 0; k < 8; k++) {
          const float16x8_t w = load_halves(columns[c].weights + 2 * (i + 8 * k));
          acc[2 * k] = vfmaq_n_f32(acc[2 * k], vcvt_f32_f16(vget_low_f16(w)), factor);
          acc[2 * k + 1] = vfmaq_n_f32(acc[2 * k + 1], vcvt_high_f32_f16(w), factor);
        }
      }
      for (size_t k = 0; k < 16; k++) vst1q_f32(y + i + 4 * k, acc[k]);
    }
  }
}

// -- Sums of down columns for several tokens --------------------------------------------------------------------------

enum class Weights { kF16, kQ8, kQ4 };

/** A group of a column, unpacked to floats in natural order. */
template <Weights encoding>
void unpack_group(const uint8_t* column, size_t g, float* out) {
  constexpr bool q4 = encoding == Weights::kQ4;
  if (encoding == Weights::kF16) {
    for (size_t k = 0; k < 32; k++) {
      const float16x8_t w = load_halves(column + g * kF16GroupBytes + 16 * k);
      vst1q_f32(out + 8 * k, vcvt_f32_f16(vget_low_f16(w)));
      vst1q_f32(out + 8 * k + 4, vcvt_high_f32_f16(w));
    }
    return;
  }
  const uint8_t* group = column + g * (q4 ? kQ4GroupBytes : kQ8GroupBytes);
  for (size_t tile = 0; tile < 4; tile++) {
    for (size_t h = 0; h < 2; h++) {
      float32x4_t weights[2][4];
      unpack_tile<q4>(group, tile, h, weights);
      store_outputs<q4>(weights, tile, out + 4 * h * kBlock);
    }
  }
}

/** A column that a token uses: its unpacked group, and its factor for each block. */
struct Member {
  const float* weights;
  alignas(16) float factors[kGroupBlocks];
};

template <Weights encoding>
INLINE void set_factors(const uint8_t* scales, size_t g, float factor, Member* out) {
  BlockFactors factors{{vdupq_n_f32(factor), vdupq_n_f32(factor)}};
  if (encoding != Weights::kF16) factors = block_factors(scales, g, factor);
  vst1q_f32(out->factors, factors.half[0]);
  vst1q_f32(out->factors + 4, factors.half[1]);
}

/** Adds members to one token's 256 outputs, block by block. */
void add_members(const Member* members, size_t member_count, float* y) {
  for (size_t b = 0; b < kGroupBlocks; b++) {
    float32x4_t acc[8];
    for (size_t k = 0; k < 8; k++) acc[k] = vld1q_f32(y + b * kBlock + 4 * k);
    for (size_t m = 0; m < member_count; m++) {
      const float* weights = members[m].weights + b * kBlock;
      const float factor = members[m].factors[b];
#pragma GCC unroll 8
      for (size_t k = 0; k < 8; k++) acc[k] = vfmaq_n_f32(acc[k], vld1q_f32(weights + 4 * k), factor);
    }
    for (size_t k = 0; k < 8; k++) vst1q_f32(y + b * kBlock + 4 * k, acc[k]);
  }
}

/** Each chunk of columns is unpacked once for all tokens, then added to every token that uses it. */
template <Weights encoding>
void add_columns_batch(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                       size_t y_stride) {
  alignas(64) float unpacked[kChunk][kGroup];
  size_t chunk[kChunk];
  Member members[kChunk];
  for (size_t g = group_begin; g < group_end; g++) {
    for (size_t next = 0; next < list.count;) {
      size_t chunk_count = 0;
      for (; next < list.count && chunk_count < kChunk; next++) {
        const size_t neuron = list.neurons[next];
        bool used = false;
        for (size_t t = 0; t < tokens; t++) used |= list.factors[neuron * list.factor_stride + t] != 0;
        if (!used) continue;
        unpack_group<encoding>(list.columns.weights + neuron * list.columns.stride, g, unpacked[chunk_count]);
        chunk[chunk_count++] = neuron;
      }
      for (size_t t = 0; t < tokens; t++) {
        size_t member_count = 0;
        for (size_t c = 0; c < chunk_count; c++) {
          const float factor = list.factors[chunk[c] * list.factor_stride + t];
          members[member_count].weights = unpacked[c];
          set_factors<encoding>(list.columns.scales + chunk[c] * list.columns.stride, g, factor, members + member_count);
          member_count += factor != 0;
        }
        add_members(members, member_count, y + t * y_stride + g * kGroup);
      }
    }
  }
}

/** Sums are kept in natural order here. */
void to_natural_order(Encoding, float*, size_t) {}

// -- Attention and conversions ----------------------------------------------------------------------------------------

void attention_scores(const float* q, const uint16_t* keys, size_t stride, size_t n, size_t count, float scale,
                      float* scores) {
  for (size_t p = 0; p < count; p++) {
    const uint16_t* key = keys + p * stride;
    float32x4_t sum[4] = {};
    for (size_t i = 0; i < n; i += 16) {
      const float16x8_t first = load_halves(key + i), second = load_halves(key + i + 8);
      sum[0] = vfmaq_f32(sum[0], vcvt_f32_f16(vget_low_f16(first)), vld1q_f32(q + i));
      sum[1] = vfmaq_f32(sum[1], vcvt_high_f32_f16(first), vld1q_f32(q + i + 4));
      sum[2] = vfmaq_f32(sum[2], vcvt_f32_f16(vget_low_f16(second)), vld1q_f32(q + i + 8));
      sum[3] = vfmaq_f32(sum[3], vcvt_high_f32_f16(second), vld1q_f32(q + i + 12));
    }
    scores[p] = scale * sum_lanes(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
  }
}

/** 8 N outputs, in registers over all positions. */
template <size_t N>
void mix_tile(const float* weights, const uint16_t* values, size_t stride, size_t count, float* out) {
  float32x4_t acc[2 * N];
  for (size_t k = 0; k < 2 * N; k++) acc[k] = vld1q_f32(out + 4 * k);
  for (size_t p = 0; p < count; p++) {
    for (size_t k = 0; k < N; k++) {
      const float16x8_t v = load_halves(values + p * stride + 8 * k);
      acc[2 * k] = vfmaq_n_f32(acc[2 * k], vcvt_f32_f16(vget_low_f16(v)), weights[p]);
      acc[2 * k + 1] = vfmaq_n_f32(acc[2 * k + 1], vcvt_high_f32_f16(v), weights[p]);
    }
  }
  for (size_t k = 0; k < 2 * N; k++) vst1q_f32(out + 4 * k, acc[k]);
}

void attention_mix(const float* weights, const uint16_t* values, size_t stride, size_t n, size_t count, float* out) {
  size_t i = 0;
  for (; i + 64 <= n; i += 64) mix_tile<8>(weights, values + i, stride, count, out + i);
  for (; i < n; i += 16) mix_tile<2>(weights, values + i, stride, count, out + i);
}

void float_to_half(const float* in, size_t n, uint16_t* out) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(vld1q_f32(in + i)), vld1q_f32(in + i + 4));
    vst1q_u16(out + i, vreinterpretq_u16_f16(halves));
  }
  for (; i < n; i++) out[i] = float_to_half_scalar(in[i]);
}

constexpr Kernels kTable{
    .name = "neon",
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
    .add_columns_batch_q4 = add_columns_batch<Weights::kQ4>,
    .add_columns_batch_q8 = add_columns_batch<Weights::kQ8>,
    .add_columns_batch_f16 = add_columns_batch<Weights::kF16>,
    .to_natural_order = to_natural_order,
    .attention_scores = attention_scores,
    .attention_mix = attention_mix,
    .float_to_half = float_to_half,
};

}  // namespace

const Kernels& neon_kernels() { return kTable; }

}  // namespace pi2
