#include "native/predictor/train.h"

#include <algorithm>
#include <cmath>

#include "native/base/carver.h"
#include "native/base/memory.h"
#include "native/base/thread_pool.h"
#include "native/base/vector_code.h"
#include "native/engine/exponential.h"
#include "native/predictor/product.h"

namespace pi2 {
namespace {

constexpr float kFirstDecay = 0.9f;
constexpr float kSecondDecay = 0.999f;
constexpr float kEpsilon = 1e-8f;
/** Numbers that a thread takes at a time. */
constexpr size_t kStripe = 4096;
/** Tokens that are scored together. */
constexpr size_t kScoreBatch = 128;

/** What a batch needs besides the parameters. */
struct Buffers {
  float* inputs;       // (token, hidden)
  float* inputs_by;    // (hidden, token)
  float* units;        // (rank, token): relu(fc1 x)
  float* unit_slopes;  // (rank, token): of the loss
  float* slopes;       // (token, neuron): scores, then their slopes
  float* slopes_by;    // (neuron, token)
  float* gradient;     // as the parameters
  float* scratch;      // of products

  size_t carve(const PredictorShape& shape, size_t batch, size_t threads, bool trains, uint8_t* base) {
    Carver carver(base);
    inputs = carver.take<float>(batch * shape.hidden_size);
    inputs_by = carver.take<float>(batch * shape.hidden_size);
    units = carver.take<float>(batch * shape.rank);
    scratch =
        carver.take<float>(threads * product_scratch(std::max({shape.hidden_size, shape.neuron_count, shape.rank, batch})));
    if (!trains) return carver.used();
    unit_slopes = carver.take<float>(batch * shape.rank);
    slopes = carver.take<float>(batch * shape.neuron_count);
    slopes_by = carver.take<float>(batch * shape.neuron_count);
    gradient = carver.take<float>(shape.parameter_count());
    return carver.used();
  }
};

/** The three parts of a predictor's parameters. */
template <class Number>
struct Parts {
  Parts(const PredictorShape& shape, Number* parameters)
      : fc1(parameters), fc2(fc1 + shape.rank * shape.hidden_size), bias(fc2 + shape.rank * shape.neuron_count) {}
  Number* fc1;
  Number* fc2;
  Number* bias;
};

/** to (columns, rows) = from (rows, columns), turned over. */
void transpose(ThreadPool& pool, const float* from, size_t rows, size_t columns, float* to) {
  constexpr size_t kBlock = 16;
  pool.run((columns + kBlock - 1) / kBlock, [&](size_t block, size_t) {
    const size_t end = std::min(columns, (block + 1) * kBlock);
    for (size_t first = 0; first < rows; first += kBlock) {
      const size_t last = std::min(rows, first + kBlock);
      for (size_t j = block * kBlock; j < end; j++) {
        for (size_t i = first; i < last; i++) to[j * rows + i] = from[i * columns + j];
      }
    }
  });
}

PI2_VECTOR_CODE("avx512f", "fma") void rectify(float* values, size_t count) {
  for (size_t i = 0; i < count; i++) values[i] = values[i] > 0 ? values[i] : 0.0f;
}

PI2_VECTOR_CODE("avx512f", "fma") void add_row(const float* row, size_t count, float* values) {
  for (size_t i = 0; i < count; i++) values[i] += row[i];
}

/** Scores without their bias become the slopes of a token's loss as if no neuron fired: sigmoid(score + bias). */
PI2_VECTOR_CODE("avx512f", "fma") void slopes_of_silence(const float* bias, size_t count, float* scores) {
  for (size_t i = 0; i < count; i++) scores[i] = 1.0f / (1.0f + exponential(-(scores[i] + bias[i])));
}

PI2_VECTOR_CODE("avx512f", "fma") void mask(const float* units, size_t count, float* slopes) {
  for (size_t i = 0; i < count; i++) slopes[i] = units[i] > 0 ? slopes[i] : 0.0f;
}

/** A step of Adam for some of the parameters; `gradient` is `scale` times too large. */
PI2_VECTOR_CODE("avx512f", "fma")
void adam(const float* gradient, float scale, float rate, float second_scale, size_t count, float* first, float* second,
          float* values) {
  for (size_t i = 0; i < count; i++) {
    const float g = gradient[i] * scale;
    first[i] = kFirstDecay * first[i] + (1.0f - kFirstDecay) * g;
    second[i] = kSecondDecay * second[i] + (1.0f - kSecondDecay) * g * g;
    values[i] -= rate * first[i] / (std::sqrt(second[i] * second_scale) + kEpsilon);
  }
}

/** buffers.units = relu(fc1 x) of the tokens in buffers.inputs. */
void compute_units(ThreadPool& pool, const PredictorShape& shape, const float* fc1, size_t tokens, const Buffers& buffers) {
  transpose(pool, buffers.inputs, tokens, shape.hidden_size, buffers.inputs_by);
  multiply_matrices(pool, {fc1, shape.hidden_size, 1}, buffers.inputs_by, shape.rank, shape.hidden_size, tokens,
                    buffers.scratch, buffers.units);
  rectify(buffers.units, shape.rank * tokens);
}

/** buffers.gradient = sum over the batch's tokens of the slopes of the loss by each parameter. */
void compute_gradient(ThreadPool& pool, const TrainRequest& request, const uint32_t* tokens, size_t count,
                      const Buffers& buffers) {
  const PredictorShape& shape = request.shape;
  const size_t hidden = shape.hidden_size;
  const size_t neurons = shape.neuron_count;
  const Parts<const float> parameters(shape, request.parameters);
  const Parts<float> gradient(shape, buffers.gradient);
  pool.run(count,
           [&](size_t t, size_t) { std::copy_n(request.inputs + tokens[t] * hidden, hidden, buffers.inputs + t * hidden); });
  compute_units(pool, shape, parameters.fc1, count, buffers);
  multiply_matrices(pool, {buffers.units, 1, count}, parameters.fc2, count, shape.rank, neurons, buffers.scratch,
                    buffers.slopes);
  pool.run(count, [&](size_t t, size_t) {
    float* slopes = buffers.slopes + t * neurons;
    slopes_of_silence(parameters.bias, neurons, slopes);
    for (uint32_t i = request.starts[tokens[t]]; i < request.starts[tokens[t] + 1]; i++) {
      float& slope = slopes[request.neurons[i]];
      slope = request.weights[i] * (slope - 1.0f);
    }
  });
  pool.run((neurons + kStripe - 1) / kStripe, [&](size_t stripe, size_t) {
    const size_t first = stripe * kStripe;
    const size_t size = std::min(kStripe, neurons - first);
    std::fill_n(gradient.bias + first, size, 0.0f);
    for (size_t t = 0; t < count; t++) add_row(buffers.slopes + t * neurons + first, size, gradient.bias + first);
  });
  multiply_matrices(pool, {buffers.units, count, 1}, buffers.slopes, shape.rank, count, neurons, buffers.scratch,
                    gradient.fc2);
  transpose(pool, buffers.slopes, count, neurons, buffers.slopes_by);
  multiply_matrices(pool, {parameters.fc2, neurons, 1}, buffers.slopes_by, shape.rank, neurons, count, buffers.scratch,
                    buffers.unit_slopes);
  mask(buffers.units, shape.rank * count, buffers.unit_slopes);
  multiply_matrices(pool, {buffers.unit_slopes, count, 1}, buffers.inputs, shape.rank, count, hidden, buffers.scratch,
                    gradient.fc1);
}

}  // namespace

size_t train_bytes(const PredictorShape& shape, size_t batch_size, size_t threads) {
  Buffers buffers;
  return buffers.carve(shape, batch_size, threads, true, nullptr);
}

Status train_predictor(const TrainRequest& request) {
  const PredictorShape& shape = request.shape;
  HugeMemory memory;
  Status status = memory.allocate(train_bytes(shape, request.batch_size, request.threads), "training");
  if (!status.is_ok()) return status;
  Buffers buffers;
  buffers.carve(shape, request.batch_size, request.threads, true, memory.data());
  ThreadPool pool(request.threads);
  const size_t parameters = shape.parameter_count();
  double step = static_cast<double>(request.steps_before);
  for (size_t done = 0; done < request.order_count; done += request.batch_size) {
    const size_t count = std::min(request.batch_size, request.order_count - done);
    compute_gradient(pool, request, request.order + done, count, buffers);
    step++;
    const auto rate = static_cast<float>(request.learning_rate / (1 - std::pow(kFirstDecay, step)));
    const auto second_scale = static_cast<float>(1 / (1 - std::pow(kSecondDecay, step)));
    const float scale = 1.0f / static_cast<float>(count);
    pool.run((parameters + kStripe - 1) / kStripe, [&](size_t stripe, size_t) {
      const size_t first = stripe * kStripe;
      adam(buffers.gradient + first, scale, rate, second_scale, std::min(kStripe, parameters - first),
           request.moments + first, request.moments + parameters + first, request.parameters + first);
    });
  }
  return status;
}

Status score_predictor(const PredictorShape& shape, const float* parameters, const float* inputs, size_t tokens,
                       size_t threads, float* scores) {
  HugeMemory memory;
  Buffers buffers;
  Status status = memory.allocate(buffers.carve(shape, kScoreBatch, threads, false, nullptr), "scoring");
  if (!status.is_ok()) return status;
  buffers.carve(shape, kScoreBatch, threads, false, memory.data());
  ThreadPool pool(threads);
  const Parts<const float> parts(shape, parameters);
  for (size_t done = 0; done < tokens; done += kScoreBatch) {
    const size_t count = std::min(kScoreBatch, tokens - done);
    std::copy_n(inputs + done * shape.hidden_size, count * shape.hidden_size, buffers.inputs);
    compute_units(pool, shape, parts.fc1, count, buffers);
    float* to = scores + done * shape.neuron_count;
    multiply_matrices(pool, {buffers.units, 1, count}, parts.fc2, count, shape.rank, shape.neuron_count, buffers.scratch,
                      to);
    pool.run(count, [&](size_t t, size_t) { add_row(parts.bias, shape.neuron_count, to + t * shape.neuron_count); });
  }
  return status;
}

}  // namespace pi2
