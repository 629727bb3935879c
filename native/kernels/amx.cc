/**
 * The kernels for AVX-512 and, for prompts, products on the tiles of AMX (bf16). A tile is 16 rows of 64 bytes; one
 * instruction multiplies 16 rows by 16 columns over 32 terms, 16 times what the vector unit does in that time.
 *
 *  - All products are of two by two tiles, which load each operand once for two results.
 *  - Weights are decoded into panels of 32 rows (or outputs) by 512 terms: 32 KB, which stay in L1 while all tokens pass.
 *    Sums wait in L2 meanwhile.
 *  - Terms are in the lane order of q8 registers (avx512.cc), in which both encodings are decoded without shuffles;
 *    activations are packed in it once.
 */
#include <immintrin.h>

#include <cstring>

#include "native/kernels/kernels.h"
#include "native/kernels/tiles.h"

namespace pi2 {
namespace {

/** Rows of a tile; columns of a result. */
constexpr size_t kSide = 16;
/** Terms of a product of tiles. */
constexpr size_t kTerms = 32;
/** Elements of an operand tile and of a result. */
constexpr size_t kOperand = kSide * kTerms;
constexpr size_t kResult = kSide * kSide;
constexpr size_t kGroupSteps = kGroup / kTerms;
/** Steps of a panel. */
constexpr size_t kPanelSteps = 16;
/** Tokens whose sums wait in L2, and rows. */
constexpr size_t kMostTokens = 256;
constexpr size_t kMostRows = 128;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

/** Sets the tiles up for as long as it lives; threads without tiles are cheaper to switch. */
class Tiles {
 public:
  Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

/** Two panels of 16 rows, or of 16 outputs: (half, step, operand tile). */
struct alignas(64) Panel {
  uint16_t values[2][kPanelSteps][kOperand];
};

/** Sums of two by two tiles in memory: (row half, column half). */
using Sums = float[4][kResult];

inline __m512 load_scales(const uint8_t* scales) {
  return _mm512_cvtph_ps(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales))));
}

/** Two registers as one of bf16: the 16 of `low`, then the 16 of `high`. */
inline __m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/** Register `kRegister` (0..15, in the order of q8) of a group, without scales. */
struct Q4 {
  static constexpr size_t kBytes = kQ4GroupBytes;
  template <size_t kRegister>
  static __m512 decode(const uint8_t* group) {
    constexpr size_t kLine = kRegister / 8;
    constexpr size_t kNibble = 2 * (kRegister % 4) + kRegister / 4 % 2;
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i line = _mm512_loadu_si512(group + 64 * kLine);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, 4 * kNibble), table);
  }
  /** The register of the order that `to_natural_order` sorts that holds the same outputs. */
  static constexpr size_t output_register(size_t v) { return v / 8 * 8 + 2 * (v % 4) + v / 4 % 2; }
};
struct Q8 {
  static constexpr size_t kBytes = kQ8GroupBytes;
  template <size_t kRegister>
  static __m512 decode(const uint8_t* group) {
    const __m512i line = _mm512_loadu_si512(group + 64 * (kRegister / 4));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * (kRegister % 4)), 24));
  }
  static constexpr size_t output_register(size_t v) { return v; }
};

/** out[c] of register r = in[r] lane c: 16 by 16 lanes of 32 bits. */
inline void transpose(__m512i* x) {
  __m512i y[16];
  for (size_t i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (size_t i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (size_t i = 0; i < 4; i++) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
  for (size_t i = 0; i < 8; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
  }
}

/** The sums of two by two tiles go on from memory, or from zero if `fresh`. */
inline void begin_sums(bool fresh, const Sums& sums) {
  // The intrinsics do not tell the compiler that tiles are loaded from memory: what is written before has to be there.
  __asm__ volatile("" ::: "memory");
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0], 64);
    _tile_loadd(1, sums[1], 64);
    _tile_loadd(2, sums[2], 64);
    _tile_loadd(3, sums[3], 64);
  }
}

inline void end_sums(Sums& sums) {
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

inline void add_products(const uint16_t* left0, const uint16_t* left1, const uint16_t* right0, const uint16_t* right1) {
  _tile_loadd(4, left0, 64);
  _tile_loadd(6, right0, 64);
  _tile_loadd(5, left1, 64);
  _tile_loadd(7, right1, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// ---- rows times activations -------------------------------------------------------------------------------------------

/** (lot's half, step, pair of terms, token, 2): the right operand of rows times activations. */
void pack(const float* x, size_t x_stride, size_t groups, size_t first, size_t tokens, uint16_t* packed) {
  alignas(64) int32_t index[16][16];
  for (size_t v = 0; v < 16; v++) {
    for (size_t lane = 0; lane < 16; lane++) {
      index[v][lane] = static_cast<int32_t>(32 * (lane % 8) + 8 * (v / 4) + 4 * (lane / 8) + v % 4);
    }
  }
  const size_t steps = groups * kGroupSteps;
  for (size_t half = first; half < first + kTokenLot; half += kSide) {
    uint16_t* out = packed + half * groups * kGroup;
    for (size_t step = 0; step < steps; step++, out += kOperand) {
      const size_t group = step / kGroupSteps;
      const __m512i low = _mm512_load_si512(index[step % kGroupSteps * 2]);
      const __m512i high = _mm512_load_si512(index[step % kGroupSteps * 2 + 1]);
      __m512i terms[16];
      for (size_t t = 0; t < kSide; t++) {
        terms[t] = _mm512_setzero_si512();
        if (half + t >= tokens) continue;
        const float* from = x + (half + t) * x_stride + group * kGroup;
        terms[t] = to_bf16(_mm512_i32gather_ps(low, from, 4), _mm512_i32gather_ps(high, from, 4));
      }
      transpose(terms);
      for (size_t pair = 0; pair < kSide; pair++) _mm512_store_si512(out + pair * kTerms, terms[pair]);
    }
  }
}

template <class Format, size_t kStep>
inline void decode_step(const uint8_t* group, __m512 scales, uint16_t* row) {
  const __m512 low = _mm512_mul_ps(Format::template decode<2 * kStep>(group), scales);
  const __m512 high = _mm512_mul_ps(Format::template decode<2 * kStep + 1>(group), scales);
  _mm512_store_si512(row + kStep * kOperand, to_bf16(low, high));
}

/** A row's group into its 8 steps. */
template <class Format>
inline void decode_group(const uint8_t* group, const uint8_t* scales, uint16_t* row) {
  const __m512 factors = load_scales(scales);
  decode_step<Format, 0>(group, factors, row);
  decode_step<Format, 1>(group, factors, row);
  decode_step<Format, 2>(group, factors, row);
  decode_step<Format, 3>(group, factors, row);
  decode_step<Format, 4>(group, factors, row);
  decode_step<Format, 5>(group, factors, row);
  decode_step<Format, 6>(group, factors, row);
  decode_step<Format, 7>(group, factors, row);
}

/** Asks for the weights of the rows [first, first + 32), which lie apart: no prefetcher of the hardware finds them. */
template <class Format>
inline void prefetch_rows(Rows rows, size_t first, size_t group, size_t groups) {
  for (size_t r = first; r < first + 2 * kSide; r++) {
    const char* weights = reinterpret_cast<const char*>(rows.weights + r * rows.stride + group * Format::kBytes);
    for (size_t byte = 0; byte < groups * Format::kBytes; byte += 64) _mm_prefetch(weights + byte, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(rows.scales + r * rows.stride + group * kGroupScaleBytes), _MM_HINT_T1);
  }
}

/**
 * Decodes a panel, piece by piece while another is multiplied: the units for tiles and for vectors then work at the same
 * time. Rows [first, first + 32) of `row_count`, `groups` groups from `group` on; rows that are not there repeat the last.
 */
template <class Format>
struct PanelDecoder {
  Rows rows;
  size_t first;
  size_t row_count;
  size_t group;
  size_t groups;
  Panel* panel;
  size_t done = 0;  // groups of rows

  size_t total() const { return 2 * kSide * groups; }
  inline void decode_until(size_t end) {
    for (; done < end; done++) {
      const size_t r = done / groups;
      const size_t g = done % groups;
      const size_t offset = (first + r < row_count ? first + r : row_count - 1) * rows.stride;
      decode_group<Format>(rows.weights + offset + (group + g) * Format::kBytes,
                           rows.scales + offset + (group + g) * kGroupScaleBytes,
                           panel->values[r / kSide][g * kGroupSteps] + r % kSide * kTerms);
    }
  }
};

/** A result of (row, token) as y[token * y_stride + row], as far as there are rows and tokens. */
inline void put_result(const float* result, size_t rows, size_t tokens, float* y, size_t y_stride) {
  __m512i lines[kSide];
  for (size_t r = 0; r < kSide; r++) lines[r] = _mm512_load_si512(result + r * kSide);
  transpose(lines);
  const __mmask16 mask = static_cast<__mmask16>((1u << (rows < kSide ? rows : kSide)) - 1u);
  for (size_t t = 0; t < kSide && t < tokens; t++) _mm512_mask_storeu_epi32(y + t * y_stride, mask, lines[t]);
}

/** At most kMostRows by kMostTokens. */
template <class Format>
void multiply_block(Rows rows, size_t row_count, size_t groups, const uint16_t* packed, size_t tokens, float* y,
                    size_t y_stride) {
  constexpr size_t kLots = kMostTokens / kTokenLot;
  alignas(64) Panel panels[2];
  alignas(64) Sums sums[kMostRows / (2 * kSide)][kLots];
  constexpr size_t kPanelGroups = kPanelSteps / kGroupSteps;
  const size_t half = groups * kGroup * kSide;
  const auto decoder_of = [&](size_t g, size_t r, Panel* panel) {
    const size_t here = groups - g < kPanelGroups ? groups - g : kPanelGroups;
    return PanelDecoder<Format>{rows, r, row_count, g, here, panel};
  };
  PanelDecoder<Format> next = decoder_of(0, 0, &panels[0]);
  next.decode_until(next.total());
  while (next.groups > 0) {
    const PanelDecoder<Format> now = next;
    const bool is_last = now.first + 2 * kSide >= row_count;
    const size_t next_group = is_last ? now.group + now.groups : now.group;
    next = decoder_of(next_group, is_last ? 0 : now.first + 2 * kSide, now.panel == panels ? panels + 1 : panels);
    // The panel behind the next; at the end that of the rows that follow, which the same thread often gets.
    const bool is_next_last = next.first + 2 * kSide >= row_count;
    const size_t after = next_group + kPanelGroups < groups ? next_group + kPanelGroups : 0;
    if (next.groups > 0) {
      const size_t row = !is_next_last ? next.first + 2 * kSide : after > 0 ? 0 : row_count;
      prefetch_rows<Format>(rows, row, is_next_last ? after : next_group, kPanelGroups);
    }
    const size_t steps = now.groups * kGroupSteps;
    const size_t slots = (tokens + kTokenLot - 1) / kTokenLot * steps;
    size_t slot = 0;
    for (size_t t = 0; t < tokens; t += kTokenLot) {
      const uint16_t* right = packed + t * groups * kGroup + now.group * kGroupSteps * kOperand;
      Sums& of_lot = sums[now.first / (2 * kSide)][t / kTokenLot];
      begin_sums(now.group == 0, of_lot);
      for (size_t s = 0; s < steps; s++, right += kOperand) {
        add_products(now.panel->values[0][s], now.panel->values[1][s], right, right + half);
        next.decode_until(next.total() * ++slot / slots);
      }
      end_sums(of_lot);
    }
  }
  for (size_t r = 0; r < row_count; r += kSide) {
    for (size_t t = 0; t < tokens; t += kSide) {
      const Sums& of_both = sums[r / (2 * kSide)][t / kTokenLot];
      put_result(of_both[r / kSide % 2 * 2 + t / kSide % 2], row_count - r, tokens - t, y + t * y_stride + r, y_stride);
    }
  }
}

template <class Format>
void multiply(Rows rows, size_t row_count, size_t groups, const uint16_t* packed, size_t tokens, float* y, size_t y_stride) {
  const Tiles tiles;
  for (size_t r = 0; r < row_count; r += kMostRows) {
    const size_t rows_here = row_count - r < kMostRows ? row_count - r : kMostRows;
    const Rows from{rows.weights + r * rows.stride, rows.scales + r * rows.stride, rows.stride};
    for (size_t t = 0; t < tokens; t += kMostTokens) {
      multiply_block<Format>(from, rows_here, groups, packed + t * groups * kGroup,
                             tokens - t < kMostTokens ? tokens - t : kMostTokens, y + t * y_stride + r, y_stride);
    }
  }
}

// ---- down columns -----------------------------------------------------------------------------------------------------

/** Factors are left operands: (chunk of neurons, half lot of tokens, step of 32 neurons, token, neuron). */
bool put_factors(const float* values, size_t stride, size_t tokens, size_t neuron, uint16_t* factors) {
  const size_t padded = lots_of_tokens(tokens);
  uint16_t* out =
      factors + neuron / kFactorChunk * kFactorChunk * padded + neuron % kFactorChunk / kTerms * kOperand + neuron % kTerms;
  uint32_t all = 0;
  for (size_t t = 0; t < padded; t++) {
    uint32_t bits = 0;
    if (t < tokens) std::memcpy(&bits, values + t * stride, sizeof bits);
    // To nearest even, like the instruction; what is not a number stays one.
    const bool is_number = (bits & 0x7fffffff) <= 0x7f800000;
    const uint32_t rounded = is_number ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    out[t / kSide * (kFactorChunk * kSide) + t % kSide * kTerms] = static_cast<uint16_t>(rounded >> 16);
    all |= bits << 1;
  }
  return all != 0;
}

/** Registers 2 * kPair and 2 * kPair + 1 of two columns as a line of right operands: (output, column of the two). */
template <class Format, size_t kPair>
inline void decode_two(const TileColumns& columns, size_t first, size_t group, uint16_t* low_line, uint16_t* high_line) {
  __m512 low[2];
  __m512 high[2];
  for (size_t i = 0; i < 2; i++) {
    const uint8_t* column = first + i < columns.count ? columns.columns[first + i] : nullptr;
    low[i] = high[i] = _mm512_setzero_ps();
    if (column == nullptr) continue;
    const __m512 scales = load_scales(column + columns.scales_offset + group * kGroupScaleBytes);
    low[i] = _mm512_mul_ps(Format::template decode<2 * kPair>(column + group * Format::kBytes), scales);
    high[i] = _mm512_mul_ps(Format::template decode<2 * kPair + 1>(column + group * Format::kBytes), scales);
  }
  alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  _mm512_store_si512(low_line, _mm512_permutexvar_epi16(interleave, to_bf16(low[0], low[1])));
  _mm512_store_si512(high_line, _mm512_permutexvar_epi16(interleave, to_bf16(high[0], high[1])));
}

/** Asks for the group of 64 columns from `first` on. */
template <class Format>
inline void prefetch_columns(const TileColumns& columns, size_t first, size_t group) {
  for (size_t i = first; i < first + 64 && i < columns.count; i++) {
    const char* column = reinterpret_cast<const char*>(columns.columns[i]);
    if (column == nullptr) continue;
    for (size_t byte = 0; byte < Format::kBytes; byte += 64)
      _mm_prefetch(column + group * Format::kBytes + byte, _MM_HINT_T1);
    _mm_prefetch(column + columns.scales_offset + group * kGroupScaleBytes, _MM_HINT_T1);
  }
}

/** Steps of 32 neurons that have a column of their own. */
struct Steps {
  size_t first;
  size_t numbers[kPanelSteps];
  size_t count = 0;
};

/** Adds to the sums (lot) of a pair of registers. The factors begin with the first token; chunks are `chunk_stride` apart.
 */
template <class Format, size_t kPair>
inline void add_pair(const TileColumns& columns, const Steps& steps, const uint16_t* factors, size_t chunk_stride,
                     size_t group, size_t tokens, bool fresh, Panel& panel, Sums* sums) {
  constexpr size_t kChunkSteps = kFactorChunk / kTerms;
  for (size_t s = 0; s < steps.count; s++) {
    for (size_t line = 0; line < kSide; line++) {
      decode_two<Format, kPair>(columns, steps.numbers[s] * kTerms + 2 * line, group, panel.values[0][s] + line * kTerms,
                                panel.values[1][s] + line * kTerms);
    }
  }
  // An eighth of the columns of the next steps.
  static_assert(kPanelSteps * kTerms == 8 * 64);
  prefetch_columns<Format>(columns, (steps.first + kPanelSteps) * kTerms + 64 * kPair, group);
  for (size_t t = 0; t < tokens; t += kTokenLot) {
    begin_sums(fresh, sums[t / kTokenLot]);
    for (size_t s = 0; s < steps.count; s++) {
      const uint16_t* left = factors + steps.numbers[s] / kChunkSteps * chunk_stride + t * kFactorChunk +
                             steps.numbers[s] % kChunkSteps * kOperand;
      add_products(left, left + kSide * kFactorChunk, panel.values[0][s], panel.values[1][s]);
    }
    end_sums(sums[t / kTokenLot]);
  }
}

/** At most kMostTokens. */
template <class Format>
void sum_block(const TileColumns& columns, const uint16_t* factors, size_t chunk_stride, size_t group, size_t tokens,
               float* y, size_t y_stride) {
  alignas(64) Panel panel;
  alignas(64) Sums sums[8][kMostTokens / kTokenLot];
  const size_t step_count = (columns.count + kTerms - 1) / kTerms;
  bool fresh = true;
  for (size_t first = 0; first < step_count; first += kPanelSteps) {
    Steps steps;
    steps.first = first;
    for (size_t step = first; step < first + kPanelSteps && step < step_count; step++) {
      const size_t end = (step + 1) * kTerms < columns.count ? (step + 1) * kTerms : columns.count;
      bool used = false;
      for (size_t i = step * kTerms; i < end && !used; i++) used = columns.columns[i] != nullptr;
      // What is left out would add zeros.
      if (used) steps.numbers[steps.count++] = step;
    }
    if (steps.count == 0) continue;
    add_pair<Format, 0>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[0]);
    add_pair<Format, 1>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[1]);
    add_pair<Format, 2>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[2]);
    add_pair<Format, 3>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[3]);
    add_pair<Format, 4>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[4]);
    add_pair<Format, 5>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[5]);
    add_pair<Format, 6>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[6]);
    add_pair<Format, 7>(columns, steps, factors, chunk_stride, group, tokens, fresh, panel, sums[7]);
    fresh = false;
  }
  for (size_t t = 0; t < tokens; t++) {
    for (size_t v = 0; v < 16; v++) {
      const float* result = sums[v / 2][t / kTokenLot][t / kSide % 2 * 2 + v % 2] + t % kSide * kSide;
      _mm512_storeu_ps(y + t * y_stride + 16 * Format::output_register(v),
                       fresh ? _mm512_setzero_ps() : _mm512_load_ps(result));
    }
  }
}

template <class Format>
void sum_columns(TileColumns columns, const uint16_t* factors, size_t group, size_t tokens, float* y, size_t y_stride) {
  const Tiles tiles;
  for (size_t t = 0; t < tokens; t += kMostTokens) {
    sum_block<Format>(columns, factors + t * kFactorChunk, kFactorChunk * lots_of_tokens(tokens), group,
                      tokens - t < kMostTokens ? tokens - t : kMostTokens, y + t * y_stride, y_stride);
  }
}

constexpr TileKernels kTiles{
    .pack = pack,
    .multiply_q4 = multiply<Q4>,
    .multiply_q8 = multiply<Q8>,
    .put_factors = put_factors,
    .sum_columns_q4 = sum_columns<Q4>,
    .sum_columns_q8 = sum_columns<Q8>,
};

}  // namespace

const Kernels& amx_kernels() {
  static const Kernels table = [] {
    Kernels kernels = avx512_kernels();
    kernels.name = "amx";
    kernels.tiles = &kTiles;
    return kernels;
  }();
  return table;
}

}  // namespace pi2
