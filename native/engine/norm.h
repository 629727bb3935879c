#pragma once
#include <cmath>
#include <cstddef>

#include "native/engine/config.h"

namespace pi2 {

/**
 * Root-mean-square norm: out = x / sqrt(mean(x^2) + epsilon) * weight. Layer norm: the mean is subtracted first and `bias`
 * (may be null) added last. Sums in double: norms are short and decide everything after them. x and out may be the same.
 */
inline void normalize(NormKind kind, float epsilon, const float* x, const float* weight, const float* bias, size_t n,
                      float* out) {
  double mean = 0;
  if (kind == NormKind::kLayer) {
    for (size_t i = 0; i < n; i++) mean += x[i];
    mean /= static_cast<double>(n);
  }
  double square = 0;
  for (size_t i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  const float scale = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(n) + epsilon));
  const float shift = static_cast<float>(mean);
  for (size_t i = 0; i < n; i++) out[i] = (x[i] - shift) * scale * weight[i] + (bias != nullptr ? bias[i] : 0.0f);
}

/** Rotary embedding of one head at `position`: pairs (i, i + head_dim/2) turned by position * frequencies[i]. */
inline void rotate(float* head, const float* frequencies, size_t head_dim, size_t position) {
  const size_t half = head_dim / 2;
  for (size_t i = 0; i < half; i++) {
    const double angle = static_cast<double>(position) * frequencies[i];
    const float cosine = static_cast<float>(std::cos(angle));
    const float sine = static_cast<float>(std::sin(angle));
    const float first = head[i];
    const float second = head[i + half];
    head[i] = first * cosine - second * sine;
    head[i + half] = second * cosine + first * sine;
  }
}

}  // namespace pi2
