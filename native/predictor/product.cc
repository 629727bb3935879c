#include "native/predictor/product.h"

#include <algorithm>
#include <cstring>

#include "native/base/vector_code.h"

namespace pi2 {
namespace {

constexpr size_t kWidth = 16;
/** Six rows of accumulators, a row of b and a number of a: what fits the registers of AVX2. */
constexpr size_t kRows = 6;

typedef float Lanes __attribute__((vector_size(kWidth * sizeof(float))));

/** c (rows, columns <= kWidth) of a panel (depth, kWidth). */
template <size_t rows>
inline __attribute__((always_inline)) void multiply_tile(const float* a, size_t row_stride, size_t step, const float* panel,
                                                         size_t depth, float* c, size_t c_stride, size_t columns) {
  Lanes sums[rows] = {};
  for (size_t k = 0; k < depth; k++) {
    Lanes b;
    std::memcpy(&b, panel + k * kWidth, sizeof b);
    for (size_t i = 0; i < rows; i++) sums[i] += a[i * row_stride + k * step] * b;
  }
  for (size_t i = 0; i < rows; i++) std::memcpy(c + i * c_stride, &sums[i], columns * sizeof(float));
}

/** One column of panels: copies the panel together, then goes down the rows of a. */
PI2_VECTOR_CODE("avx512f", "fma")
void multiply_panel(const MatrixView& a, const float* b, size_t rows, size_t depth, size_t columns, size_t first,
                    float* panel, float* c) {
  const size_t width = std::min(kWidth, columns - first);
  for (size_t k = 0; k < depth; k++) {
    std::memcpy(panel + k * kWidth, b + k * columns + first, width * sizeof(float));
    std::fill(panel + k * kWidth + width, panel + (k + 1) * kWidth, 0.0f);
  }
  size_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    multiply_tile<kRows>(a.data + row * a.row_stride, a.row_stride, a.step, panel, depth, c + row * columns + first, columns,
                         width);
  }
  for (; row < rows; row++) {
    multiply_tile<1>(a.data + row * a.row_stride, a.row_stride, a.step, panel, depth, c + row * columns + first, columns,
                     width);
  }
}

}  // namespace

size_t product_scratch(size_t depth) { return depth * kWidth; }

void multiply_matrices(ThreadPool& pool, const MatrixView& a, const float* b, size_t rows, size_t depth, size_t columns,
                       float* scratch, float* c) {
  pool.run((columns + kWidth - 1) / kWidth, [&](size_t panel, size_t thread) {
    multiply_panel(a, b, rows, depth, columns, panel * kWidth, scratch + thread * product_scratch(depth), c);
  });
}

}  // namespace pi2
