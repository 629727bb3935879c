#pragma once
#include <cstddef>
#include <cstdint>

#include "native/kernels/encoding.h"
#include "native/kernels/kernels.h"

namespace pi2 {

/** A matrix of encoded rows [rows x columns]; no rows if the model has none of it. */
struct Matrix {
  const uint8_t* data = nullptr;
  Encoding encoding = Encoding::kF32;
  size_t rows = 0;
  size_t columns = 0;

  bool exists() const { return data != nullptr; }
  size_t row_bytes() const { return pi2::row_bytes(encoding, columns); }
  size_t bytes() const { return rows * row_bytes(); }
  /** Rows from `first` on. */
  Rows rows_from(size_t first) const {
    const uint8_t* row = data + first * row_bytes();
    return {row, row + weight_bytes(encoding, columns), row_bytes()};
  }
  const float* floats() const { return reinterpret_cast<const float*>(data); }
};

}  // namespace pi2
