/**
 * Encoding against the equations of docs/FORMAT.md, number by number, and a checksum of all that was encoded: the same for
 * every set of flags that this file and encode.cc are compiled with. Prints "encode: N checks, CHECKSUM", or what is wrong.
 */
#include "native/quantize/encode.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "native/base/crc32.h"
#include "native/kernels/half.h"

using namespace pi2;

namespace {

struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  /** About normal: the sum of some even ones. */
  float number() {
    float sum = 0;
    for (int i = 0; i < 6; i++) sum += static_cast<float>(next() % 65536) - 32767.5f;
    return sum / 46000.0f;
  }
};

float value_of(const std::vector<uint8_t>& source, SourceType type, size_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, source.data() + i * source_type_bytes(type), source_type_bytes(type));
  if (type == SourceType::kF16) return half_to_float_scalar(static_cast<uint16_t>(bits));
  if (type == SourceType::kBf16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/** Sums of products in the order that is promised: every fourth, then the four. */
struct Sum {
  float lanes[4] = {};
  void add(size_t i, float value) { lanes[i % 4] += value; }
  float total() const { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }
};

float rounded(float x, float low, float high) { return std::min(std::max(std::nearbyintf(x), low), high); }

const std::vector<float> kBlockLevels = {-8.6f, -8.3f, -8.0f, -7.7f, -7.4f, -7.1f, 6.2f, 6.5f, 6.8f, 7.1f, 7.4f};
const std::vector<float> kTileLevels = {-13.6f, -12.8f, -12.0f, -11.2f, -10.4f, -9.6f, -8.8f, -8.0f, -7.2f,
                                        6.4f,   7.2f,   8.0f,   8.8f,   9.6f,   10.4f, 11.2f, 12.0f, 12.8f};

uint16_t q4_scale(const float* x, size_t count, const std::vector<float>& levels) {
  float largest = 0;
  for (size_t i = 0; i < count; i++) {
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  }
  float best = 0;
  float scale = 0;
  for (const float level : levels) {
    const float candidate = largest / level;
    if (!(std::fabs(candidate) >= 5.9604645e-8f)) return 0;
    const float inverse = 1.0f / candidate;
    Sum product;
    Sum square;
    for (size_t i = 0; i < count; i++) {
      const float q = rounded(x[i] * inverse, -8, 7);
      product.add(i, x[i] * q);
      square.add(i, q * q);
    }
    const float p = product.total();
    const float s = square.total();
    if (s > 0 && p * p / s > best) {
      best = p * p / s;
      scale = p / s;
    }
  }
  return float_to_half_scalar(scale);
}

/** What one vector must become, padded with zero. */
std::vector<uint8_t> expected(std::vector<float> x, Encoding encoding) {
  const size_t n = x.size();
  std::vector<uint8_t> out(row_bytes(encoding, n), 0);
  if (encoding == Encoding::kF32) {
    std::memcpy(out.data(), x.data(), 4 * n);
    return out;
  }
  x.resize(group_count(n) * kGroup, 0.0f);
  for (size_t block = 0; block < x.size() / kBlock; block++) {
    const float* values = x.data() + block * kBlock;
    if (encoding == Encoding::kF16) {
      for (size_t e = 0; e < kBlock; e++) {
        const uint16_t half = float_to_half_scalar(values[e]);
        std::memcpy(out.data() + 2 * (block * kBlock + e), &half, 2);
      }
      continue;
    }
    const bool is_q4 = encoding == Encoding::kQ4;
    float largest = 0;
    for (size_t e = 0; e < kBlock; e++) largest = std::max(largest, std::fabs(values[e]));
    const uint16_t half = is_q4 ? q4_scale(values, kBlock, kBlockLevels) : float_to_half_scalar(largest / 127.0f);
    std::memcpy(out.data() + weight_bytes(encoding, n) + 2 * block, &half, 2);
    const float scale = half_to_float_scalar(half);
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    uint8_t* group = out.data() + block / kGroupBlocks * (is_q4 ? kQ4GroupBytes : kQ8GroupBytes);
    for (size_t e = 0; e < kBlock; e++) {
      if (is_q4) {
        const int nibble = static_cast<int>(rounded(values[e] * inverse, -8, 7)) + 8;
        group[q4_byte(block % kGroupBlocks, e)] |= static_cast<uint8_t>(nibble << (q4_is_high(e) ? 4 : 0));
      } else {
        group[q8_byte(block % kGroupBlocks, e)] =
            static_cast<uint8_t>(static_cast<int>(rounded(values[e] * inverse, -127, 127)));
      }
    }
  }
  return out;
}

size_t checks = 0;
uint32_t checksum = 0;
bool failed = false;

void expect(bool is_right, const char* what, size_t a, size_t b) {
  checks++;
  if (!is_right) std::printf("FAILED: %s %zu %zu\n", what, a, b);
  failed |= !is_right;
}

/** Numbers of all magnitudes: blocks of zeros, of what no half float can scale, ties of sign and of rounding. */
std::vector<uint8_t> numbers(Random* random, SourceType type, size_t count) {
  std::vector<uint8_t> source(count * source_type_bytes(type));
  for (size_t i = 0; i < count; i++) {
    float value = random->number();
    switch (i / kBlock % 9) {
      case 1: value = 0; break;
      case 2: value *= 1e-7f; break;
      case 3: value *= 1e-40f; break;
      case 4: value = static_cast<float>(static_cast<int>(random->next() % 17) - 8) * 0.25f; break;
      case 5: value = random->next() % 2 == 0 ? 1.5f : -1.5f; break;
      case 6: value *= 9000.0f; break;
      default: break;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == SourceType::kBf16) bits >>= 16;
    if (type == SourceType::kF16) bits = float_to_half_scalar(value);
    std::memcpy(source.data() + i * source_type_bytes(type), &bits, source_type_bytes(type));
  }
  return source;
}

void check_shape(Random* random, SourceType type, Encoding encoding, size_t rows, size_t columns, bool by_columns) {
  const std::vector<uint8_t> source = numbers(random, type, rows * columns);
  const size_t vectors = by_columns ? columns : rows;
  const size_t length = by_columns ? rows : columns;
  const size_t bytes = row_bytes(encoding, length);
  // Every third vector is skipped, the others change places; what is not written stays as it was.
  std::vector<uint32_t> order(vectors);
  for (size_t v = 0; v < vectors; v++) order[v] = v % 3 == 2 ? kSkipped : static_cast<uint32_t>(vectors - 1 - v);
  for (const bool ordered : {false, true}) {
    std::vector<uint8_t> out(vectors * bytes, 0xa5);
    const Placement placement{1, bytes, 0, bytes, weight_bytes(encoding, length), bytes};
    const EncodeRequest request{
        source.data(), type, rows, columns, encoding, out.data(), placement, 0, ordered ? order.data() : nullptr, 3};
    expect(!(by_columns ? encode_columns(request, 0) : encode_rows(request)).found, "a number is refused", rows, columns);
    for (size_t v = 0; v < vectors; v++) {
      std::vector<float> x(length);
      for (size_t i = 0; i < length; i++) x[i] = value_of(source, type, by_columns ? i * columns + v : v * columns + i);
      const bool skipped = request.skips(v);
      const uint8_t* found = out.data() + (skipped ? vectors - 1 - v : request.vector_of(v)) * bytes;
      const std::vector<uint8_t> wanted = skipped ? std::vector<uint8_t>(bytes, 0xa5) : expected(x, encoding);
      expect(std::equal(wanted.begin(), wanted.end(), found), by_columns ? "column" : "row", v, length);
    }
    checksum = crc32(out.data(), out.size(), checksum);
  }
}

/** The integer of weight `i` of an encoded vector. */
int q4_integer(const uint8_t* row, size_t i) {
  const uint8_t byte = row[i / kGroup * kQ4GroupBytes + q4_byte(i % kGroup / kBlock, i % kBlock)];
  return (q4_is_high(i % kBlock) ? byte >> 4 : byte & 15) - 8;
}

/** One scale for 32 vectors x 32 elements, the best for all of them; in an order and in bands, the same bytes. */
void check_tiles(Random* random, SourceType type, size_t rows, size_t columns) {
  const std::vector<uint8_t> source = numbers(random, type, rows * columns);
  const size_t bytes = row_bytes(Encoding::kQ4, rows);
  const size_t weights = weight_bytes(Encoding::kQ4, rows);
  const Placement placement{1, bytes, 0, bytes, weights, bytes};
  std::vector<uint8_t> out(columns * bytes);
  const EncodeRequest request{source.data(), type, rows, columns, Encoding::kQ4, out.data(), placement, 0, nullptr, 3};
  expect(!encode_tiles(request, 0).found, "a number is refused", rows, columns);
  for (size_t first = 0; first < columns; first += kTileVectors) {
    const size_t count = std::min(kTileVectors, columns - first);
    for (size_t block = 0; block < group_count(rows) * kGroupBlocks; block++) {
      std::vector<float> x;
      for (size_t v = first; v < first + count; v++) {
        for (size_t i = block * kBlock; i < (block + 1) * kBlock; i++) {
          x.push_back(i < rows ? value_of(source, type, i * columns + v) : 0.0f);
        }
      }
      const uint16_t wanted = q4_scale(x.data(), x.size(), kTileLevels);
      const float scale = half_to_float_scalar(wanted);
      const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
      bool is_right = true;
      for (size_t k = 0; k < x.size(); k++) {
        const uint8_t* row = out.data() + (first + k / kBlock) * bytes;
        uint16_t half;
        std::memcpy(&half, row + weights + 2 * block, 2);
        is_right &= half == wanted;
        is_right &= q4_integer(row, block * kBlock + k % kBlock) == static_cast<int>(rounded(x[k] * inverse, -8, 7));
      }
      expect(is_right, "tile", first, block);
    }
  }
  checksum = crc32(out.data(), out.size(), checksum);

  // Vector number v is column (7 v + 3) mod columns, which is each of them once: 7 divides none of the numbers of columns.
  std::vector<uint8_t> shuffled(source.size());
  std::vector<uint32_t> order(columns);
  const size_t number_bytes = source_type_bytes(type);
  for (size_t v = 0; v < columns; v++) {
    const size_t column = (7 * v + 3) % columns;
    order[column] = static_cast<uint32_t>(v);
    for (size_t row = 0; row < rows; row++) {
      std::memcpy(&shuffled[(row * columns + column) * number_bytes], &source[(row * columns + v) * number_bytes],
                  number_bytes);
    }
  }
  std::vector<uint8_t> again(out.size());
  for (size_t row = 0; row < rows; row += kGroup) {
    EncodeRequest band = request;
    band.source = shuffled.data() + row * columns * number_bytes;
    band.rows = std::min(kGroup, rows - row);
    band.target = again.data();
    band.order = order.data();
    band.threads = 1;
    expect(!encode_tiles(band, row).found, "a number is refused", row, columns);
  }
  expect(again == out, "tiles in an order, band by band", rows, columns);
}

/** The first by row, then column, whatever the threads; not those of skipped vectors. */
void check_bad_numbers(bool by_columns, bool tiles) {
  constexpr size_t kSize = 520;
  std::vector<float> source(kSize * kSize, 0.5f);
  const auto put = [&](size_t row, size_t column, float value) { source[row * kSize + column] = value; };
  put(300, 2, INFINITY);
  put(270, 500, NAN);
  put(270, 400, -1e6f);
  put(1, 7, 1e6f);
  put(7, 1, 1e6f);
  std::vector<uint8_t> out(kSize * row_bytes(Encoding::kQ4, kSize));
  std::vector<uint32_t> order(kSize);
  uint32_t next = 0;
  for (uint32_t v = 0; v < kSize; v++) order[v] = v == 7 || v == 1 ? kSkipped : tiles ? next++ : v;
  const size_t bytes = row_bytes(Encoding::kQ4, kSize);
  for (size_t threads = 1; threads < 5; threads++) {
    EncodeRequest request{reinterpret_cast<const uint8_t*>(source.data()),
                          SourceType::kF32,
                          kSize,
                          kSize,
                          Encoding::kQ4,
                          out.data(),
                          {1, bytes, 0, bytes, weight_bytes(Encoding::kQ4, kSize), bytes},
                          0,
                          order.data(),
                          threads};
    const auto encode = [&] {
      return tiles ? encode_tiles(request, 0) : by_columns ? encode_columns(request, 0) : encode_rows(request);
    };
    const BadNumber bad = encode();
    expect(bad.found && bad.row == 270 && bad.column == 400 && bad.value == -1e6f, "bad number", bad.row, bad.column);
    request.order = nullptr;
    const BadNumber first = encode();
    expect(first.found && first.row == 1 && first.column == 7, "first bad number", first.row, first.column);
  }
}

}  // namespace

int main() {
  Random random;
  for (const SourceType type : {SourceType::kBf16, SourceType::kF16, SourceType::kF32}) {
    for (const Encoding encoding : {Encoding::kQ4, Encoding::kQ8, Encoding::kF16}) {
      for (const bool by_columns : {false, true}) {
        check_shape(&random, type, encoding, 37, 67, by_columns);
        check_shape(&random, type, encoding, 512, 300, by_columns);
      }
    }
  }
  check_shape(&random, SourceType::kBf16, Encoding::kF32, 1, 700, false);
  for (const SourceType type : {SourceType::kBf16, SourceType::kF16, SourceType::kF32}) {
    check_tiles(&random, type, 37, 67);
    check_tiles(&random, type, 600, 96);
  }
  check_bad_numbers(false, false);
  check_bad_numbers(true, false);
  check_bad_numbers(true, true);
  std::printf("encode: %zu checks, %08x\n", checks, checksum);
  return failed ? 1 : 0;
}
