#pragma once
/** Products of float matrices, for training. */
#include <cstddef>

#include "native/base/thread_pool.h"

namespace pi2 {

/** A matrix of floats whose element (i, k) is data[i * row_stride + k * step]. */
struct MatrixView {
  const float* data;
  size_t row_stride;
  size_t step;
};

/** Floats of scratch for each thread of a product that sums over `depth` terms. */
size_t product_scratch(size_t depth);

/**
 * c (rows, columns) = a (rows, depth) * b (depth, columns); b and c row-major without gaps. An element is summed by one
 * thread in ascending order of depth. `scratch` has product_scratch(depth) floats for each thread of the pool.
 */
void multiply_matrices(ThreadPool& pool, const MatrixView& a, const float* b, size_t rows, size_t depth, size_t columns,
                       float* scratch, float* c);

}  // namespace pi2
