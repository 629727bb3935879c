#pragma once
#include <cmath>
#include <cstddef>

#include "native/engine/config.h"

namespace pi2 {

/** The sum of term(0) ... term(n - 1), in lanes: one running sum would wait for each addition before the next. */
template <class Term>
double sum_of(size_t n, const Term& term) {
  constexpr size_t kLanes = 8;
  const size_t whole = n / kLanes * kLanes;
  double lanes[kLanes] = {};
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t k = 0; k < kLanes; k++) lanes[k] += term(i + k);
  }
  for (size_t i = whole; i < n; i++) lanes[i - whole] += term(i);
  double sum = 0;
  for (size_t k = 0; k < kLanes; k++) sum += lanes[k];
  return sum;
}

/**
 * Root-mean-square norm: out = x / sqrt(mean(x^2) + epsilon) * weight. Layer norm: the mean is subtracted first and `bias`
 * (may be null) added last. Sums in double: norms are short and decide everything after them. x and out may be the same.
 */
inline void normalize(NormKind kind, float epsilon, const float* x, const float* weight, const float* bias, size_t n,
                      float* out) {
  double mean = 0;
  if (kind == NormKind::kLayer)
    mean = sum_of(n, [&](size_t i) { return static_cast<double>(x[i]); }) / static_cast<double>(n);
  const double square = sum_of(n, [&](size_t i) { return (x[i] - mean) * (x[i] - mean); });
  const float scale = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(n) + epsilon));
  const float shift = static_cast<float>(mean);
  for (size_t i = 0; i < n; i++) out[i] = (x[i] - shift) * scale * weight[i] + (bias != nullptr ? bias[i] : 0.0f);
}

/** turns[i] = cosine, turns[i + head_dim/2] = sine of the angle position * frequencies[i], for the pairs of a head. */
inline void find_turns(const float* frequencies, size_t head_dim, size_t position, float* turns) {
  const size_t half = head_dim / 2;
  for (size_t i = 0; i < half; i++) {
    const double angle = static_cast<double>(position) * frequencies[i];
    turns[i] = static_cast<float>(std::cos(angle));
    turns[i + half] = static_cast<float>(std::sin(angle));
  }
}

/** Rotary embedding of one head: pairs (i, i + head_dim/2) turned by the angles that `find_turns` found. */
inline void rotate(float* head, const float* turns, size_t head_dim) {
  const size_t half = head_dim / 2;
  for (size_t i = 0; i < half; i++) {
    const float first = head[i];
    const float second = head[i + half];
    head[i] = first * turns[i] - second * turns[i + half];
    head[i + half] = second * turns[i] + first * turns[i + half];
  }
}

}  // namespace pi2
