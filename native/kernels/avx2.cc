/**
 * Kernels for x86-64 with AVX2, FMA and F16C.
 *
 * A 32-byte vector of q8 or q4 weights is half a line of FORMAT.md section 1: its 32-bit lane b holds 4 bytes of block b, so
 * a vector of 8 block sums or of 8 block scales lines up with it. Everything here has internal linkage; no header with
 * inline functions of its own is included besides half.h, whose functions are static.
 */
#include <immintrin.h>

#include <cstring>

#include "native/kernels/half.h"
#include "native/kernels/kernels.h"

/** For small functions that take and return vectors: a call would pass those through memory. */
#define INLINE inline __attribute__((always_inline))

namespace pi2 {
namespace {

INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

INLINE __m256 load_halves(const void* from) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))); }

/** The sum of 8 lanes, always in the same order. */
INLINE float sum_lanes(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
  return _mm_cvtss_f32(sum);
}

// -- Quantization of activations --------------------------------------------------------------------------------------

/** One block, whose 32 values are x[0 .. 32). */
void quantize_block(const float* x, size_t block, QuantizedGroup* out) {
  const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  __m256 v[4];
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    // Magnitudes compare as integers, with infinities and NaNs greatest.
    largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude_mask));
  }
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  const float magnitude = _mm_cvtss_f32(_mm_castsi128_ps(half));
  const bool finite = _mm_cvtsi128_si32(half) < 0x7f800000;
  const float inverse = 127.0f / magnitude;
  const bool zero = !finite || inverse > 3.402823466e38f;
  const float scale = !finite ? __builtin_nanf("") : zero ? 0.0f : magnitude / 127.0f;

  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i rounded[4];
  for (int i = 0; i < 4; i++) {
    rounded[i] = zero ? _mm256_setzero_si256() : _mm256_cvtps_epi32(_mm256_mul_ps(v[i], factor));
  }
  const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(rounded[0], rounded[1]), _mm256_add_epi32(rounded[2], rounded[3]));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));

  // Both packs work within 128-bit halves: dwords of the result are elements 0, 8, 16, 24 and then 4, 12, 20, 28.
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
  alignas(32) int32_t quads[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(quads), bytes);
  for (size_t m = 0; m < 4; m++) {
    std::memcpy(out->values + 64 * m + 4 * block, &quads[m], 4);
    std::memcpy(out->values + 64 * m + 32 + 4 * block, &quads[m + 4], 4);
  }
  out->q4_offset[block] = -8 * _mm_cvtsi128_si32(sum);
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

/**
 * Rows r < R times tokens t < T, q4. A lane sums 8 products of pairs in 16 bits (each at most 2 x 15 x 127 = 3810) before it
 * widens.
 */
template <size_t R, size_t T>
void tile_q4(RowList rows, size_t groups, const QuantizedGroup* x, size_t x_stride, float* y, size_t y_stride) {
  const __m256i low_nibbles = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 result[R][T] = {};
  for (size_t g = 0; g < groups; g++) {
    __m256i sums[R][T];
    prefetch_rows<R>(rows, g, kQ4GroupBytes);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
      // Vector i is half i % 2 of line i / 2; its low nibbles meet line 2 (i / 2) of the activations, its high ones the
      // next.
      const size_t at = 128 * (i / 2) + 32 * (i % 2);
      for (size_t r = 0; r < R; r++) {
        const __m256i w = load_bytes(rows.weights[r] + g * kQ4GroupBytes + 32 * i);
        const __m256i low = _mm256_and_si256(w, low_nibbles);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), low_nibbles);
        for (size_t t = 0; t < T; t++) {
          const int8_t* values = x[t * x_stride + g].values + at;
          const __m256i pair = _mm256_add_epi16(_mm256_maddubs_epi16(low, load_bytes(values)),
                                                _mm256_maddubs_epi16(high, load_bytes(values + 64)));
          sums[r][t] = i == 0 ? pair : _mm256_add_epi16(sums[r][t], pair);
        }
      }
    }
    for (size_t r = 0; r < R; r++) {
      const __m256 scales = load_halves(rows.weights[r] + rows.scales_offset + g * kGroupScaleBytes);
      for (size_t t = 0; t < T; t++) {
        const QuantizedGroup& group = x[t * x_stride + g];
        const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(sums[r][t], ones), load_bytes(group.q4_offset));
        const __m256 scale = _mm256_mul_ps(scales, _mm256_load_ps(group.scales));
        result[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, result[r][t]);
      }
    }
  }
  for (size_t r = 0; r < R; r++) {
    for (size_t t = 0; t < T; t++) y[t * y_stride + r] = sum_lanes(result[r][t]);
  }
}

/** The same for q8: the product of magnitudes |w| with x that took the sign of w. Pairs are at most 2 x 127 x 127 = 32258.
 */
template <size_t R, size_t T>
void tile_q8(RowList rows, size_t groups, const QuantizedGroup* x, size_t x_stride, float* y, size_t y_stride) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 result[R][T] = {};
  for (size_t g = 0; g < groups; g++) {
    __m256i sums[R][T];
    prefetch_rows<R>(rows, g, kQ8GroupBytes);
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++) {
      for (size_t r = 0; r < R; r++) {
        const __m256i w = load_bytes(rows.weights[r] + g * kQ8GroupBytes + 32 * i);
        const __m256i magnitudes = _mm256_abs_epi8(w);
        for (size_t t = 0; t < T; t++) {
          const __m256i values = _mm256_sign_epi8(load_bytes(x[t * x_stride + g].values + 32 * i), w);
          const __m256i quad = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, values), ones);
          sums[r][t] = i == 0 ? quad : _mm256_add_epi32(sums[r][t], quad);
        }
      }
    }
    for (size_t r = 0; r < R; r++) {
      const __m256 scales = load_halves(rows.weights[r] + rows.scales_offset + g * kGroupScaleBytes);
      for (size_t t = 0; t < T; t++) {
        const __m256 scale = _mm256_mul_ps(scales, _mm256_load_ps(x[t * x_stride + g].scales));
        result[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][t]), scale, result[r][t]);
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
  __m256 result[R][T][2] = {};
  for (size_t i = 0; i < groups * kGroup; i += 16) {
    if (i % kGroup == 0) prefetch_rows<R>(rows, i / kGroup, kF16GroupBytes);
#pragma GCC unroll 2
    for (size_t part = 0; part < 2; part++) {
      const size_t at = i + 8 * part;
      for (size_t r = 0; r < R; r++) {
        const __m256 w = load_halves(rows.weights[r] + 2 * at);
        for (size_t t = 0; t < T; t++) {
          result[r][t][part] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + t * x_stride + at), result[r][t][part]);
        }
      }
    }
  }
  for (size_t r = 0; r < R; r++) {
    for (size_t t = 0; t < T; t++) y[t * y_stride + r] = sum_lanes(_mm256_add_ps(result[r][t][0], result[r][t][1]));
  }
}

constexpr Tiles<float> kTilesF16{tile_f16<4, 1>, tile_f16<1, 1>, 2, tile_f16<2, 2>, tile_f16<1, 2>};

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
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (size_t r = 0; r < row_count; r++) {
    const float* row = rows + r * n;
    __m256 result[4] = {};
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
      for (size_t k = 0; k < 4; k++) {
        result[k] = _mm256_fmadd_ps(_mm256_loadu_ps(row + i + 8 * k), _mm256_loadu_ps(x + i + 8 * k), result[k]);
      }
    }
    for (; i < n; i += 8) {
      const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n - i)), lanes);
      result[0] = _mm256_fmadd_ps(_mm256_maskload_ps(row + i, inside), _mm256_maskload_ps(x + i, inside), result[0]);
    }
    y[r] = sum_lanes(_mm256_add_ps(_mm256_add_ps(result[0], result[1]), _mm256_add_ps(result[2], result[3])));
  }
}

// -- Sums of down columns ---------------------------------------------------------------------------------------------
//
// The unit of work is a tile of 64 outputs of one group, in registers, over a chunk of columns. q4: one vector, 8 nibbles
// for each block; q8: two vectors, 4 bytes each. A weight becomes a float by moving its bits to the top of a 32-bit lane,
// which multiplies it by a power of two that the column's factor undoes.

/** Columns summed before moving on to the next group: few enough for their next lines to be fetched ahead. */
constexpr size_t kChunk = 8;

/** Transposes 8 x 8 floats. */
INLINE void transpose(__m256 (&v)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 4; i++) {
    pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    quads[4 * i] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0x44);
    quads[4 * i + 1] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0xee);
    quads[4 * i + 2] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0x44);
    quads[4 * i + 3] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

/** Element of a block where the first and the second 4 outputs of tile `tile` (0..3) begin. */
constexpr size_t first_element(bool q4, size_t tile) { return q4 ? 16 * (tile / 2) + 4 * (tile % 2) : 8 * tile; }
constexpr size_t second_element(bool q4, size_t tile) { return first_element(q4, tile) + (q4 ? 8 : 4); }

/** Loads a tile of a group's 256 outputs: acc[b] lane k is output k of block b. Weights come the other way round. */
template <bool q4>
INLINE void load_tile(const float* y, size_t tile, __m256 (&acc)[8]) {
  for (size_t b = 0; b < 8; b++) {
    const float* block = y + b * kBlock;
    acc[b] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(block + first_element(q4, tile))),
                                  _mm_loadu_ps(block + second_element(q4, tile)), 1);
  }
}

template <bool q4>
INLINE void store_tile(float* y, size_t tile, const __m256 (&acc)[8]) {
  for (size_t b = 0; b < 8; b++) {
    float* block = y + b * kBlock;
    _mm_storeu_ps(block + first_element(q4, tile), _mm256_castps256_ps128(acc[b]));
    _mm_storeu_ps(block + second_element(q4, tile), _mm256_extractf128_ps(acc[b], 1));
  }
}

/** Moves byte 0..3 of each 32-bit lane to the top, over zeros. */
INLINE __m256i byte_to_top(__m256i bytes, int byte) {
  if (byte == 0) return _mm256_slli_epi32(bytes, 24);
  if (byte == 3) return _mm256_and_si256(bytes, _mm256_set1_epi32(static_cast<int>(0xff000000u)));
  const int zeros = -128;
  const __m128i from = _mm_setr_epi8(zeros, zeros, zeros, byte, zeros, zeros, zeros, byte + 4, zeros, zeros, zeros, byte + 8,
                                     zeros, zeros, zeros, byte + 12);
  return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(from));
}

/** The bytes of a tile's weights: those of outputs 0..3 of each block and those of outputs 4..7. */
struct TileBytes {
  __m256i half[2];
};

/** For q4, signed nibbles in the high half of each byte. */
template <bool q4>
INLINE TileBytes load_weights(const uint8_t* group, size_t tile) {
  if (!q4) return {{load_bytes(group + 64 * tile), load_bytes(group + 64 * tile + 32)}};
  // Flipping the top bit of a nibble q makes it the two's complement of q - 8.
  const __m256i w = _mm256_xor_si256(load_bytes(group + 32 * tile), _mm256_set1_epi8(static_cast<char>(0x88)));
  const __m256i high_nibbles = _mm256_set1_epi8(static_cast<char>(0xf0));
  return {{_mm256_and_si256(_mm256_slli_epi32(w, 4), high_nibbles), _mm256_and_si256(w, high_nibbles)}};
}

/** Weight k (0..7) of each block as a float, times 2^28 (q4) or 2^24 (q8). */
INLINE __m256 unpack(const TileBytes& bytes, int k) { return _mm256_cvtepi32_ps(byte_to_top(bytes.half[k / 4], k % 4)); }

/** factor * scale of each block, times the power of two that `unpack` left. */
template <bool q4>
INLINE __m256 block_factors(const uint8_t* scales, size_t group, float factor) {
  const __m256 unpacked_unit = _mm256_set1_ps(q4 ? 0x1p-28f : 0x1p-24f);
  const __m256 scale = _mm256_mul_ps(load_halves(scales + group * kGroupScaleBytes), unpacked_unit);
  return _mm256_mul_ps(scale, _mm256_set1_ps(factor));
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

/** From the first chunk of columns to the last, y holds its tiles transposed. */
template <bool q4>
void add_columns(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  constexpr size_t group_bytes = q4 ? kQ4GroupBytes : kQ8GroupBytes;
  for (size_t begin = 0; begin < count; begin += kChunk) {
    const Column* chunk = columns + begin;
    const bool last = count - begin <= kChunk;
    const size_t chunk_count = last ? count - begin : kChunk;
    for (size_t g = group_begin; g < group_end; g++) {
      prefetch_columns(chunk, count - begin, group_begin, group_end, g, group_bytes);
      __m256 factors[kChunk];
      for (size_t c = 0; c < chunk_count; c++) factors[c] = block_factors<q4>(chunk[c].scales, g, chunk[c].factor);
      for (size_t tile = 0; tile < 4; tile++) {
        __m256 acc[8];
        load_tile<q4>(y + g * kGroup, tile, acc);
        if (begin == 0) transpose(acc);
        for (size_t c = 0; c < chunk_count; c++) {
          const TileBytes bytes = load_weights<q4>(chunk[c].weights + g * group_bytes, tile);
#pragma GCC unroll 8
          for (int k = 0; k < 8; k++) acc[k] = _mm256_fmadd_ps(unpack(bytes, k), factors[c], acc[k]);
        }
        if (last) transpose(acc);
        store_tile<q4>(y + g * kGroup, tile, acc);
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
      __m256 acc[8];
      for (size_t k = 0; k < 8; k++) acc[k] = _mm256_loadu_ps(y + i + 8 * k);
      for (size_t c = begin; c < end; c++) {
        const __m256 factor = _mm256_set1_ps(columns[c].factor);
        __builtin_prefetch(columns[c].weights + 2 * i + 512);
        __builtin_prefetch(columns[c].weights + 2 * i + 576);
        for (size_t k = 0; k < 8; k++) {
          acc[k] = _mm256_fmadd_ps(load_halves(columns[c].weights + 2 * (i + 8 * k)), factor, acc[k]);
        }
      }
      for (size_t k = 0; k < 8; k++) _mm256_storeu_ps(y + i + 8 * k, acc[k]);
    }
  }
}

// -- Sums of down columns for several tokens --------------------------------------------------------------------------

enum class Weights { kF16, kQ8, kQ4 };

/** Tokens whose outputs of a group are kept, in tile order, while the columns pass. */
constexpr size_t kBatchTokens = 16;

/** A group of a column, unpacked: 32 vectors in tile order (natural order for f16). */
struct UnpackedGroup {
  __m256 vectors[32];
};

template <Weights encoding>
void unpack_group(const uint8_t* column, size_t g, UnpackedGroup* out) {
  constexpr bool q4 = encoding == Weights::kQ4;
  if (encoding == Weights::kF16) {
    for (size_t k = 0; k < 32; k++) out->vectors[k] = load_halves(column + g * kF16GroupBytes + 16 * k);
    return;
  }
  const uint8_t* group = column + g * (q4 ? kQ4GroupBytes : kQ8GroupBytes);
  for (size_t tile = 0; tile < 4; tile++) {
    const TileBytes bytes = load_weights<q4>(group, tile);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) out->vectors[8 * tile + k] = unpack(bytes, k);
  }
}

template <Weights encoding>
void load_outputs(const float* y, UnpackedGroup* out) {
  for (size_t tile = 0; tile < 4; tile++) {
    __m256 acc[8];
    if (encoding == Weights::kF16) {
      for (size_t k = 0; k < 8; k++) acc[k] = _mm256_loadu_ps(y + 64 * tile + 8 * k);
    } else {
      load_tile<encoding == Weights::kQ4>(y, tile, acc);
      transpose(acc);
    }
    for (size_t k = 0; k < 8; k++) out->vectors[8 * tile + k] = acc[k];
  }
}

template <Weights encoding>
void store_outputs(const UnpackedGroup& from, float* y) {
  for (size_t tile = 0; tile < 4; tile++) {
    __m256 acc[8];
    for (size_t k = 0; k < 8; k++) acc[k] = from.vectors[8 * tile + k];
    if (encoding == Weights::kF16) {
      for (size_t k = 0; k < 8; k++) _mm256_storeu_ps(y + 64 * tile + 8 * k, acc[k]);
    } else {
      transpose(acc);
      store_tile<encoding == Weights::kQ4>(y, tile, acc);
    }
  }
}

template <Weights encoding>
__m256 column_factors(const uint8_t* scales, size_t g, float factor) {
  if (encoding == Weights::kF16) return _mm256_set1_ps(factor);
  return block_factors<encoding == Weights::kQ4>(scales, g, factor);
}

/** One group, at most kBatchTokens tokens: each chunk of columns is unpacked once and added to every token that uses it. */
template <Weights encoding>
void add_batch_group(const ColumnList& list, size_t g, const float* factors, size_t tokens, float* y, size_t y_stride) {
  UnpackedGroup outputs[kBatchTokens], unpacked[kChunk];
  size_t chunk[kChunk];
  for (size_t t = 0; t < tokens; t++) load_outputs<encoding>(y + t * y_stride + g * kGroup, outputs + t);
  for (size_t next = 0; next < list.count;) {
    size_t chunk_count = 0;
    for (; next < list.count && chunk_count < kChunk; next++) {
      const size_t neuron = list.neurons[next];
      bool used = false;
      for (size_t t = 0; t < tokens; t++) used |= factors[neuron * list.factor_stride + t] != 0;
      if (!used) continue;
      unpack_group<encoding>(list.columns.weights + neuron * list.columns.stride, g, unpacked + chunk_count);
      chunk[chunk_count++] = neuron;
    }
    for (size_t t = 0; t < tokens; t++) {
      __m256 factor[kChunk];
      size_t members[kChunk];
      size_t member_count = 0;
      for (size_t c = 0; c < chunk_count; c++) {
        const float f = factors[chunk[c] * list.factor_stride + t];
        factor[member_count] = column_factors<encoding>(list.columns.scales + chunk[c] * list.columns.stride, g, f);
        members[member_count] = c;
        member_count += f != 0;
      }
      for (size_t begin = 0; begin < 32; begin += 8) {
        __m256 acc[8];
        for (size_t k = 0; k < 8; k++) acc[k] = outputs[t].vectors[begin + k];
        for (size_t m = 0; m < member_count; m++) {
          const __m256* weights = unpacked[members[m]].vectors + begin;
          for (size_t k = 0; k < 8; k++) acc[k] = _mm256_fmadd_ps(weights[k], factor[m], acc[k]);
        }
        for (size_t k = 0; k < 8; k++) outputs[t].vectors[begin + k] = acc[k];
      }
    }
  }
  for (size_t t = 0; t < tokens; t++) store_outputs<encoding>(outputs[t], y + t * y_stride + g * kGroup);
}

template <Weights encoding>
void add_columns_batch(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                       size_t y_stride) {
  for (size_t g = group_begin; g < group_end; g++) {
    for (size_t t = 0; t < tokens; t += kBatchTokens) {
      const size_t here = tokens - t < kBatchTokens ? tokens - t : kBatchTokens;
      add_batch_group<encoding>(list, g, list.factors + t, here, y + t * y_stride, y_stride);
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
    __m256 sum[2] = {};
    for (size_t i = 0; i < n; i += 16) {
      sum[0] = _mm256_fmadd_ps(load_halves(key + i), _mm256_loadu_ps(q + i), sum[0]);
      sum[1] = _mm256_fmadd_ps(load_halves(key + i + 8), _mm256_loadu_ps(q + i + 8), sum[1]);
    }
    scores[p] = scale * sum_lanes(_mm256_add_ps(sum[0], sum[1]));
  }
}

/** N vectors of 8 outputs, in registers over all positions. */
template <size_t N>
void mix_tile(const float* weights, const uint16_t* values, size_t stride, size_t count, float* out) {
  __m256 acc[N];
  for (size_t k = 0; k < N; k++) acc[k] = _mm256_loadu_ps(out + 8 * k);
  for (size_t p = 0; p < count; p++) {
    const __m256 weight = _mm256_set1_ps(weights[p]);
    for (size_t k = 0; k < N; k++) acc[k] = _mm256_fmadd_ps(weight, load_halves(values + p * stride + 8 * k), acc[k]);
  }
  for (size_t k = 0; k < N; k++) _mm256_storeu_ps(out + 8 * k, acc[k]);
}

void attention_mix(const float* weights, const uint16_t* values, size_t stride, size_t n, size_t count, float* out) {
  size_t i = 0;
  for (; i + 64 <= n; i += 64) mix_tile<8>(weights, values + i, stride, count, out + i);
  for (; i < n; i += 16) mix_tile<2>(weights, values + i, stride, count, out + i);
}

void float_to_half(const float* in, size_t n, uint16_t* out) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
  for (; i < n; i++) out[i] = float_to_half_scalar(in[i]);
}

constexpr Kernels kTable{
    .name = "avx2",
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

const Kernels& avx2_kernels() { return kTable; }

}  // namespace pi2
