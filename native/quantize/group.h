#pragma once
/**
 * Encoding of one group of weights, its 8 blocks side by side: lane b of a vector belongs to block b, so that no instruction
 * reaches across lanes, and 4 bytes of a lane are what FORMAT.md stores next to each other. Plain vectors of the compiler:
 * every instruction set computes the same bits.
 */
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "native/kernels/encoding.h"
#include "native/kernels/half.h"

// Vectors are passed to functions that are always inlined: how they would be passed otherwise does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace pi2 {

/** 2^-24: a scale below it is stored as zero. */
inline constexpr float kSmallestHalf = 5.9604645e-8f;

typedef float Lanes __attribute__((vector_size(4 * kGroupBlocks)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kGroupBlocks)));

#define PI2_INLINE static inline __attribute__((always_inline))

PI2_INLINE Lanes magnitude(Lanes x) { return reinterpret_cast<Lanes>(reinterpret_cast<IntLanes>(x) & 0x7fffffff); }

/** Numbers below 2^22 in magnitude to the nearest integer, even if between two; at least `low` and at most `high`. */
PI2_INLINE Lanes round_between(Lanes x, float low, float high) {
  constexpr float kAway = 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are the integer, and its order is that of bits
  const IntLanes least = reinterpret_cast<IntLanes>(Lanes{} + (low + kAway));
  const IntLanes most = reinterpret_cast<IntLanes>(Lanes{} + (high + kAway));
  IntLanes bits = reinterpret_cast<IntLanes>(x + kAway);
  bits = bits > least ? bits : least;
  bits = bits < most ? bits : most;
  return reinterpret_cast<Lanes>(bits) - kAway;
}

/** The number of largest magnitude in each lane, the first of several. */
PI2_INLINE Lanes largest_of(const Lanes* x, size_t count) {
  Lanes largest{};
  for (size_t e = 0; e < count; e++) largest = magnitude(x[e]) > magnitude(largest) ? x[e] : largest;
  return largest;
}

/** Where candidates put the largest weight of a block. The first gives the least scale: if that can be stored, all can. */
inline constexpr float kBlockLevels[] = {-8.6f, -8.3f, -8.0f, -7.7f, -7.4f, -7.1f, 6.2f, 6.5f, 6.8f, 7.1f, 7.4f};
/** The same of a tile of 32 blocks: the largest of 1024 weights is further out, and clipping it pays more. */
inline constexpr float kTileLevels[] = {-13.6f, -12.8f, -12.0f, -11.2f, -10.4f, -9.6f, -8.8f, -8.0f, -7.2f,
                                        6.4f,   7.2f,   8.0f,   8.8f,   9.6f,   10.4f, 11.2f, 12.0f, 12.8f};

/**
 * For each lane, whose `count` numbers (a multiple of 4) share one scale, the scale of least squared error among candidates
 * that put the largest weight near the ends of -8 .. 7 or beyond: int4 is asymmetric, so the sign of the scale matters, and
 * clipping the largest weight a little often pays. The numbers are rounded with a candidate, then the scale is fitted to the
 * integers by least squares: with p = sum x q and s = sum q q the best scale is p / s, and the squared error falls by p * p
 * / s.
 */
template <size_t kCandidates>
PI2_INLINE Lanes choose_q4_scales(const Lanes* x, size_t count, const float (&levels)[kCandidates]) {
  const Lanes largest = largest_of(x, count);
  Lanes best{};
  Lanes scale{};
  for (const float level : levels) {
    const Lanes inverse = 1.0f / (largest / level);
    Lanes product[4] = {};  // every fourth element: the order of the sum is part of the format's promise
    Lanes square[2] = {};
    for (size_t first = 0; first < count; first += 4) {
      for (size_t i = 0; i < 4; i++) {
        const Lanes q = round_between(x[first + i] * inverse, -8.0f, 7.0f);
        product[i] += x[first + i] * q;
        square[i % 2] += q * q;
      }
    }
    const Lanes p = (product[0] + product[1]) + (product[2] + product[3]);
    const Lanes s = square[0] + square[1];
    const Lanes explained = p * p / s;
    const IntLanes better = explained > best;  // false for what is not a number
    best = better ? explained : best;
    scale = better ? p / s : scale;
  }
  return magnitude(largest / levels[0]) >= kSmallestHalf ? scale : Lanes{};
}

/** Scales as half floats, and what a weight is multiplied with to become an integer: 0 where the scale is. */
PI2_INLINE Lanes store_scales(const Lanes& chosen, uint8_t* scales) {
  uint16_t halves[kGroupBlocks];
  Lanes inverse;
  for (size_t block = 0; block < kGroupBlocks; block++) {
    halves[block] = float_to_half_scalar(chosen[block]);
    const float scale = half_to_float_scalar(halves[block]);
    inverse[block] = scale == 0.0f ? 0.0f : 1.0f / scale;
  }
  std::memcpy(scales, halves, sizeof halves);
  return inverse;
}

/** Rounds the 32 elements of 8 blocks to q4. */
PI2_INLINE void store_q4(const Lanes* x, const Lanes& inverse, uint8_t* weights) {
  for (size_t word = 0; word < 4; word++) {  // elements 16 (word / 2) + 4 (word % 2) + 0..3, and 8 further the high nibbles
    IntLanes bytes{};
    for (size_t i = 0; i < 4; i++) {
      const size_t e = word / 2 * 16 + word % 2 * 4 + i;
      const Lanes low = round_between(x[e] * inverse, -8.0f, 7.0f) + 8.0f;
      const Lanes high = round_between(x[e + 8] * inverse, -8.0f, 7.0f) + 8.0f;
      bytes |= __builtin_convertvector(low + high * 16.0f, IntLanes) << static_cast<int>(8 * i);
    }
    std::memcpy(weights + word * sizeof bytes, &bytes, sizeof bytes);
  }
}

/** Encodes 256 numbers in natural order as q4 or q8. */
PI2_INLINE void encode_group(const float* numbers, bool is_q4, uint8_t* weights, uint8_t* scales) {
  Lanes x[kBlock];
  for (size_t e = 0; e < kBlock; e++) {
    for (size_t block = 0; block < kGroupBlocks; block++) x[e][block] = numbers[block * kBlock + e];
  }
  if (is_q4) {
    store_q4(x, store_scales(choose_q4_scales(x, kBlock, kBlockLevels), scales), weights);
    return;
  }
  const Lanes inverse = store_scales(magnitude(largest_of(x, kBlock)) / 127.0f, scales);
  for (size_t word = 0; word < 8; word++) {  // elements 4 word + 0..3
    IntLanes bytes{};
    for (size_t i = 0; i < 4; i++) {
      const Lanes integer = round_between(x[4 * word + i] * inverse, -127.0f, 127.0f);
      bytes |= (__builtin_convertvector(integer, IntLanes) & 0xff) << static_cast<int>(8 * i);
    }
    std::memcpy(weights + word * sizeof bytes, &bytes, sizeof bytes);
  }
}

static_assert(q4_byte(1, 0) == 4 && q4_byte(0, 4) == 32 && q4_byte(0, 8) == 0 && q4_byte(0, 16) == 64, "as words above");
static_assert(q8_byte(1, 0) == 4 && q8_byte(0, 4) == 32 && q8_byte(0, 8) == 64, "as words above");

}  // namespace pi2
