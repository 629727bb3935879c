#pragma once
#include <cstddef>
#include <cstdint>

namespace pi2 {

/** How a vector of weights is stored. docs/FORMAT.md section 1; values are internal, names are on disk. */
enum class Encoding { kF32, kF16, kQ8, kQ4 };

/** Consecutive weights that share one scale. */
inline constexpr size_t kBlock = 32;
/** Blocks whose bytes are interleaved. */
inline constexpr size_t kGroupBlocks = 8;
/** Weights in a group; vectors are padded to a multiple of it. */
inline constexpr size_t kGroup = kBlock * kGroupBlocks;
inline constexpr size_t kQ4GroupBytes = kGroup / 2;
inline constexpr size_t kQ8GroupBytes = kGroup;
inline constexpr size_t kF16GroupBytes = kGroup * 2;
/** Bytes of the scales of one group (8 half floats). */
inline constexpr size_t kGroupScaleBytes = 2 * kGroupBlocks;

/** Groups of a vector of `columns` weights. */
constexpr size_t group_count(size_t columns) { return (columns + kGroup - 1) / kGroup; }

/** Bytes of the weights of one vector, without scales. */
constexpr size_t weight_bytes(Encoding encoding, size_t columns) {
  switch (encoding) {
    case Encoding::kF32: return 4 * columns;
    case Encoding::kF16: return kF16GroupBytes * group_count(columns);
    case Encoding::kQ8: return kQ8GroupBytes * group_count(columns);
    case Encoding::kQ4: return kQ4GroupBytes * group_count(columns);
  }
  return 0;
}

/** Bytes of the scales of one vector. */
constexpr size_t scale_bytes(Encoding encoding, size_t columns) {
  const bool scaled = encoding == Encoding::kQ8 || encoding == Encoding::kQ4;
  return scaled ? kGroupScaleBytes * group_count(columns) : 0;
}

/** Bytes of one row as tensors store it: weights, then scales. */
constexpr size_t row_bytes(Encoding encoding, size_t columns) {
  return weight_bytes(encoding, columns) + scale_bytes(encoding, columns);
}

/**
 * Byte of a q8 group that holds weight `element` (0..31) of `block` (0..7).
 * Worked example: block 2, element 13 = 8*1 + 4*1 + 1: line 1, half 1, byte 64 + 32 + 8 + 1 = 105.
 */
constexpr size_t q8_byte(size_t block, size_t element) {
  return 64 * (element / 8) + 32 * (element / 4 % 2) + 4 * block + element % 4;
}

/** Byte of a q4 group that holds weight `element` of `block`; the high nibble if `q4_is_high(element)`. */
constexpr size_t q4_byte(size_t block, size_t element) {
  return 64 * (element / 16) + 32 * (element / 4 % 2) + 4 * block + element % 4;
}
/** Whether the weight is in the high nibble of that byte. */
constexpr bool q4_is_high(size_t element) { return element % 16 >= 8; }

static_assert(q8_byte(2, 13) == 105);
static_assert(q4_byte(2, 13) == 41 && q4_is_high(13), "the worked example of FORMAT.md");

}  // namespace pi2
