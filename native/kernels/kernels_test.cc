/**
 * Tests every kernel set this CPU can run. Results are compared with dot products and sums in double precision over weights
 * decoded here, from the text of docs/FORMAT.md, not with the kernels' own helpers; integer parts and conversions must equal
 * the scalar set bit for bit; and a result must not depend on how the caller cuts the work. Buffers end at an unreadable
 * page, so reading past a vector is a crash. Prints a line for each set; exit code 1 if anything failed.
 */
#include "native/kernels/kernels.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "native/kernels/dispatch.h"
#include "native/kernels/half.h"
#include "native/kernels/tiles.h"

namespace pi2 {
namespace {

// -- Checks -----------------------------------------------------------------------------------------------------------

const char* current_set = "";
const char* current_test = "";
size_t check_count = 0;
size_t failure_count = 0;

/** Counts a check; if it failed, says so in words. Only the first failures are printed. */
__attribute__((format(printf, 2, 3))) void check(bool holds, const char* format, ...) {
  check_count++;
  if (holds) return;
  if (++failure_count > 20) return;
  std::printf("FAILED %s %s: ", current_set, current_test);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

void check_close(double actual, double expected, double terms, size_t n, const char* what, size_t index) {
  const double tolerance = 3e-7 * std::sqrt(static_cast<double>(n) + 4) * terms + 1e-37;
  check(std::fabs(actual - expected) <= tolerance, "%s %zu of %zu terms: %.9g instead of %.9g, tolerance %.3g", what, index,
        n, actual, expected, tolerance);
}

void check_same(const void* actual, const void* expected, size_t bytes, const char* what, size_t index) {
  check(bytes == 0 || std::memcmp(actual, expected, bytes) == 0, "%s %zu: bits differ", what, index);
}

/** A kernel touched an unreadable page: the name of the test is all there is to say. */
void report_crash(int) {
  char line[200];
  const int length =
      std::snprintf(line, sizeof line, "FAILED %s %s: read or wrote outside its data\n", current_set, current_test);
  if (write(1, line, static_cast<size_t>(length)) < 0) _exit(3);
  _exit(2);
}

// -- Data -------------------------------------------------------------------------------------------------------------

uint64_t random_state = 1;

uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(random_state >> 32);
}

size_t random_below(size_t limit) { return random_bits() % limit; }

float random_float() { return static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-31f; }

float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

/** The number a half stands for, from its definition. */
double half_value(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  const double sign = half & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * HUGE_VAL;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

/** A finite scale: mostly ordinary, sometimes zero, subnormal, huge or negative. */
uint16_t random_scale() {
  const uint16_t sign = static_cast<uint16_t>(random_bits() & 0x8000);
  switch (random_below(16)) {
    case 0: return 0;
    case 1: return static_cast<uint16_t>(sign | random_below(1024));
    case 2: return static_cast<uint16_t>(sign | 0x7bff);
    default: return static_cast<uint16_t>(sign | (0x2000 + random_below(0x1000)));
  }
}

/** An activation: mostly ordinary, sometimes zero, denormal, tiny or large. */
float random_activation() {
  switch (random_below(24)) {
    case 0: return 0;
    case 1: return random_float() * 1e-39f;
    case 2: return random_float() * 1e-12f;
    case 3: return random_float() * 300;
    default: return random_float();
  }
}

/** `count` items of T whose end is the end of readable memory. */
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t readable = (count * sizeof(T) + page - 1) / page * page;
    mapped_bytes_ = readable + page;
    void* mapping = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) std::abort();
    mapping_ = static_cast<uint8_t*>(mapping);
    if (mprotect(mapping_ + readable, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(mapping_ + readable - count * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(mapping_, mapped_bytes_); }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t index) const { return data_[index]; }

 private:
  size_t count_;
  size_t mapped_bytes_;
  uint8_t* mapping_;
  T* data_;
};

/** Vectors of random weights, as a tensor's rows or as a neuron's columns, with their values in double precision. */
struct Matrix {
  Encoding encoding;
  size_t groups;
  size_t stride;
  Guarded<uint8_t> weights;
  Guarded<uint8_t> scales;
  std::vector<std::vector<double>> values;

  Matrix(Encoding encoding_, size_t count, size_t groups_)
      : Matrix(encoding_, count, groups_, weight_bytes(encoding_, groups_ * kGroup) + random_below(80)) {}

  Matrix(Encoding encoding_, size_t count, size_t groups_, size_t stride_)
      : encoding(encoding_),
        groups(groups_),
        stride(stride_),
        weights((count - 1) * stride + weight_bytes(encoding, groups * kGroup)),
        scales((count - 1) * stride + kGroupScaleBytes * groups) {
    for (size_t i = 0; i < weights.size(); i++) weights[i] = static_cast<uint8_t>(random_bits() >> 9);
    for (size_t v = 0; v < count; v++) fill(v);
    for (size_t v = 0; v < count; v++) values.push_back(decode(v));
  }

  Rows rows() const { return {weights.data(), scales.data(), stride}; }
  Rows rows_from(size_t v) const { return {weights.data() + v * stride, scales.data() + v * stride, stride}; }
  Column column(size_t v, float factor) const { return {weights.data() + v * stride, scales.data() + v * stride, factor}; }

  /** What makes a stored weight of vector v unsigned: 8 or 128 scales, or nothing for floats. */
  double offset(size_t v, size_t index) const {
    if (encoding == Encoding::kF16) return 0;
    uint16_t scale;
    std::memcpy(&scale, scales.data() + v * stride + 2 * (index / kBlock), 2);
    return (encoding == Encoding::kQ4 ? 8 : 128) * std::fabs(half_value(scale));
  }

  /** Makes every product with vector v a NaN. */
  void poison(size_t v) {
    const uint16_t nan = 0x7e00;
    for (size_t i = 0; i < groups * kGroupBlocks; i++) std::memcpy(scales.data() + v * stride + 2 * i, &nan, 2);
    if (encoding != Encoding::kF16) return;
    for (size_t i = 0; i < groups * kGroup; i++) std::memcpy(weights.data() + v * stride + 2 * i, &nan, 2);
  }

 private:
  void fill(size_t v) {
    uint8_t* vector = weights.data() + v * stride;
    for (size_t i = 0; i < groups * kGroupBlocks; i++) {
      const uint16_t scale = random_scale();
      std::memcpy(scales.data() + v * stride + 2 * i, &scale, 2);
    }
    for (size_t i = 0; i < groups * kGroup; i++) {
      if (encoding == Encoding::kQ8 && vector[i] == 0x80) vector[i] = 0x81;
      if (encoding != Encoding::kF16) continue;
      const uint16_t half = random_below(64)
                                ? static_cast<uint16_t>((random_bits() & 0x83ff) | (0x2c00 + (random_bits() & 0xc00)))
                                : random_scale();
      std::memcpy(vector + 2 * i, &half, 2);
    }
  }

  std::vector<double> decode(size_t v) const {
    std::vector<double> out(groups * kGroup);
    const uint8_t* vector = weights.data() + v * stride;
    const auto half_at = [](const uint8_t* from, size_t index) {
      uint16_t half;
      std::memcpy(&half, from + 2 * index, 2);
      return half_value(half);
    };
    for (size_t i = 0; encoding == Encoding::kF16 && i < out.size(); i++) out[i] = half_at(vector, i);
    if (encoding == Encoding::kF16) return out;
    for (size_t g = 0; g < groups; g++) {
      // Over the bytes of a group in file order: line, half, block, byte.
      const size_t lines = encoding == Encoding::kQ4 ? 2 : 4;
      for (size_t line = 0; line < lines; line++) {
        for (size_t half = 0; half < 2; half++) {
          for (size_t block = 0; block < 8; block++) {
            const double scale = half_at(scales.data() + v * stride, 8 * g + block);
            for (size_t byte = 0; byte < 4; byte++) {
              const uint8_t stored = vector[64 * lines * g + 64 * line + 32 * half + 4 * block + byte];
              double* values_of_block = out.data() + 256 * g + 32 * block;
              if (encoding == Encoding::kQ8) {
                values_of_block[8 * line + 4 * half + byte] = scale * static_cast<int8_t>(stored);
              } else {
                values_of_block[16 * line + 4 * half + byte] = scale * ((stored & 15) - 8);
                values_of_block[16 * line + 8 + 4 * half + byte] = scale * ((stored >> 4) - 8);
              }
            }
          }
        }
      }
    }
    return out;
  }
};

/** Activations of several tokens, float and quantized, with the values both stand for. */
struct Activations {
  size_t groups;
  Guarded<float> floats;
  Guarded<QuantizedGroup> quantized;

  Activations(size_t tokens, size_t groups_)
      : groups(groups_), floats(tokens * groups * kGroup), quantized(tokens * groups) {
    for (size_t i = 0; i < floats.size(); i++) floats[i] = random_activation();
    scalar_kernels().quantize(floats.data(), floats.size(), quantized.data());
  }

  double value(Encoding encoding, size_t token, size_t index) const {
    if (encoding == Encoding::kF16) return static_cast<double>(floats[token * groups * kGroup + index]);
    const QuantizedGroup& group = quantized[token * groups + index / 256];
    const size_t block = index / 32 % 8, element = index % 32;
    const size_t byte = 64 * (element / 8) + 32 * (element % 8 / 4) + 4 * block + element % 4;
    return static_cast<double>(group.scales[block]) * group.values[byte];
  }
};

const Encoding kEncodings[] = {Encoding::kQ4, Encoding::kQ8, Encoding::kF16};
const char* name_of(Encoding encoding) {
  return encoding == Encoding::kQ4 ? "q4" : encoding == Encoding::kQ8 ? "q8" : "f16";
}

// -- Conversions ------------------------------------------------------------------------------------------------------

/** The nearest half of a finite or infinite float, ties to even, by search among all halves. */
uint16_t nearest_half(float f) {
  const double magnitude = std::fabs(static_cast<double>(f));
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  uint16_t low = 0, high = 0x7c00;  // half_value(low) <= magnitude; 0x7c00 stands for the 65536 that would come next.
  const auto value = [](uint16_t half) { return half == 0x7c00 ? 65536.0 : half_value(half); };
  if (magnitude >= 65536) return sign | 0x7c00;
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (value(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - value(low), above = value(high) - magnitude;
  return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}

void test_conversions(const Kernels& kernels) {
  current_test = "half_to_float_scalar";
  for (size_t h = 0; h < 65536; h++) {
    const double expected = half_value(static_cast<uint16_t>(h));
    const float scalar = half_to_float_scalar(static_cast<uint16_t>(h));
    check(std::isnan(expected) ? std::isnan(scalar) : static_cast<double>(scalar) == expected, "half %zu is %g", h,
          static_cast<double>(scalar));
  }

  current_test = "float_to_half";
  std::vector<float> inputs;
  for (uint32_t h = 0; h < 0x7c00; h++) {  // Every half, every tie, and their neighbours.
    const float value = half_to_float_scalar(static_cast<uint16_t>(h));
    const double next = h == 0x7bff ? 65536 : half_value(static_cast<uint16_t>(h + 1));
    const float tie = static_cast<float>((static_cast<double>(value) + next) / 2);
    for (const float f : {value, tie}) {
      for (const float near : {f, std::nextafterf(f, -1e30f), std::nextafterf(f, 1e30f)}) {
        inputs.push_back(near);
        inputs.push_back(-near);
      }
    }
  }
  for (size_t i = 0; i < 100000; i++) inputs.push_back(float_of(random_bits()));
  for (const uint32_t bits :
       {0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0xffffe000u, 0x7f7fffffu, 1u, 0x80000000u}) {
    inputs.push_back(float_of(bits));
  }
  std::vector<uint16_t> outputs(inputs.size());
  kernels.float_to_half(inputs.data(), inputs.size(), outputs.data());
  for (size_t i = 0; i < inputs.size(); i++) {
    const uint16_t scalar = float_to_half_scalar(inputs[i]);
    check(outputs[i] == scalar, "%g becomes %04x instead of %04x", static_cast<double>(inputs[i]), outputs[i], scalar);
    const bool right = std::isnan(inputs[i]) ? std::isnan(half_value(scalar)) : scalar == nearest_half(inputs[i]);
    check(right, "the half of %g is %04x", static_cast<double>(inputs[i]), scalar);
  }

  for (size_t n = 0; n < 40; n++) {
    Guarded<float> from(n);
    Guarded<uint16_t> to(n);
    for (size_t i = 0; i < n; i++) from[i] = random_float();
    current_test = "float_to_half";
    kernels.float_to_half(from.data(), n, to.data());
    for (size_t i = 0; i < n; i++) check(to[i] == float_to_half_scalar(from[i]), "element %zu of %zu", i, n);
  }
}

// -- Quantization -----------------------------------------------------------------------------------------------------

void check_quantized_block(const float* x, size_t count, const QuantizedGroup& group, size_t block) {
  float largest = 0;
  bool finite = true;
  for (size_t e = 0; e < count; e++) {
    finite = finite && std::isfinite(x[e]);
    largest = std::fmax(largest, std::fabs(x[e]));
  }
  const float scale = group.scales[block];
  check(finite ? std::fabs(scale - largest / 127) <= 1e-7f * scale + 1e-37f : std::isnan(scale),
        "scale %g of a block up to %g", static_cast<double>(scale), static_cast<double>(largest));
  int sum = 0;
  for (size_t e = 0; e < 32; e++) {
    const int value = group.values[64 * (e / 8) + 32 * (e / 4 % 2) + 4 * block + e % 4];
    sum += value;
    const bool in_range = value >= -127 && value <= 127 && (e < count || value == 0) && (finite || value == 0);
    check(in_range, "value %d of element %zu of %zu", value, e, count);
    if (!finite || e >= count) continue;
    const double error = std::fabs(static_cast<double>(scale) * value - static_cast<double>(x[e]));
    check(error <= 0.50001 * static_cast<double>(scale) + 1e-36, "%g becomes %d times %g", static_cast<double>(x[e]), value,
          static_cast<double>(scale));
  }
  check(group.q4_offset[block] == -8 * sum && group.q4_offset[block + 8] == 0, "q4 offset");
  check_same(&group.scales[block + 8], &scale, sizeof scale, "second copy of scale", block);
}

void test_quantize(const Kernels& kernels) {
  current_test = "quantize";
  const size_t sizes[] = {1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 100, 255, 256, 257, 300, 511, 512, 513, 1000, 4096, 4097};
  for (size_t n : sizes) {
    for (size_t kind = 0; kind < 8; kind++) {
      const size_t groups = (n + 255) / 256;
      Guarded<float> x(groups * 256);
      for (size_t i = 0; i < x.size(); i++) {
        const float tie = static_cast<float>(static_cast<int>(random_below(255)) - 127) / 2;
        const float kinds[] = {random_float(),
                               random_activation(),
                               random_float() * 3e38f,
                               0,
                               random_float() * 1e-38f,
                               random_float() * 4e-37f,
                               tie,
                               random_float()};
        x[i] = i < n ? kinds[kind] : NAN;  // What lies behind x[n) must not matter.
      }
      if (kind == 6) x[0] = 127;  // An inverse of one or more: halves are ties.
      if (kind == 7) x[random_below(n)] = random_below(2) ? NAN : -INFINITY;
      Guarded<QuantizedGroup> expected(groups), actual(groups);
      std::memset(static_cast<void*>(actual.data()), 0xa5, groups * sizeof(QuantizedGroup));
      scalar_kernels().quantize(x.data(), n, expected.data());
      kernels.quantize(x.data(), n, actual.data());
      for (size_t g = 0; g < groups; g++) {
        check_same(&actual[g], &expected[g], sizeof(QuantizedGroup), "group", g);
        for (size_t b = 0; b < 8; b++) {
          const size_t begin = 256 * g + 32 * b;
          check_quantized_block(x.data() + begin, begin >= n ? 0 : n - begin < 32 ? n - begin : 32, actual[g], b);
        }
      }
    }
  }
}

// -- Dot products -----------------------------------------------------------------------------------------------------

void run_dot(const Kernels& kernels, Encoding encoding, Rows rows, size_t row_count, const Activations& x, size_t token,
             float* y) {
  const QuantizedGroup* quantized = x.quantized.data() + token * x.groups;
  if (encoding == Encoding::kQ4) kernels.dot_q4(rows, row_count, x.groups, quantized, y);
  if (encoding == Encoding::kQ8) kernels.dot_q8(rows, row_count, x.groups, quantized, y);
  if (encoding == Encoding::kF16) {
    kernels.dot_f16(rows, row_count, x.groups, x.floats.data() + token * x.groups * kGroup, y);
  }
}

void run_list(const Kernels& kernels, Encoding encoding, const uint8_t* const* rows, size_t scales_offset, size_t row_count,
              const Activations& x, size_t token, float* y) {
  const QuantizedGroup* quantized = x.quantized.data() + token * x.groups;
  if (encoding == Encoding::kQ4) kernels.dot_list_q4(rows, scales_offset, row_count, x.groups, quantized, y);
  if (encoding == Encoding::kQ8) kernels.dot_list_q8(rows, scales_offset, row_count, x.groups, quantized, y);
  if (encoding == Encoding::kF16) {
    kernels.dot_list_f16(rows, row_count, x.groups, x.floats.data() + token * x.groups * kGroup, y);
  }
}

void run_matmul(const Kernels& kernels, Encoding encoding, Rows rows, size_t row_count, const Activations& x, size_t tokens,
                float* y, size_t y_stride) {
  if (encoding == Encoding::kQ4) kernels.matmul_q4(rows, row_count, x.groups, x.quantized.data(), tokens, y, y_stride);
  if (encoding == Encoding::kQ8) kernels.matmul_q8(rows, row_count, x.groups, x.quantized.data(), tokens, y, y_stride);
  if (encoding == Encoding::kF16) {
    kernels.matmul_f16(rows, row_count, x.groups, x.floats.data(), x.groups * kGroup, tokens, y, y_stride);
  }
}

void test_dot(const Kernels& kernels, Encoding encoding, size_t row_count, size_t groups, size_t tokens) {
  const Matrix matrix(encoding, row_count, groups);
  const Activations x(tokens, groups);
  const size_t y_stride = row_count + 3;
  std::vector<float> y(tokens * y_stride, 99), one(row_count);
  run_matmul(kernels, encoding, matrix.rows(), row_count, x, tokens, y.data(), y_stride);
  for (size_t t = 0; t < tokens; t++) {
    for (size_t r = 0; r < row_count; r++) {
      double expected = 0, terms = 0;
      for (size_t i = 0; i < groups * kGroup; i++) {
        const double value = x.value(encoding, t, i);
        expected += matrix.values[r][i] * value;
        // A set may take weights as unsigned and undo that by the sum of the activations, so the offset is a term, too.
        terms += (std::fabs(matrix.values[r][i]) + matrix.offset(r, i)) * std::fabs(value);
      }
      check_close(static_cast<double>(y[t * y_stride + r]), expected, terms, groups * kGroup, "matmul row", r);
    }
    for (size_t i = row_count; i < y_stride; i++) check(y[t * y_stride + i] == 99, "matmul wrote past its rows");
    run_dot(kernels, encoding, matrix.rows(), row_count, x, t, one.data());
    check_same(one.data(), y.data() + t * y_stride, row_count * sizeof(float), "dot of all rows, token", t);
    for (size_t r = 0; r < row_count; r++) {
      float alone = 0;
      run_dot(kernels, encoding, matrix.rows_from(r), 1, x, t, &alone);
      check_same(&alone, &one[r], sizeof alone, "dot of row alone", r);
    }
    // Some rows, backwards.
    std::vector<const uint8_t*> list;
    std::vector<float> expected, listed(row_count);
    for (size_t r = row_count; r-- > 0;) {
      if (random_below(4) == 0) continue;
      list.push_back(matrix.rows_from(r).weights);
      expected.push_back(one[r]);
    }
    const size_t scales_offset =
        reinterpret_cast<uintptr_t>(matrix.scales.data()) - reinterpret_cast<uintptr_t>(matrix.weights.data());
    run_list(kernels, encoding, list.data(), scales_offset, list.size(), x, t, listed.data());
    check_same(listed.data(), expected.data(), expected.size() * sizeof(float), "dot of a list of rows, token", t);
  }
}

void test_dots(const Kernels& kernels) {
  for (const Encoding encoding : kEncodings) {
    char name[32];
    std::snprintf(name, sizeof name, "dot_%s, dot_list and matmul", name_of(encoding));
    current_test = name;
    for (size_t groups = 1; groups <= 33; groups += 1 + groups / 3)
      test_dot(kernels, encoding, 1 + random_below(9), groups, 2);
    for (size_t rows = 1; rows <= 70; rows += 1 + rows / 5) test_dot(kernels, encoding, rows, 2, 1 + random_below(4));
    for (size_t tokens = 1; tokens <= 17; tokens++)
      test_dot(kernels, encoding, 1 + random_below(6), 1 + random_below(3), tokens);
  }
  current_test = "dot_f32";
  for (const size_t n : {1, 2, 7, 8, 9, 31, 64, 100, 255, 256, 257, 1000, 4095}) {
    for (const size_t row_count : {1, 2, 5, 8, 13}) {
      Guarded<float> rows(row_count * n), x((n + 255) / 256 * 256);
      for (size_t i = 0; i < rows.size(); i++) rows[i] = random_activation();
      for (size_t i = 0; i < x.size(); i++) x[i] = i < n ? random_activation() : 0;
      std::vector<float> y(row_count);
      kernels.dot_f32(rows.data(), row_count, n, x.data(), y.data());
      for (size_t r = 0; r < row_count; r++) {
        double expected = 0, terms = 0;
        for (size_t i = 0; i < n; i++) {
          const double term = static_cast<double>(rows[r * n + i]) * static_cast<double>(x[i]);
          expected += term;
          terms += std::fabs(term);
        }
        check_close(static_cast<double>(y[r]), expected, terms, n, "row", r);
        float alone = 0;
        kernels.dot_f32(rows.data() + r * n, 1, n, x.data(), &alone);
        check_same(&alone, &y[r], sizeof alone, "row alone", r);
      }
    }
  }
}

// -- Sums of columns --------------------------------------------------------------------------------------------------

void run_add(const Kernels& kernels, Encoding encoding, const Column* columns, size_t count, size_t group_begin,
             size_t group_end, float* y) {
  if (encoding == Encoding::kQ4) kernels.add_columns_q4(columns, count, group_begin, group_end, y);
  if (encoding == Encoding::kQ8) kernels.add_columns_q8(columns, count, group_begin, group_end, y);
  if (encoding == Encoding::kF16) kernels.add_columns_f16(columns, count, group_begin, group_end, y);
}

/** Columns are neurons 0, 2, 4 … and then 1, 3, 5 … of the matrix: a list need not be in the order of memory. */
uint32_t neuron_of(size_t c, size_t count) {
  const size_t even = (count + 1) / 2;
  return static_cast<uint32_t>(c < even ? 2 * c : 2 * (c - even) + 1);
}

void run_batch(const Kernels& kernels, Encoding encoding, Rows columns, size_t count, size_t group_begin, size_t group_end,
               const float* factors, size_t factor_stride, size_t tokens, float* y, size_t y_stride) {
  const auto run = encoding == Encoding::kQ4   ? kernels.add_columns_batch_q4
                   : encoding == Encoding::kQ8 ? kernels.add_columns_batch_q8
                                               : kernels.add_columns_batch_f16;
  std::vector<uint32_t> neurons(count);
  for (size_t c = 0; c < count; c++) neurons[c] = neuron_of(c, count);
  run({columns, neurons.data(), count, factors, factor_stride}, group_begin, group_end, tokens, y, y_stride);
}

/** `tokens` outputs; a third of the columns is used by no token and must not be looked at. */
void test_add(const Kernels& kernels, Encoding encoding, size_t count, size_t groups, size_t tokens) {
  Matrix matrix(encoding, count, groups);
  const size_t n = groups * kGroup;
  const size_t factor_stride = tokens + random_below(3);
  std::vector<float> factors(count * factor_stride, 77);
  std::vector<bool> used(count, false);
  for (size_t c = 0; c < count; c++) {
    for (size_t t = 0; t < tokens; t++) {
      factors[c * factor_stride + t] = c % 3 == 1 || random_below(3) == 0 ? 0 : random_float();
      used[c] = used[c] || factors[c * factor_stride + t] != 0;
    }
    if (!used[c]) matrix.poison(c);
  }
  Guarded<float> start(tokens * n), batch(tokens * n), single(n), parts(n);
  for (size_t i = 0; i < start.size(); i++) start[i] = batch[i] = random_float();
  const size_t group_begin = random_below(groups), group_end = group_begin + 1 + random_below(groups - group_begin);
  run_batch(kernels, encoding, matrix.rows(), count, group_begin, group_end, factors.data(), factor_stride, tokens,
            batch.data(), n);

  for (size_t t = 0; t < tokens; t++) {
    std::vector<Column> columns;
    for (size_t c = 0; c < count; c++) {
      const size_t neuron = neuron_of(c, count);
      if (used[neuron]) columns.push_back(matrix.column(neuron, factors[neuron * factor_stride + t]));
    }
    std::memcpy(single.data(), start.data() + t * n, n * sizeof(float));
    run_add(kernels, encoding, columns.data(), columns.size(), group_begin, group_end, single.data());
    check_same(batch.data() + t * n, single.data(), n * sizeof(float), "batch against single call, token", t);

    std::memcpy(parts.data(), start.data() + t * n, n * sizeof(float));
    const size_t cut = random_below(columns.size() + 1);
    for (size_t g = group_begin; g < group_end; g++) {
      run_add(kernels, encoding, columns.data(), cut, g, g + 1, parts.data());
      run_add(kernels, encoding, columns.data() + cut, columns.size() - cut, g, g + 1, parts.data());
    }
    check_same(parts.data(), single.data(), n * sizeof(float), "cut into groups and two lists, token", t);

    // The set's own order inside a group: what was there before is sorted like the sums.
    kernels.to_natural_order(encoding, start.data() + t * n, groups);
    kernels.to_natural_order(encoding, single.data(), groups);
    for (size_t i = 0; i < n; i++) {
      const double before = static_cast<double>(start[t * n + i]);
      double expected = before, terms = std::fabs(before);
      const bool inside = i / kGroup >= group_begin && i / kGroup < group_end;
      for (size_t c = 0; inside && c < count; c++) {
        if (!used[c]) continue;
        const double term = static_cast<double>(factors[c * factor_stride + t]) * matrix.values[c][i];
        expected += term;
        terms += std::fabs(term);
      }
      if (inside) check_close(static_cast<double>(single[i]), expected, terms, count, "output", i);
      if (!inside) check(single[i] == start[t * n + i], "output %zu outside the range was changed", i);
    }
  }
}

/** A column that no token uses need not be in memory: here each has a page of its own, and every other one loses it. */
void test_unread(const Kernels& kernels, Encoding encoding) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), count = 24, tokens = 3, n = 2 * kGroup;
  const Matrix matrix(encoding, count, 2, page);
  std::vector<float> factors(count * tokens), y(tokens * n, 0);
  for (size_t c = 0; c < count; c += 2) {
    for (size_t t = 0; t < tokens; t++) factors[c * tokens + t] = random_float();
    for (const Guarded<uint8_t>* array : {&matrix.weights, &matrix.scales}) {
      uint8_t* page_of_next = array->data() + array->size() - (count - c - 1) * page;
      if (mprotect(page_of_next, page, PROT_NONE) != 0) std::abort();
    }
  }
  run_batch(kernels, encoding, matrix.rows(), count, 0, 2, factors.data(), tokens, tokens, y.data(), n);
  for (size_t t = 0; t < tokens; t++) kernels.to_natural_order(encoding, y.data() + t * n, 2);
  for (size_t i = 0; i < tokens * n; i++) {
    double expected = 0, terms = 0;
    for (size_t c = 0; c < count; c++) {
      const double term = static_cast<double>(factors[c * tokens + i / n]) * matrix.values[c][i % n];
      expected += term;
      terms += std::fabs(term);
    }
    check_close(static_cast<double>(y[i]), expected, terms, count, "output beside unread columns", i);
  }
}

void test_adds(const Kernels& kernels) {
  for (const Encoding encoding : kEncodings) {
    char name[48];
    std::snprintf(name, sizeof name, "add_columns_%s and its batch", name_of(encoding));
    current_test = name;
    for (size_t count = 1; count <= 70; count += 1 + count / 4) test_add(kernels, encoding, count, 1 + random_below(3), 1);
    for (size_t groups = 1; groups <= 33; groups += 1 + groups / 2) test_add(kernels, encoding, 5, groups, 2);
    for (size_t tokens = 1; tokens <= 17; tokens++) {
      test_add(kernels, encoding, 1 + random_below(40), 1 + random_below(2), tokens);
    }
    test_add(kernels, encoding, 90, 2, 40);
    test_unread(kernels, encoding);
  }
}

// -- The matrix unit --------------------------------------------------------------------------------------------------

/** Both factors of each product are rounded to bf16, to half of 2^-7; sums are float. Numbers below its least count as 0. */
void check_near(float actual, double expected, double terms, size_t n, const char* what, size_t index) {
  const double tolerance =
      (1.01 * 0x1p-7 + 1e-6 * std::sqrt(static_cast<double>(n))) * terms + static_cast<double>(n) * 1e-34;
  check(std::fabs(static_cast<double>(actual) - expected) <= tolerance, "%s %zu: %.9g instead of %.9g, tolerance %.3g", what,
        index, static_cast<double>(actual), expected, tolerance);
}

/** Memory for tiles: on cache lines, full of what is no number. */
class Bf16 {
 public:
  explicit Bf16(size_t count) : memory_(count + 32, 0x7fc1) {}
  uint16_t* data() { return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64); }

 private:
  std::vector<uint16_t> memory_;
};

void test_tile_rows(const TileKernels& tiles, Encoding encoding, size_t rows, size_t groups, size_t tokens) {
  const Matrix matrix(encoding, rows, groups);
  const Activations x(tokens, groups);
  const size_t n = groups * kGroup;
  const auto multiply = encoding == Encoding::kQ4 ? tiles.multiply_q4 : tiles.multiply_q8;
  const size_t y_stride = rows + random_below(3);
  std::vector<float> y(tokens * y_stride, 77);
  const auto packed_of = [&](const float* from, size_t count, Bf16& packed) {
    for (size_t t = 0; t < count; t += kTokenLot) tiles.pack(from, n, groups, t, count, packed.data());
  };
  Bf16 packed(packed_length(groups, tokens));
  packed_of(x.floats.data(), tokens, packed);
  multiply(matrix.rows(), rows, groups, packed.data(), tokens, y.data(), y_stride);
  for (size_t t = 0; t < tokens; t++) {
    for (size_t r = 0; r < rows; r++) {
      double expected = 0, terms = 0;
      for (size_t i = 0; i < n; i++) {
        const double term = matrix.values[r][i] * static_cast<double>(x.floats[t * n + i]);
        expected += term;
        terms += std::fabs(term);
      }
      check_near(y[t * y_stride + r], expected, terms, n, "product of tiles", r);
    }
    for (size_t r = rows; r < y_stride; r++) check(y[t * y_stride + r] == 77, "wrote behind the rows of token %zu", t);
  }
  // Any token and row by themselves.
  for (size_t i = 0; i < 3; i++) {
    const size_t t = random_below(tokens), r = random_below(rows), count = 1 + random_below(rows - r);
    Bf16 alone(packed_length(groups, 1));
    packed_of(x.floats.data() + t * n, 1, alone);
    std::vector<float> some(count);
    multiply(matrix.rows_from(r), count, groups, alone.data(), 1, some.data(), 0);
    check_same(some.data(), y.data() + t * y_stride + r, count * sizeof(float), "a token alone", t);
  }
}

/** A third of the columns is used by no token and not there. */
void test_tile_columns(const Kernels& kernels, Encoding encoding, size_t count, size_t groups, size_t tokens) {
  const TileKernels& tiles = *kernels.tiles;
  const Matrix matrix(encoding, count, groups);
  const auto sum = encoding == Encoding::kQ4 ? tiles.sum_columns_q4 : tiles.sum_columns_q8;
  const size_t scales_offset = static_cast<size_t>(matrix.scales.data() - matrix.weights.data());
  std::vector<float> factors(count * tokens, 0);
  std::vector<const uint8_t*> columns(count, nullptr);
  Bf16 packed(factors_length(count, tokens));
  std::memset(packed.data(), 0, factors_length(count, tokens) * sizeof(uint16_t));
  for (size_t c = 0; c < count; c++) {
    const bool used = c / 40 % 3 != 1 && random_below(3) > 0;
    for (size_t t = 0; used && t < tokens; t++) factors[c * tokens + t] = random_below(3) > 0 ? random_float() : 0;
    if (tiles.put_factors(factors.data() + c * tokens, 1, tokens, c, packed.data()))
      columns[c] = matrix.column(c, 0).weights;
  }
  const TileColumns all{columns.data(), scales_offset, count};
  for (size_t g = 0; g < groups; g++) {
    const size_t y_stride = kGroup + 16;
    std::vector<float> y(tokens * y_stride, 77), alone(kGroup);
    sum(all, packed.data(), g, tokens, y.data(), y_stride);
    const size_t single = random_below(tokens);
    Bf16 of_single(factors_length(count, 1));
    std::memset(of_single.data(), 0, factors_length(count, 1) * sizeof(uint16_t));
    for (size_t c = 0; c < count; c++) tiles.put_factors(&factors[c * tokens + single], 1, 1, c, of_single.data());
    sum(all, of_single.data(), g, 1, alone.data(), 0);
    check_same(alone.data(), y.data() + single * y_stride, kGroup * sizeof(float), "a token alone", single);
    for (size_t t = 0; t < tokens; t++) {
      kernels.to_natural_order(encoding, y.data() + t * y_stride, 1);
      for (size_t i = 0; i < kGroup; i++) {
        double expected = 0, terms = 0;
        for (size_t c = 0; c < count; c++) {
          const double term = static_cast<double>(factors[c * tokens + t]) * matrix.values[c][g * kGroup + i];
          expected += term;
          terms += std::fabs(term);
        }
        check_near(y[t * y_stride + i], expected, terms, count, "sum on tiles", i);
      }
      check(y[t * y_stride + kGroup] == 77, "wrote behind the group of token %zu", t);
    }
  }
}

void test_tiles(const Kernels& kernels) {
  if (kernels.tiles == nullptr) return;
  for (const Encoding encoding : {Encoding::kQ4, Encoding::kQ8}) {
    current_test = "products of tiles";
    test_tile_rows(*kernels.tiles, encoding, 1, 1, 1);
    test_tile_rows(*kernels.tiles, encoding, 70, 3, 37);
    test_tile_rows(*kernels.tiles, encoding, 150, 5, 16);
    test_tile_rows(*kernels.tiles, encoding, 33, 2, 290);
    current_test = "sums on tiles";
    test_tile_columns(kernels, encoding, 1, 1, 1);
    test_tile_columns(kernels, encoding, 200, 2, 37);
    test_tile_columns(kernels, encoding, 1300, 1, 5);
    test_tile_columns(kernels, encoding, 90, 1, 290);
  }
}

// -- Attention --------------------------------------------------------------------------------------------------------

void test_attention(const Kernels& kernels) {
  for (const size_t n : {16, 32, 48, 64, 80, 96, 128, 144, 256}) {
    for (const size_t count : {1, 2, 3, 4, 5, 8, 17, 40}) {
      const size_t stride = n + random_below(3) * 16;
      Guarded<uint16_t> halves((count - 1) * stride + n);
      Guarded<float> q(n), weights(count), scores(count), out(n), parts(n);
      for (size_t i = 0; i < halves.size(); i++) halves[i] = float_to_half_scalar(random_activation());
      for (size_t i = 0; i < n; i++) q[i] = random_activation();
      for (size_t p = 0; p < count; p++) weights[p] = random_float();
      for (size_t i = 0; i < n; i++) out[i] = parts[i] = random_float();

      current_test = "attention_scores";
      kernels.attention_scores(q.data(), halves.data(), stride, n, count, 0.125f, scores.data());
      for (size_t p = 0; p < count; p++) {
        double expected = 0, terms = 0;
        for (size_t i = 0; i < n; i++) {
          const double term = 0.125 * static_cast<double>(q[i]) * half_value(halves[p * stride + i]);
          expected += term;
          terms += std::fabs(term);
        }
        check_close(static_cast<double>(scores[p]), expected, terms, n, "score", p);
        float alone = 0;
        kernels.attention_scores(q.data(), halves.data() + p * stride, stride, n, 1, 0.125f, &alone);
        check_same(&alone, &scores[p], sizeof alone, "score alone", p);
      }

      current_test = "attention_mix";
      const std::vector<float> start(out.data(), out.data() + n);
      kernels.attention_mix(weights.data(), halves.data(), stride, n, count, out.data());
      for (size_t i = 0; i < n; i++) {
        double expected = static_cast<double>(start[i]), terms = std::fabs(expected);
        for (size_t p = 0; p < count; p++) {
          const double term = static_cast<double>(weights[p]) * half_value(halves[p * stride + i]);
          expected += term;
          terms += std::fabs(term);
        }
        check_close(static_cast<double>(out[i]), expected, terms, count, "output", i);
      }
      const size_t cut = random_below(count + 1);
      kernels.attention_mix(weights.data(), halves.data(), stride, n, cut, parts.data());
      kernels.attention_mix(weights.data() + cut, halves.data() + cut * stride, stride, n, count - cut, parts.data());
      check_same(parts.data(), out.data(), n * sizeof(float), "cut into two calls, positions", cut);
    }
  }
}

void test_set(const Kernels& kernels) {
  current_set = kernels.name;
  const size_t failures_before = failure_count, checks_before = check_count;
  random_state = 42;
  test_conversions(kernels);
  test_quantize(kernels);
  test_dots(kernels);
  test_adds(kernels);
  test_tiles(kernels);
  test_attention(kernels);
  std::printf("%s: %zu checks, %zu failed\n", kernels.name, check_count - checks_before, failure_count - failures_before);
}

[[maybe_unused]] void test_or_tell(bool supported, const Kernels& kernels) {
  if (supported) {
    test_set(kernels);
  } else {
    std::printf("%s: the CPU lacks it\n", kernels.name);
  }
}

int run() {
  std::signal(SIGSEGV, report_crash);
  std::signal(SIGBUS, report_crash);
  test_set(scalar_kernels());
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  test_or_tell(avx2, avx2_kernels());
#if defined(PI2_HAVE_AVX512)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  test_or_tell(avx2 && avx512, avx512_kernels());
  const Kernels* amx = find_kernels("amx");
  if (amx == nullptr) std::printf("amx: the CPU lacks it\n");
  if (amx != nullptr) test_set(*amx);
#endif
#endif
#if defined(__aarch64__)
  test_set(neon_kernels());
#endif
  return failure_count == 0 ? 0 : 1;
}

}  // namespace
}  // namespace pi2

int main() { return pi2::run(); }
