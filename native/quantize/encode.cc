#include "native/quantize/encode.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cstring>
#include <functional>
#include <mutex>
#include <vector>

#include "native/base/threads.h"
#include "native/base/vector_code.h"
#include "native/kernels/half.h"
#include "native/quantize/group.h"

namespace pi2 {
namespace {

constexpr float kLargestHalf = 65504.0f;
/** Columns encoded together: 64 bytes of a bf16 row. */
constexpr size_t kColumnTile = 32;
/** Rows of columns that are prefetched while one is converted. */
constexpr size_t kRowsAhead = 16;
/** Rows that a thread takes at a time. */
constexpr size_t kRowTile = 16;

PI2_INLINE float number_at(const uint8_t* source, SourceType type, size_t index) {
  uint32_t bits = 0;
  if (type == SourceType::kF32) {
    std::memcpy(&bits, source + 4 * index, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, source + 2 * index, 2);
    if (type == SourceType::kF16) return half_to_float_scalar(half);
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/** The bits of |value|: they order magnitudes, then infinity, then what is not a number. */
PI2_INLINE uint32_t magnitude_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits & 0x7fffffffu;
}

/** magnitude_bits of the largest number an encoding can hold (its scale is a half float). */
uint32_t largest_magnitude(Encoding encoding) {
  switch (encoding) {
    case Encoding::kF32: return magnitude_bits(FLT_MAX);
    case Encoding::kF16: return magnitude_bits(kLargestHalf);
    case Encoding::kQ8: return magnitude_bits(kLargestHalf * 127.0f);
    case Encoding::kQ4: return magnitude_bits(kLargestHalf * 6.0f);
  }
  return 0;
}

/** Numbers as floats; returns the largest magnitude_bits among them. */
template <SourceType type>
PI2_INLINE uint32_t convert(const uint8_t* source, size_t count, float* out) {
  uint32_t largest = 0;
  for (size_t i = 0; i < count; i++) {
    out[i] = number_at(source, type, i);
    largest = std::max(largest, magnitude_bits(out[i]));
  }
  return largest;
}

PI2_INLINE uint32_t to_floats(const uint8_t* source, SourceType type, size_t count, float* out) {
  switch (type) {
    case SourceType::kF32: return convert<SourceType::kF32>(source, count, out);
    case SourceType::kF16: return convert<SourceType::kF16>(source, count, out);
    case SourceType::kBf16: return convert<SourceType::kBf16>(source, count, out);
  }
  return 0;
}

/** Encodes group `g` of a vector, `count` of whose 256 numbers there are; the others are zero. */
PI2_INLINE void encode_numbers(const float* x, size_t count, Encoding encoding, size_t g, uint8_t* weights,
                               uint8_t* scales) {
  switch (encoding) {
    case Encoding::kF32: std::memcpy(weights + g * kGroup * 4, x, 4 * count); break;
    case Encoding::kF16:
      for (size_t i = 0; i < kGroup; i++) {
        const uint16_t half = float_to_half_scalar(x[i]);
        std::memcpy(weights + g * kF16GroupBytes + 2 * i, &half, 2);
      }
      break;
    case Encoding::kQ8: encode_group(x, false, weights + g * kQ8GroupBytes, scales + g * kGroupScaleBytes); break;
    case Encoding::kQ4: encode_group(x, true, weights + g * kQ4GroupBytes, scales + g * kGroupScaleBytes); break;
  }
}

/** Keeps the bad number that comes first by row, then column, whichever thread met it. */
class FirstBadNumber {
 public:
  void meet(size_t row, size_t column, float value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!first_.found || row < first_.row || (row == first_.row && column < first_.column)) {
      first_ = {true, row, column, value};
    }
  }
  BadNumber first() const { return first_; }

 private:
  std::mutex mutex_;
  BadNumber first_;
};

/** Encodes one row; false if a number of it cannot be stored. */
PI2_VECTOR_CODE("avx2") bool encode_row(const EncodeRequest& r, size_t row, uint32_t limit) {
  const size_t number_bytes = source_type_bytes(r.source_type);
  const uint8_t* source = r.source + row * r.columns * number_bytes;
  const size_t v = r.vector_of(row);
  for (size_t first = 0; first < r.columns; first += kGroup) {
    float numbers[kGroup];
    const size_t count = std::min(kGroup, r.columns - first);
    if (to_floats(source + first * number_bytes, r.source_type, count, numbers) > limit) return false;
    std::fill(numbers + count, numbers + kGroup, 0.0f);
    encode_numbers(numbers, count, r.encoding, first / kGroup, r.target + r.placement.weights_at(v),
                   r.target + r.placement.scales_at(v));
  }
  return true;
}

/**
 * Encodes the columns from `first` on of the rows from `row` on, a tile of columns and a group of rows at most. Returns
 * whether a number may be one that cannot be stored: some of skipped columns may be, too.
 */
PI2_VECTOR_CODE("avx2")
bool encode_tile(const EncodeRequest& r, size_t row, size_t first, size_t first_element, uint32_t limit) {
  float numbers[kColumnTile][kGroup];
  const size_t number_bytes = source_type_bytes(r.source_type);
  const size_t columns = std::min(kColumnTile, r.columns - first);
  const size_t rows = std::min(kGroup, r.rows - row);
  uint32_t largest = 0;
  for (size_t i = 0; i < rows; i++) {
    float across[kColumnTile];
    const uint8_t* source = r.source + ((row + i) * r.columns + first) * number_bytes;
    if (i + kRowsAhead < rows) {  // rows are pages apart: no prefetcher of the hardware follows
      const uint8_t* ahead = source + kRowsAhead * r.columns * number_bytes;
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + columns * number_bytes - 1);
    }
    largest = std::max(largest, to_floats(source, r.source_type, columns, across));
    for (size_t c = 0; c < columns; c++) numbers[c][i] = across[c];
  }
  for (size_t c = 0; c < columns; c++) {
    if (r.skips(first + c)) continue;
    std::fill(numbers[c] + rows, numbers[c] + kGroup, 0.0f);
    const size_t v = r.vector_of(first + c);
    encode_numbers(numbers[c], rows, r.encoding, (first_element + row) / kGroup, r.target + r.placement.weights_at(v),
                   r.target + r.placement.scales_at(v));
  }
  return largest > limit;
}

/**
 * Encodes a tile of Down: the columns `columns[0..count)` as vectors `first_vector` and following, whose rows from `row` on,
 * a group at most, share one scale by block. Returns the largest magnitude_bits.
 */
template <SourceType type>
PI2_INLINE uint32_t encode_shared(const EncodeRequest& r, const uint32_t* columns, size_t count, size_t first_vector,
                                  size_t row, size_t first_element) {
  static thread_local Lanes
      numbers[kTileVectors * kBlock];  // lane: block of the group; all elements of a vector, then the next
  float* const out = reinterpret_cast<float*>(numbers);
  const size_t rows = std::min(kGroup, r.rows - row);
  uint32_t largest = 0;
  for (size_t i = 0; i < kGroup; i++) {
    const size_t at = i % kBlock * kGroupBlocks + i / kBlock;
    for (size_t v = 0; v < count; v++) {
      const float value = i < rows ? number_at(r.source, type, (row + i) * r.columns + columns[v]) : 0.0f;
      largest = std::max(largest, magnitude_bits(value));
      out[v * kGroup + at] = value;
    }
  }
  const Lanes scales = choose_q4_scales(numbers, count * kBlock, kTileLevels);
  const size_t g = (first_element + row) / kGroup;
  for (size_t v = 0; v < count; v++) {
    uint8_t* const weights = r.target + r.placement.weights_at(first_vector + v) + g * kQ4GroupBytes;
    uint8_t* const stored = r.target + r.placement.scales_at(first_vector + v) + g * kGroupScaleBytes;
    store_q4(numbers + v * kBlock, store_scales(scales, stored), weights);
  }
  return largest;
}

PI2_VECTOR_CODE("avx2")
uint32_t encode_shared_group(const EncodeRequest& r, const uint32_t* columns, size_t count, size_t first_vector, size_t row,
                             size_t first_element) {
  switch (r.source_type) {
    case SourceType::kF32: return encode_shared<SourceType::kF32>(r, columns, count, first_vector, row, first_element);
    case SourceType::kF16: return encode_shared<SourceType::kF16>(r, columns, count, first_vector, row, first_element);
    case SourceType::kBf16: return encode_shared<SourceType::kBf16>(r, columns, count, first_vector, row, first_element);
  }
  return 0;
}

/** Meets the first number of the rectangle that cannot be stored, and returns whether there is one. */
bool find_bad(const EncodeRequest& r, size_t first_row, size_t rows, size_t first_column, size_t columns, bool by_columns,
              uint32_t limit, FirstBadNumber* bad) {
  for (size_t row = first_row; row < first_row + rows; row++) {
    for (size_t column = first_column; column < first_column + columns; column++) {
      const float value = number_at(r.source, r.source_type, row * r.columns + column);
      if (magnitude_bits(value) <= limit || r.skips(by_columns ? column : row)) continue;
      bad->meet(row, column, value);
      return true;
    }
  }
  return false;
}

/** Runs work(i) for every i of [0, count), on all threads, in ascending order of their beginning, until one returns false.
 */
void run_in_turn(size_t threads, size_t count, const std::function<bool(size_t)>& work) {
  std::atomic<size_t> next{0};
  run_in_ranges(threads, threads, [&](size_t, size_t) {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      if (!work(i)) next.store(count);
    }
  });
}

}  // namespace

BadNumber encode_rows(const EncodeRequest& r) {
  FirstBadNumber bad;
  const uint32_t limit = largest_magnitude(r.encoding);
  run_in_turn(r.threads, (r.rows + kRowTile - 1) / kRowTile, [&](size_t tile) {
    for (size_t row = tile * kRowTile; row < std::min(r.rows, (tile + 1) * kRowTile); row++) {
      if (!r.skips(row) && !encode_row(r, row, limit)) return !find_bad(r, row, 1, 0, r.columns, false, limit, &bad);
    }
    return true;
  });
  return bad.first();
}

BadNumber encode_columns(const EncodeRequest& r, size_t first_element) {
  FirstBadNumber bad;
  const uint32_t limit = largest_magnitude(r.encoding);
  // Tiles go on after a bad number: that of another tile may be in an earlier row.
  run_in_turn(r.threads, (r.columns + kColumnTile - 1) / kColumnTile, [&](size_t tile) {
    const size_t first = tile * kColumnTile;
    const size_t columns = std::min(kColumnTile, r.columns - first);
    for (size_t row = 0; row < r.rows; row += kGroup) {
      const bool suspicious = encode_tile(r, row, first, first_element, limit);
      if (suspicious && find_bad(r, row, std::min(kGroup, r.rows - row), first, columns, true, limit, &bad)) break;
    }
    return true;
  });
  return bad.first();
}

BadNumber encode_tiles(const EncodeRequest& r, size_t first_element) {
  FirstBadNumber bad;
  const uint32_t limit = largest_magnitude(Encoding::kQ4);
  std::vector<uint32_t> columns;  // the column of each vector, from the first on
  for (size_t c = 0; c < r.columns; c++) {
    if (r.skips(c)) continue;
    const size_t place = r.order != nullptr ? r.order[c] : c;
    if (place >= columns.size()) columns.resize(place + 1);
    columns[place] = static_cast<uint32_t>(c);
  }
  run_in_turn(r.threads, (columns.size() + kTileVectors - 1) / kTileVectors, [&](size_t tile) {
    const size_t first = tile * kTileVectors;
    const size_t count = std::min(kTileVectors, columns.size() - first);
    const size_t first_vector = r.order != nullptr ? first : r.first_vector + first;
    uint32_t largest = 0;
    for (size_t row = 0; row < r.rows; row += kGroup) {
      largest = std::max(largest, encode_shared_group(r, &columns[first], count, first_vector, row, first_element));
    }
    for (size_t v = first; v < first + count && largest > limit; v++) {
      find_bad(r, 0, r.rows, columns[v], 1, true, limit, &bad);
    }
    return true;
  });
  return bad.first();
}

void decode_vector(const uint8_t* weights, const uint8_t* scales, Encoding encoding, size_t columns, float* out) {
  for (size_t i = 0; i < columns; i++) {
    const size_t g = i / kGroup;
    const size_t block = i % kGroup / kBlock;
    const size_t e = i % kBlock;
    uint16_t half = 0;
    switch (encoding) {
      case Encoding::kF32: std::memcpy(out + i, weights + 4 * i, 4); break;
      case Encoding::kF16:
        std::memcpy(&half, weights + 2 * i, 2);
        out[i] = half_to_float_scalar(half);
        break;
      case Encoding::kQ8:
        std::memcpy(&half, scales + g * kGroupScaleBytes + 2 * block, 2);
        out[i] = half_to_float_scalar(half) * static_cast<int8_t>(weights[g * kQ8GroupBytes + q8_byte(block, e)]);
        break;
      case Encoding::kQ4: {
        std::memcpy(&half, scales + g * kGroupScaleBytes + 2 * block, 2);
        const uint8_t byte = weights[g * kQ4GroupBytes + q4_byte(block, e)];
        const int nibble = q4_is_high(e) ? byte >> 4 : byte & 15;
        out[i] = half_to_float_scalar(half) * static_cast<float>(nibble - 8);
        break;
      }
    }
  }
}

}  // namespace pi2
