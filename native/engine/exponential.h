#pragma once
#include <bit>
#include <cstdint>

namespace pi2 {

/**
 * e^x within a unit of the last place, without a call or a branch, so that compilers make vector code of loops over it:
 * the softmax and SiLU of a prompt take millions. Arguments are taken into -87..88, where a float holds the result; NaN
 * stays NaN.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2; e^x = 2^n e^r, e^r by a polynomial (Cephes).
 */
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts; the first has few bits, so that n times it is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound) + 127;
  return p * std::bit_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23));
}

}  // namespace pi2
