#include "native/quantize/encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "native/base/threads.h"
#include "native/kernels/half.h"

namespace pi2 {
namespace {

constexpr float kLargestHalf = 65504.0f;
/** 2^-24: a scale below it is stored as zero. */
constexpr float kSmallestHalf = 5.9604645e-8f;
/** Columns transposed together: 64 bytes of a bf16 row. */
constexpr size_t kColumnTile = 32;

float number_at(const uint8_t* source, SourceType type, size_t index) {
  switch (type) {
    case SourceType::kF32: {
      float value;
      std::memcpy(&value, source + 4 * index, 4);
      return value;
    }
    case SourceType::kF16: {
      uint16_t half;
      std::memcpy(&half, source + 2 * index, 2);
      return half_to_float_scalar(half);
    }
    case SourceType::kBf16: {
      uint16_t high;
      std::memcpy(&high, source + 2 * index, 2);
      const uint32_t bits = static_cast<uint32_t>(high) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
  }
  return 0;
}

void store_half(uint8_t* out, uint16_t half) { std::memcpy(out, &half, 2); }

/** Four lanes, which every target has; sums over them have one order on every machine. */
typedef float Lanes __attribute__((vector_size(16), aligned(4)));
constexpr size_t kLanes = 4;

/** Round to nearest even of numbers below 2^22 in magnitude: the sum's low bits are the integer. */
inline Lanes round_even(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }

inline Lanes clamp(Lanes x, float low, float high) {
  x = x < low ? Lanes{} + low : x;
  return x > high ? Lanes{} + high : x;
}

float sum_of(Lanes x) { return (x[0] + x[1]) + (x[2] + x[3]); }

/** A candidate scale for an int4 block: how much of the block's energy it explains, and the scale that explains it best. */
struct Fit {
  float explained;
  float scale;
};

/**
 * Rounds the block with `scale`, then fits the scale to the integers by least squares: with p = sum x q and s = sum q q the
 * best scale is p / s and the squared error falls by p * p / s.
 */
Fit fit_q4(const float* x, float scale) {
  const float inverse = 1.0f / scale;
  Lanes product{};
  Lanes square{};
  for (size_t i = 0; i < kBlock; i += kLanes) {
    const Lanes values = *reinterpret_cast<const Lanes*>(x + i);
    const Lanes q = clamp(round_even(values * inverse), -8.0f, 7.0f);
    product += values * q;
    square += q * q;
  }
  const float p = sum_of(product);
  const float s = sum_of(square);
  return s > 0 ? Fit{p * p / s, p / s} : Fit{0, 0};
}

/**
 * The half-float scale of least squared error among candidates that put the largest weight near -8 or near 7: int4 is
 * asymmetric, so the sign of the scale matters, and clipping the largest weight a little often pays.
 */
uint16_t choose_q4_scale(const float* x) {
  float largest = 0;
  for (size_t i = 0; i < kBlock; i++) {
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  }
  Fit best{0, 0};
  constexpr float kLevels[] = {-8.6f, -8.3f, -8.0f, -7.7f, -7.4f, -7.1f, 6.2f, 6.5f, 6.8f, 7.1f, 7.4f};
  for (const float levels : kLevels) {
    const float scale = largest / levels;
    if (!(std::fabs(scale) >= kSmallestHalf)) return 0;
    const Fit fit = fit_q4(x, scale);
    if (fit.explained > best.explained) best = fit;
  }
  return float_to_half_scalar(best.scale);
}

uint16_t choose_q8_scale(const float* x) {
  float largest = 0;
  for (size_t i = 0; i < kBlock; i++) largest = std::max(largest, std::fabs(x[i]));
  return float_to_half_scalar(largest / 127.0f);
}

/** The integers of a block stored with `scale`, as floats. */
void round_block(const float* x, float scale, float low, float high, float* out) {
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (size_t i = 0; i < kBlock; i += kLanes) {
    const Lanes values = *reinterpret_cast<const Lanes*>(x + i);
    *reinterpret_cast<Lanes*>(out + i) = clamp(round_even(values * inverse), low, high);
  }
}

/** Encodes `n` numbers as whole groups. `x` is padded with zero to whole groups. */
void encode_groups(const float* x, size_t n, Encoding encoding, uint8_t* weights, uint8_t* scales) {
  if (encoding == Encoding::kF32) {
    std::memcpy(weights, x, 4 * n);
    return;
  }
  const size_t groups = group_count(n);
  if (encoding == Encoding::kF16) {
    for (size_t i = 0; i < groups * kGroup; i++) store_half(weights + 2 * i, float_to_half_scalar(x[i]));
    return;
  }
  for (size_t g = 0; g < groups; g++) {
    uint8_t* group = weights + g * (encoding == Encoding::kQ4 ? kQ4GroupBytes : kQ8GroupBytes);
    if (encoding == Encoding::kQ4) std::memset(group, 0, kQ4GroupBytes);
    for (size_t block = 0; block < kGroupBlocks; block++) {
      const float* values = x + g * kGroup + block * kBlock;
      const uint16_t half = encoding == Encoding::kQ4 ? choose_q4_scale(values) : choose_q8_scale(values);
      const float scale = half_to_float_scalar(half);
      store_half(scales + g * kGroupScaleBytes + 2 * block, half);
      float integers[kBlock];
      round_block(values, scale, encoding == Encoding::kQ4 ? -8.0f : -127.0f, encoding == Encoding::kQ4 ? 7.0f : 127.0f,
                  integers);
      for (size_t e = 0; e < kBlock; e++) {
        const int integer = static_cast<int>(integers[e]);
        if (encoding == Encoding::kQ4) {
          const int nibble = integer + 8;
          group[q4_byte(block, e)] |= static_cast<uint8_t>(q4_is_high(e) ? nibble << 4 : nibble);
        } else {
          group[q8_byte(block, e)] = static_cast<uint8_t>(integer);
        }
      }
    }
  }
}

/** The largest magnitude an encoding can hold (its scale is a half float). */
float largest_magnitude(Encoding encoding) {
  switch (encoding) {
    case Encoding::kF32: return INFINITY;
    case Encoding::kF16: return kLargestHalf;
    case Encoding::kQ8: return kLargestHalf * 127.0f;
    case Encoding::kQ4: return kLargestHalf * 6.0f;
  }
  return 0;
}

bool is_bad(float value, float limit) { return !std::isfinite(value) || std::fabs(value) > limit; }

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

}  // namespace

BadNumber encode_rows(const EncodeRequest& r) {
  FirstBadNumber bad;
  const float limit = largest_magnitude(r.encoding);
  run_in_ranges(r.threads, r.rows, [&](size_t begin, size_t end) {
    std::vector<float> values(group_count(r.columns) * kGroup, 0.0f);
    for (size_t row = begin; row < end; row++) {
      if (r.skips(row)) continue;
      const uint8_t* source = r.source + row * r.columns * source_type_bytes(r.source_type);
      for (size_t column = 0; column < r.columns; column++) {
        values[column] = number_at(source, r.source_type, column);
        if (is_bad(values[column], limit)) return bad.meet(row, column, values[column]);
      }
      const size_t v = r.vector_of(row);
      encode_groups(values.data(), r.columns, r.encoding, r.target + r.placement.weights_at(v),
                    r.target + r.placement.scales_at(v));
    }
  });
  return bad.first();
}

BadNumber encode_columns(const EncodeRequest& r, size_t first_element) {
  FirstBadNumber bad;
  const float limit = largest_magnitude(r.encoding);
  const size_t padded = group_count(r.rows) * kGroup;
  const size_t first_weight_byte = weight_bytes(r.encoding, first_element);
  const size_t first_scale_byte = scale_bytes(r.encoding, first_element);
  const size_t tiles = (r.columns + kColumnTile - 1) / kColumnTile;
  run_in_ranges(r.threads, tiles, [&](size_t begin, size_t end) {
    std::vector<float> values(kColumnTile * padded, 0.0f);  // [column of the tile][element]
    for (size_t tile = begin; tile < end; tile++) {
      const size_t first = tile * kColumnTile;
      const size_t count = std::min(kColumnTile, r.columns - first);
      for (size_t row = 0; row < r.rows; row++) {
        for (size_t c = 0; c < count; c++) {
          const float value = number_at(r.source, r.source_type, row * r.columns + first + c);
          if (is_bad(value, limit) && !r.skips(first + c)) return bad.meet(row, first + c, value);
          values[c * padded + row] = value;
        }
      }
      for (size_t c = 0; c < count; c++) {
        if (r.skips(first + c)) continue;
        const size_t v = r.vector_of(first + c);
        encode_groups(values.data() + c * padded, r.rows, r.encoding,
                      r.target + r.placement.weights_at(v) + first_weight_byte,
                      r.target + r.placement.scales_at(v) + first_scale_byte);
      }
    }
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
