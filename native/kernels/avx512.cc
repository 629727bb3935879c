/**
 * Kernels for AVX-512 with VNNI. Why they look as they do: a decode step is bound by memory bandwidth only if a core keeps
 * up with about 25 GB/s of int4, so a row must cost little more than loading it.
 *
 *  - A 32-bit lane holds weights of one block, so `vpdpbusd` sums a block in its lane and one convert and one fused
 *    multiply-add a group apply 16 scale products at once.
 *  - Down columns: a nibble becomes a float by `vpermps` from a table of 16 (which looks only at the low 4 bits of a lane,
 * so a shift is all the unpacking there is), and the outputs of a group stay in 16 registers over a batch of columns.
 */
#include <immintrin.h>

#include <cstddef>
#include <cstring>

#include "native/kernels/half.h"
#include "native/kernels/kernels.h"

namespace pi2 {
namespace {

/** Columns summed into a tile of y before the next tile: few enough that the next batch's prefetched bytes stay in L2. */
constexpr size_t kColumnBatch = 16;
/** The columns that are prefetched for the next batch are read side by side, as so many runs. */
constexpr size_t kColumnStreams = 4;
/** A list of so many columns is summed in batches twice as large, read as twice the runs. */
constexpr size_t kLongList = 512;
/** Tokens of one matmul tile: two rows by four tokens leave room in 32 registers, and their activations stay in L1. */
constexpr size_t kTokenTile = 4;

inline __m512 load_scales(const uint8_t* scales) {
  return _mm512_cvtph_ps(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales))));
}

inline __m512i load_line(const void* bytes) { return _mm512_loadu_si512(bytes); }

// ---- rows times activations -------------------------------------------------------------------------------------------

/** The four lines of unsigned weights of a q4 group, in the order of the activations' lines. */
struct GroupWeights {
  __m512i line[4];
};

inline GroupWeights unpack_q4(const uint8_t* group) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i line0 = load_line(group);
  const __m512i line1 = load_line(group + 64);
  return {{_mm512_and_si512(line0, mask), _mm512_and_si512(_mm512_srli_epi16(line0, 4), mask), _mm512_and_si512(line1, mask),
           _mm512_and_si512(_mm512_srli_epi16(line1, 4), mask)}};
}

/** q8 weights plus 128: `vpdpbusd` wants its first operand unsigned. */
inline GroupWeights unpack_q8(const uint8_t* group) {
  const __m512i flip = _mm512_set1_epi8(-128);
  return {{_mm512_xor_si512(load_line(group), flip), _mm512_xor_si512(load_line(group + 64), flip),
           _mm512_xor_si512(load_line(group + 128), flip), _mm512_xor_si512(load_line(group + 192), flip)}};
}

/**
 * sum += scale products of the block sums of one group, for one row and one token. The activations' offset undoes weights
 * stored plus 8; shifted by kOffsetShift it undoes plus 128.
 */
template <int kOffsetShift>
inline __m512 add_group(const GroupWeights& w, __m512 w_scales, const GroupWeights& x, __m512i offset, __m512 x_scales,
                        __m512 sum) {
  __m512i blocks = _mm512_slli_epi32(offset, kOffsetShift);
  for (size_t line = 0; line < 4; line++) blocks = _mm512_dpbusd_epi32(blocks, w.line[line], x.line[line]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(blocks), _mm512_mul_ps(w_scales, x_scales), sum);
}

struct Q4 {
  static constexpr size_t kBytes = kQ4GroupBytes;
  static constexpr int kOffsetShift = 0;
  static GroupWeights unpack(const uint8_t* group) { return unpack_q4(group); }
};
struct Q8 {
  static constexpr size_t kBytes = kQ8GroupBytes;
  static constexpr int kOffsetShift = 4;  // -8 * 16 = -128
  static GroupWeights unpack(const uint8_t* group) { return unpack_q8(group); }
};

inline Rows rows_from(Rows rows, size_t first) {
  return {rows.weights + first * rows.stride, rows.scales == nullptr ? nullptr : rows.scales + first * rows.stride,
          rows.stride};
}

/**
 * Into L2. Not non-temporal, though weights are used once a token: Intel's cores bring such lines past L2 through the 16
 * fill buffers of L1, a quarter of what memory gives.
 *
 * Always inline, as whatever only prefetches: GCC drops calls of a function that has no effect it knows of.
 */
[[gnu::always_inline]] inline void prefetch_line(const uint8_t* address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
}

/**
 * Prefetches the lines of a vector, one share a call: as many of its bytes as a group has, weights and scales, 144 for q4.
 * They lie one behind another and are asked for in this order: a core's own prefetcher follows one stream a page.
 */
template <size_t kShareBytes>
[[gnu::always_inline]] inline void prefetch_share(const uint8_t* vector, size_t share) {
  const size_t first = (kShareBytes * share + 63) / 64 * 64;
  const size_t last = (kShareBytes * (share + 1) - 1) / 64 * 64;
  for (size_t i = 0; i < kShareBytes; i += 64) {
    if (i + 64 <= kShareBytes || first + i <= last) prefetch_line(vector + first + i);
  }
}

/** Prefetches the f16 rows that follow, group by group and row by row, as one sequential stream. */
class NextRows {
 public:
  NextRows(Rows rows, size_t groups) : rows_(rows), groups_(groups) {}

  inline void prefetch() {
    prefetch_share<kF16GroupBytes>(rows_.weights, group_);
    if (++group_ == groups_) {
      group_ = 0;
      rows_.weights += rows_.stride;
    }
  }

 private:
  Rows rows_;
  size_t groups_;
  size_t group_ = 0;
};

/** kRows rows by kTokens tokens; y[t * y_stride + r]. Each sum is accumulated group by group, whatever the tile's shape. */
template <class Format, size_t kRows, size_t kTokens>
inline void tile(Rows rows, size_t groups, const QuantizedGroup* x, float* y, size_t y_stride) {
  __m512 sums[kRows][kTokens];
  for (size_t r = 0; r < kRows; r++) {
    for (size_t t = 0; t < kTokens; t++) sums[r][t] = _mm512_setzero_ps();
  }
  for (size_t g = 0; g < groups; g++) {
    // All rows are unpacked first, so that each activation is loaded once.
    GroupWeights w[kRows];
    __m512 scales[kRows];
    for (size_t r = 0; r < kRows; r++) {
      w[r] = Format::unpack(rows.weights + r * rows.stride + g * Format::kBytes);
      scales[r] = load_scales(rows.scales + r * rows.stride + g * kGroupScaleBytes);
    }
    for (size_t t = 0; t < kTokens; t++) {
      const QuantizedGroup& group = x[t * groups + g];
      const GroupWeights values = {{load_line(group.values), load_line(group.values + 64), load_line(group.values + 128),
                                    load_line(group.values + 192)}};
      const __m512i offset = load_line(group.q4_offset);
      const __m512 x_scales = _mm512_load_ps(group.scales);
      for (size_t r = 0; r < kRows; r++) {
        sums[r][t] = add_group<Format::kOffsetShift>(w[r], scales[r], values, offset, x_scales, sums[r][t]);
      }
    }
  }
  for (size_t r = 0; r < kRows; r++) {
    for (size_t t = 0; t < kTokens; t++) y[t * y_stride + r] = _mm512_reduce_add_ps(sums[r][t]);
  }
}

/** Rows of a list that prefetching runs ahead of a product. */
constexpr size_t kRowsAhead = 3;

/** Where a row lies. */
struct Row {
  const uint8_t* weights;
  const uint8_t* scales;
};

/**
 * One row, one token; meanwhile the row `ahead` is prefetched. Rows of a list that are near each other go one after another:
 * several at a time share a page, and the core's own prefetcher follows one stream a page.
 */
template <class Format>
inline float row_product(Row row, const uint8_t* ahead, size_t groups, const QuantizedGroup* x) {
  __m512 sum = _mm512_setzero_ps();
  for (size_t g = 0; g < groups; g++) {
    prefetch_share<Format::kBytes + kGroupScaleBytes>(ahead, g);
    const GroupWeights values = {
        {load_line(x[g].values), load_line(x[g].values + 64), load_line(x[g].values + 128), load_line(x[g].values + 192)}};
    sum = add_group<Format::kOffsetShift>(Format::unpack(row.weights + g * Format::kBytes),
                                          load_scales(row.scales + g * kGroupScaleBytes), values, load_line(x[g].q4_offset),
                                          _mm512_load_ps(x[g].scales), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

template <class Format>
void dot_list(const uint8_t* const* rows, size_t scales_offset, size_t row_count, size_t groups, const QuantizedGroup* x,
              float* y) {
  for (size_t r = 0; r < row_count; r++) {
    const size_t ahead = r + kRowsAhead < row_count ? r + kRowsAhead : row_count - 1;
    y[r] = row_product<Format>({rows[r], rows[r] + scales_offset}, rows[ahead], groups, x);
  }
}

/** Rows of a matrix that are read side by side, far apart: a core's own prefetcher follows each, and has more under way. */
constexpr size_t kStreams = 4;
/** How far prefetching runs ahead in each, rounded to rows. */
constexpr size_t kBytesAhead = 3072;

/**
 * One row of each stream, one token, and prefetching of those `ahead` bytes further; streams are `apart` bytes apart.
 * y[s * y_step]. Each sum is that of row_product.
 */
template <class Format>
inline void row_of_streams(Row row, size_t apart, size_t ahead, size_t groups, const QuantizedGroup* x, float* y,
                           size_t y_step) {
  __m512 sums[kStreams];
  for (size_t s = 0; s < kStreams; s++) sums[s] = _mm512_setzero_ps();
  for (size_t g = 0; g < groups; g++) {
    const GroupWeights values = {
        {load_line(x[g].values), load_line(x[g].values + 64), load_line(x[g].values + 128), load_line(x[g].values + 192)}};
    const __m512i offset = load_line(x[g].q4_offset);
    const __m512 x_scales = _mm512_load_ps(x[g].scales);
    for (size_t s = 0; s < kStreams; s++) {
      const uint8_t* weights = row.weights + s * apart;
      const uint8_t* scales = row.scales + s * apart;
      prefetch_share<Format::kBytes + kGroupScaleBytes>(weights + ahead, g);
      sums[s] =
          add_group<Format::kOffsetShift>(Format::unpack(weights + g * Format::kBytes),
                                          load_scales(scales + g * kGroupScaleBytes), values, offset, x_scales, sums[s]);
    }
  }
  for (size_t s = 0; s < kStreams; s++) y[s * y_step] = _mm512_reduce_add_ps(sums[s]);
}

template <class Format>
void dot(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y) {
  const size_t length = row_count / kStreams;
  const size_t rows_ahead = kBytesAhead < rows.stride ? 1 : (kBytesAhead + rows.stride / 2) / rows.stride;
  const auto row = [&](size_t r) {
    const Rows at = rows_from(rows, r);
    return Row{at.weights, at.scales};
  };
  // Behind the last row of a stream begins the next, and behind that of the last stream, most often, the caller's next rows.
  for (size_t r = 0; r < length; r++) {
    row_of_streams<Format>(row(r), length * rows.stride, rows_ahead * rows.stride, groups, x, y + r, length);
  }
  for (size_t r = length * kStreams; r < row_count; r++) y[r] = row_product<Format>(row(r), row(r).weights, groups, x);
}

template <class Format, size_t kTokens>
inline void rows_of_tokens(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, float* y, size_t y_stride) {
  size_t r = 0;
  for (; r + 2 <= row_count; r += 2) tile<Format, 2, kTokens>(rows_from(rows, r), groups, x, y + r, y_stride);
  for (; r < row_count; r++) tile<Format, 1, kTokens>(rows_from(rows, r), groups, x, y + r, y_stride);
}

/** Tokens outside, rows inside: a tile's activations stay in L1 while the caller's few rows come from L2. */
template <class Format>
void matmul(Rows rows, size_t row_count, size_t groups, const QuantizedGroup* x, size_t tokens, float* y, size_t y_stride) {
  size_t t = 0;
  for (; t + kTokenTile <= tokens; t += kTokenTile) {
    rows_of_tokens<Format, kTokenTile>(rows, row_count, groups, x + t * groups, y + t * y_stride, y_stride);
  }
  for (; t + 2 <= tokens; t += 2) {
    rows_of_tokens<Format, 2>(rows, row_count, groups, x + t * groups, y + t * y_stride, y_stride);
  }
  for (; t < tokens; t++) rows_of_tokens<Format, 1>(rows, row_count, groups, x + t * groups, y + t * y_stride, y_stride);
}

inline __m512 load_halves(const void* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(halves)));
}

template <size_t kRows, size_t kTokens>
inline void tile_f16(Rows rows, size_t groups, const float* x, size_t x_stride, float* y, size_t y_stride) {
  __m512 sums[kRows][kTokens];
  for (size_t r = 0; r < kRows; r++) {
    for (size_t t = 0; t < kTokens; t++) sums[r][t] = _mm512_setzero_ps();
  }
  NextRows next(rows_from(rows, kRows), groups);
  for (size_t i = 0; i < groups * kGroup; i += 16) {
    // A row's group is 16 registers: kRows of them are prefetched while kRows groups are summed.
    if (kTokens == 1 && i % (kGroup / kRows) == 0) next.prefetch();
    for (size_t r = 0; r < kRows; r++) {
      const __m512 w = load_halves(rows.weights + r * rows.stride + 2 * i);
      for (size_t t = 0; t < kTokens; t++) {
        sums[r][t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + t * x_stride + i), sums[r][t]);
      }
    }
  }
  for (size_t r = 0; r < kRows; r++) {
    for (size_t t = 0; t < kTokens; t++) y[t * y_stride + r] = _mm512_reduce_add_ps(sums[r][t]);
  }
}

void matmul_f16(Rows rows, size_t row_count, size_t groups, const float* x, size_t x_stride, size_t tokens, float* y,
                size_t y_stride) {
  size_t r = 0;
  for (; r + 4 <= row_count; r += 4) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      tile_f16<4, 4>(rows_from(rows, r), groups, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
    }
    for (; t < tokens; t++) {
      tile_f16<4, 1>(rows_from(rows, r), groups, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
    }
  }
  for (; r < row_count; r++) {
    for (size_t t = 0; t < tokens; t++) {
      tile_f16<1, 1>(rows_from(rows, r), groups, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
    }
  }
}

void dot_f16(Rows rows, size_t row_count, size_t groups, const float* x, float* y) {
  matmul_f16(rows, row_count, groups, x, 0, 1, y, 0);
}

void dot_list_f16(const uint8_t* const* rows, size_t row_count, size_t groups, const float* x, float* y) {
  for (size_t r = 0; r < row_count; r++) tile_f16<1, 1>({rows[r], nullptr, 0}, groups, x, 0, y + r, 0);
}

inline __mmask16 tail_mask(size_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

void dot_f32(const float* rows, size_t row_count, size_t n, const float* x, float* y) {
  for (size_t r = 0; r < row_count; r++) {
    const float* row = rows + r * n;
    __m512 sum = _mm512_setzero_ps();
    size_t i = 0;
    for (; i + 16 <= n; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(row + i), _mm512_loadu_ps(x + i), sum);
    if (i < n) {
      const __mmask16 mask = tail_mask(n - i);
      sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, row + i), _mm512_maskz_loadu_ps(mask, x + i), sum);
    }
    y[r] = _mm512_reduce_add_ps(sum);
  }
}

// ---- activations ------------------------------------------------------------------------------------------------------

void quantize(const float* x, size_t n, QuantizedGroup* out) {
  for (size_t g = 0; g < group_count(n); g++) {
    QuantizedGroup& group = out[g];
    for (size_t block = 0; block < kGroupBlocks; block++) {
      const size_t first = g * kGroup + block * kBlock;
      const size_t count = first >= n ? 0 : (n - first < kBlock ? n - first : kBlock);
      const __mmask16 low = tail_mask(count < 16 ? count : 16);
      const __mmask16 high = tail_mask(count < 16 ? 0 : count - 16);
      const __m512 x0 = count > 0 ? _mm512_maskz_loadu_ps(low, x + first) : _mm512_setzero_ps();
      const __m512 x1 = count > 16 ? _mm512_maskz_loadu_ps(high, x + first + 16) : _mm512_setzero_ps();
      // Magnitudes compare as integers, with infinities and NaNs greatest.
      const __m512i bits0 = _mm512_castps_si512(_mm512_abs_ps(x0));
      const __m512i bits1 = _mm512_castps_si512(_mm512_abs_ps(x1));
      const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(bits0, bits1));
      float largest;
      std::memcpy(&largest, &bits, sizeof largest);
      const bool finite = bits < 0x7f800000;
      const float inverse = 127.0f / largest;
      const bool zero = !finite || inverse > 3.402823466e38f;
      const float scale = !finite ? __builtin_nanf("") : zero ? 0.0f : largest / 127.0f;
      const __mmask16 kept = zero ? 0 : 0xffff;
      const __m512i q0 = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(x0, _mm512_set1_ps(inverse)));
      const __m512i q1 = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(x1, _mm512_set1_ps(inverse)));
      alignas(32) int8_t values[kBlock];
      _mm_store_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtsepi32_epi8(q0));
      _mm_store_si128(reinterpret_cast<__m128i*>(values + 16), _mm512_cvtsepi32_epi8(q1));
      for (size_t e = 0; e < kBlock; e += 4) std::memcpy(group.values + q8_byte(block, e), values + e, 4);
      group.q4_offset[block] = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1));
      group.q4_offset[block + 8] = 0;
      group.scales[block] = scale;
      group.scales[block + 8] = scale;
    }
  }
}

// ---- down columns -----------------------------------------------------------------------------------------------------

/**
 * Lane order of a group's 256 outputs: register v = 8 p + t holds, in lane 8 s + b, the output that nibble t of a lane of
 * q4 line p gives; in natural order that is 32 b + 16 p + 8 (t % 2) + 4 s + t / 2.
 * For q8, register v = 4 m + j: 32 b + 8 m + 4 s + j.
 */
inline __m512i q4_outputs(size_t v) {
  alignas(64) int32_t index[16];
  for (size_t lane = 0; lane < 16; lane++) {
    const size_t b = lane % 8;
    const size_t s = lane / 8;
    const size_t p = v / 8;
    const size_t t = v % 8;
    index[lane] = static_cast<int32_t>(32 * b + 16 * p + 8 * (t % 2) + 4 * s + t / 2);
  }
  return _mm512_load_si512(index);
}
inline __m512i q8_outputs(size_t v) {
  alignas(64) int32_t index[16];
  for (size_t lane = 0; lane < 16; lane++) {
    index[lane] = static_cast<int32_t>(32 * (lane % 8) + 8 * (v / 4) + 4 * (lane / 8) + v % 4);
  }
  return _mm512_load_si512(index);
}

template <__m512i (*kOutputs)(size_t)>
void sort_outputs(float* y, size_t groups) {
  __m512i index[16];
  for (size_t v = 0; v < 16; v++) index[v] = kOutputs(v);
  for (size_t g = 0; g < groups; g++, y += kGroup) {
    __m512 lanes[16];
    for (size_t v = 0; v < 16; v++) lanes[v] = _mm512_loadu_ps(y + 16 * v);
    for (size_t v = 0; v < 16; v++) _mm512_i32scatter_ps(y, index[v], lanes[v], 4);
  }
}

inline __m512 q4_table() { return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }

/**
 * Prefetches the columns of the next batch, a share of one of them a call: DRAM gives random columns much faster in whole
 * runs than as 128-byte pieces of one column after another. Runs are read side by side, as a core's prefetcher follows each.
 * The sum is bound by instructions, so a call has few: what can be known of a share is worked out once for all runs.
 */
template <size_t kGroupBytes, size_t kScaleBytes>
class ColumnPrefetch {
 public:
  ColumnPrefetch(const Column* columns, size_t count, size_t streams, size_t group_begin, size_t group_end)
      : first_(columns),
        end_(columns + count),
        streams_(streams),
        run_((count + streams - 1) / streams),
        run_left_(run_),
        group_begin_(group_begin),
        groups_(group_end - group_begin),
        scales_(kScaleBytes == 0 || count == 0 ? 0 : columns->scales - columns->weights) {
    begin_share();
  }

  [[gnu::always_inline]] inline void next() {
    if (column_ < end_) {
      for (size_t i = 0; i + 1 < kLines; i++) prefetch_line(column_->weights + lines_[i]);
      if (line_count_ == kLines) prefetch_line(column_->weights + lines_[kLines - 1]);
    }
    column_ += run_;
    if (--turns_ == 0) next_share();
  }

 private:
  static constexpr size_t kShareBytes = kGroupBytes + kScaleBytes;
  /** A share begins anywhere in a line. */
  static constexpr size_t kLines = (kShareBytes + 63) / 64;

  [[gnu::noinline]] void next_share() {
    if (++share_ == groups_) {
      share_ = 0;
      first_++;
      if (--run_left_ == 0) end_ = first_;
    }
    begin_share();
  }

  /** As prefetch_share; but of some groups only, weights and scales are two runs. */
  void begin_share() {
    turns_ = streams_;
    column_ = first_;
    const size_t weight_bytes = groups_ * kGroupBytes;
    const size_t begin = (kShareBytes * share_ + 63) / 64 * 64;
    line_count_ = 0;
    for (size_t byte = begin; byte < kShareBytes * (share_ + 1); byte += 64) {
      const bool is_weights = byte < weight_bytes;
      const size_t offset =
          is_weights ? group_begin_ * kGroupBytes + byte : group_begin_ * kScaleBytes + byte - weight_bytes;
      lines_[line_count_++] = (is_weights ? 0 : scales_) + static_cast<ptrdiff_t>(offset);
    }
  }

  const Column* first_;   // of the first run
  const Column* column_;  // of the run whose turn it is
  const Column* end_;
  size_t streams_;
  size_t run_;  // columns of a run
  size_t run_left_;
  size_t group_begin_;
  size_t groups_;
  ptrdiff_t scales_;  // where scales are, from a column's weights: of the first column, for others a guess (a wrong one only
                      // costs time)
  size_t turns_;      // calls left of this share
  size_t share_ = 0;
  size_t line_count_;
  ptrdiff_t lines_[kLines];  // of this share, from a column's weights
};

/** Adds `count` columns' group to a tile of 256 outputs in lane order. */
inline void add_group_q4(const Column* columns, size_t count, ColumnPrefetch<kQ4GroupBytes, kGroupScaleBytes>& prefetch,
                         size_t group, float* y) {
  const __m512 table = q4_table();
  __m512 sums[16];
  for (size_t v = 0; v < 16; v++) sums[v] = _mm512_loadu_ps(y + 16 * v);
  for (size_t c = 0; c < count; c++) {
    prefetch.next();
    const uint8_t* weights = columns[c].weights + group * kQ4GroupBytes;
    const __m512 factor =
        _mm512_mul_ps(load_scales(columns[c].scales + group * kGroupScaleBytes), _mm512_set1_ps(columns[c].factor));
    const __m512i line0 = load_line(weights);
    const __m512i line1 = load_line(weights + 64);
#define PI2_NIBBLE(t)                                                                                          \
  sums[t] = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(line0, 4 * (t)), table), factor, sums[t]); \
  sums[8 + (t)] = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(line1, 4 * (t)), table), factor, sums[8 + (t)])
    PI2_NIBBLE(0);
    PI2_NIBBLE(1);
    PI2_NIBBLE(2);
    PI2_NIBBLE(3);
    PI2_NIBBLE(4);
    PI2_NIBBLE(5);
    PI2_NIBBLE(6);
    PI2_NIBBLE(7);
#undef PI2_NIBBLE
  }
  for (size_t v = 0; v < 16; v++) _mm512_storeu_ps(y + 16 * v, sums[v]);
}

/** Byte j of each lane, sign-extended, as float. */
template <int kByte>
inline __m512 signed_byte(__m512i line) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * kByte), 24));
}

inline void add_group_q8(const Column* columns, size_t count, ColumnPrefetch<kQ8GroupBytes, kGroupScaleBytes>& prefetch,
                         size_t group, float* y) {
  __m512 sums[16];
  for (size_t v = 0; v < 16; v++) sums[v] = _mm512_loadu_ps(y + 16 * v);
  for (size_t c = 0; c < count; c++) {
    prefetch.next();
    const uint8_t* weights = columns[c].weights + group * kQ8GroupBytes;
    const __m512 factor =
        _mm512_mul_ps(load_scales(columns[c].scales + group * kGroupScaleBytes), _mm512_set1_ps(columns[c].factor));
    for (size_t m = 0; m < 4; m++) {
      const __m512i line = load_line(weights + 64 * m);
      sums[4 * m] = _mm512_fmadd_ps(signed_byte<0>(line), factor, sums[4 * m]);
      sums[4 * m + 1] = _mm512_fmadd_ps(signed_byte<1>(line), factor, sums[4 * m + 1]);
      sums[4 * m + 2] = _mm512_fmadd_ps(signed_byte<2>(line), factor, sums[4 * m + 2]);
      sums[4 * m + 3] = _mm512_fmadd_ps(signed_byte<3>(line), factor, sums[4 * m + 3]);
    }
  }
  for (size_t v = 0; v < 16; v++) _mm512_storeu_ps(y + 16 * v, sums[v]);
}

inline void add_group_f16(const Column* columns, size_t count, ColumnPrefetch<kF16GroupBytes, 0>& prefetch, size_t group,
                          float* y) {
  __m512 sums[16];
  for (size_t v = 0; v < 16; v++) sums[v] = _mm512_loadu_ps(y + 16 * v);
  for (size_t c = 0; c < count; c++) {
    prefetch.next();
    const uint8_t* weights = columns[c].weights + group * kF16GroupBytes;
    const __m512 factor = _mm512_set1_ps(columns[c].factor);
    for (size_t v = 0; v < 16; v++) sums[v] = _mm512_fmadd_ps(load_halves(weights + 32 * v), factor, sums[v]);
  }
  for (size_t v = 0; v < 16; v++) _mm512_storeu_ps(y + 16 * v, sums[v]);
}

template <class Prefetch, void (*kAddGroup)(const Column*, size_t, Prefetch&, size_t, float*)>
void add_columns(const Column* columns, size_t count, size_t group_begin, size_t group_end, float* y) {
  const size_t widening = count < kLongList ? 1 : 2;
  const size_t most = widening * kColumnBatch;
  for (size_t c = 0; c < count; c += most) {
    const size_t batch = count - c < most ? count - c : most;
    const size_t left = count - c - batch;
    Prefetch prefetch(columns + c + batch, left < most ? left : most, widening * kColumnStreams, group_begin, group_end);
    for (size_t g = group_begin; g < group_end; g++) kAddGroup(columns + c, batch, prefetch, g, y + g * kGroup);
  }
}

// ---- down columns, several tokens -------------------------------------------------------------------------------------

/** Tokens whose outputs of a group (1 KB each) stay in L1 while the columns pass. */
constexpr size_t kMixTokens = 16;
/** Columns unpacked together, once for all those tokens. */
constexpr size_t kMixColumns = 8;

struct Q4Columns {
  static void unpack(const uint8_t* column, size_t group, __m512* out) {
    const __m512 table = q4_table();
    for (size_t p = 0; p < 2; p++) {
      __m512i line = load_line(column + group * kQ4GroupBytes + 64 * p);
      for (size_t t = 0; t < 8; t++, line = _mm512_srli_epi32(line, 4)) out[8 * p + t] = _mm512_permutexvar_ps(line, table);
    }
  }
  static __m512 scales(const uint8_t* scales, size_t group) { return load_scales(scales + group * kGroupScaleBytes); }
};
struct Q8Columns {
  static void unpack(const uint8_t* column, size_t group, __m512* out) {
    for (size_t m = 0; m < 4; m++) {
      const __m512i line = load_line(column + group * kQ8GroupBytes + 64 * m);
      out[4 * m] = signed_byte<0>(line);
      out[4 * m + 1] = signed_byte<1>(line);
      out[4 * m + 2] = signed_byte<2>(line);
      out[4 * m + 3] = signed_byte<3>(line);
    }
  }
  static __m512 scales(const uint8_t* scales, size_t group) { return load_scales(scales + group * kGroupScaleBytes); }
};
struct F16Columns {
  static void unpack(const uint8_t* column, size_t group, __m512* out) {
    for (size_t v = 0; v < 16; v++) out[v] = load_halves(column + group * kF16GroupBytes + 32 * v);
  }
  static __m512 scales(const uint8_t*, size_t) { return _mm512_set1_ps(1.0f); }
};

/** Columns of one group, unpacked: (column, register). */
struct UnpackedColumns {
  __m512 weights[kMixColumns][16];
  __m512 scales[kMixColumns];
  size_t neurons[kMixColumns];
  size_t count;
};

/** Adds to one token's 256 outputs the unpacked columns that it uses. */
inline void add_unpacked(const UnpackedColumns& columns, const float* factors, size_t factor_stride, float* y) {
  __m512 scaled[kMixColumns];
  size_t members[kMixColumns];
  size_t member_count = 0;
  for (size_t c = 0; c < columns.count; c++) {
    const float factor = factors[columns.neurons[c] * factor_stride];
    scaled[member_count] = _mm512_mul_ps(columns.scales[c], _mm512_set1_ps(factor));
    members[member_count] = c;
    member_count += factor != 0.0f;
  }
  if (member_count == 0) return;
  for (size_t first = 0; first < 16; first += 8) {
    __m512 sums[8];
    for (size_t v = 0; v < 8; v++) sums[v] = _mm512_loadu_ps(y + 16 * (first + v));
    for (size_t m = 0; m < member_count; m++) {
      const __m512* weights = columns.weights[members[m]] + first;
      for (size_t v = 0; v < 8; v++) sums[v] = _mm512_fmadd_ps(weights[v], scaled[m], sums[v]);
    }
    for (size_t v = 0; v < 8; v++) _mm512_storeu_ps(y + 16 * (first + v), sums[v]);
  }
}

template <class Format>
inline void mix_group(const ColumnList& list, size_t group, const float* factors, size_t tokens, float* y, size_t y_stride) {
  UnpackedColumns columns;
  const __mmask16 in_tile = tail_mask(tokens);
  for (size_t next = 0; next < list.count;) {
    columns.count = 0;
    for (; next < list.count && columns.count < kMixColumns; next++) {
      const size_t neuron = list.neurons[next];
      const __m512 uses = _mm512_maskz_loadu_ps(in_tile, factors + neuron * list.factor_stride);
      if (_mm512_cmp_ps_mask(uses, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0) continue;
      Format::unpack(list.columns.weights + neuron * list.columns.stride, group, columns.weights[columns.count]);
      columns.scales[columns.count] = Format::scales(list.columns.scales + neuron * list.columns.stride, group);
      columns.neurons[columns.count++] = neuron;
    }
    for (size_t t = 0; t < tokens; t++) add_unpacked(columns, factors + t, list.factor_stride, y + t * y_stride);
  }
}

template <class Format>
void add_columns_batch(const ColumnList& list, size_t group_begin, size_t group_end, size_t tokens, float* y,
                       size_t y_stride) {
  for (size_t g = group_begin; g < group_end; g++) {
    for (size_t t = 0; t < tokens; t += kMixTokens) {
      const size_t here = tokens - t < kMixTokens ? tokens - t : kMixTokens;
      mix_group<Format>(list, g, list.factors + t, here, y + g * kGroup + t * y_stride, y_stride);
    }
  }
}

void to_natural_order(Encoding encoding, float* y, size_t groups) {
  if (encoding == Encoding::kQ4) sort_outputs<q4_outputs>(y, groups);
  if (encoding == Encoding::kQ8) sort_outputs<q8_outputs>(y, groups);
}

// ---- attention and conversions ----------------------------------------------------------------------------------------

void attention_scores(const float* q, const uint16_t* keys, size_t stride, size_t n, size_t count, float scale,
                      float* scores) {
  for (size_t p = 0; p < count; p++) {
    const uint16_t* key = keys + p * stride;
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) sum = _mm512_fmadd_ps(load_halves(key + i), _mm512_loadu_ps(q + i), sum);
    scores[p] = scale * _mm512_reduce_add_ps(sum);
  }
}

void attention_mix(const float* weights, const uint16_t* values, size_t stride, size_t n, size_t count, float* out) {
  // 128 outputs at a time stay in registers over all positions.
  for (size_t first = 0; first < n; first += 128) {
    const size_t registers = (n - first < 128 ? n - first : 128) / 16;
    __m512 sums[8];
    for (size_t v = 0; v < registers; v++) sums[v] = _mm512_loadu_ps(out + first + 16 * v);
    for (size_t p = 0; p < count; p++) {
      const uint16_t* value = values + p * stride + first;
      const __m512 weight = _mm512_set1_ps(weights[p]);
      for (size_t v = 0; v < registers; v++) sums[v] = _mm512_fmadd_ps(load_halves(value + 16 * v), weight, sums[v]);
    }
    for (size_t v = 0; v < registers; v++) _mm512_storeu_ps(out + first + 16 * v, sums[v]);
  }
}

void float_to_half(const float* in, size_t n, uint16_t* out) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), halves);
  }
  for (; i < n; i++) out[i] = float_to_half_scalar(in[i]);
}

constexpr Kernels kTable{
    .name = "avx512",
    .quantize = quantize,
    .dot_q4 = dot<Q4>,
    .dot_q8 = dot<Q8>,
    .dot_f16 = dot_f16,
    .dot_list_q4 = dot_list<Q4>,
    .dot_list_q8 = dot_list<Q8>,
    .dot_list_f16 = dot_list_f16,
    .dot_f32 = dot_f32,
    .matmul_q4 = matmul<Q4>,
    .matmul_q8 = matmul<Q8>,
    .matmul_f16 = matmul_f16,
    .add_columns_q4 = add_columns<ColumnPrefetch<kQ4GroupBytes, kGroupScaleBytes>, add_group_q4>,
    .add_columns_q8 = add_columns<ColumnPrefetch<kQ8GroupBytes, kGroupScaleBytes>, add_group_q8>,
    .add_columns_f16 = add_columns<ColumnPrefetch<kF16GroupBytes, 0>, add_group_f16>,
    .add_columns_batch_q4 = add_columns_batch<Q4Columns>,
    .add_columns_batch_q8 = add_columns_batch<Q8Columns>,
    .add_columns_batch_f16 = add_columns_batch<F16Columns>,
    .to_natural_order = to_natural_order,
    .attention_scores = attention_scores,
    .attention_mix = attention_mix,
    .float_to_half = float_to_half,
};

}  // namespace

namespace XX {}
const Kernels& avx512_kernels() { return kTable; }

}  // namespace pi2
