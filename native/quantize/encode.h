#pragma once
/**
 * Encoding of weights for flash (docs/FORMAT.md section 1), offline. The result depends on the numbers alone, never on the
 * machine: no fused multiply-add, and sums in one order (group.h).
 */
#include <cstddef>
#include <cstdint>

#include "native/kernels/encoding.h"

namespace pi2 {

/** Number types of checkpoints. */
enum class SourceType { kF32, kF16, kBf16 };

constexpr size_t source_type_bytes(SourceType type) { return type == SourceType::kF32 ? 4 : 2; }

/** Where vector v goes; the same struct and formula as `Placement` in src/engine/contract.ts. Bytes. */
struct Placement {
  size_t per_unit;
  size_t unit_bytes;
  size_t weights_offset;
  size_t weights_stride;
  size_t scales_offset;
  size_t scales_stride;

  size_t weights_at(size_t v) const { return v / per_unit * unit_bytes + v % per_unit * weights_stride + weights_offset; }
  size_t scales_at(size_t v) const { return v / per_unit * unit_bytes + v % per_unit * scales_stride + scales_offset; }
};

/** In place of a vector number: this row or column becomes none. */
constexpr uint32_t kSkipped = 0xffffffff;

/** A matrix of numbers and the vectors it becomes. */
struct EncodeRequest {
  const uint8_t* source;
  SourceType source_type;
  size_t rows;
  size_t columns;
  Encoding encoding;
  uint8_t* target;
  Placement placement;
  size_t first_vector;
  /** Null, or the vector number of each source row (column); kSkipped for those that are not wanted. */
  const uint32_t* order;
  size_t threads;

  size_t vector_of(size_t i) const { return order != nullptr ? order[i] : first_vector + i; }
  bool skips(size_t i) const { return order != nullptr && order[i] == kSkipped; }
};

/** The first number (by row, then column) that cannot be stored. */
struct BadNumber {
  bool found = false;
  size_t row = 0;
  size_t column = 0;
  float value = 0;
};

/** Encodes each row as one vector. Targets of distinct vectors must not overlap; the caller has checked all bounds. */
BadNumber encode_rows(const EncodeRequest& request);

/**
 * Encodes each column's part as elements first_element .. first_element + rows of its vector; first_element is a multiple of
 * a group. A last partial group is padded with zero.
 */
BadNumber encode_columns(const EncodeRequest& request, size_t first_element);

/** Vectors that share scales in `encode_tiles`. */
constexpr size_t kTileVectors = kBlock;

/**
 * As `encode_columns`, in q4, with one scale for each tile of 32 vectors x 32 elements (docs/FORMAT.md section 4): it is
 * stored in all of them. Tiles begin at the first vector, which is a multiple of 32 in its expert; the last may be short.
 * With an order the vectors are 0 to some n - 1, each of which exactly one column becomes.
 */
BadNumber encode_tiles(const EncodeRequest& request, size_t first_element);

/** Decodes one vector of `columns` weights to float. */
void decode_vector(const uint8_t* weights, const uint8_t* scales, Encoding encoding, size_t columns, float* out);

}  // namespace pi2
