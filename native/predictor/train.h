#pragma once
/**
 * Training of a predictor (paper section 1.9), offline: score = bias + fc2^T relu(fc1 x), one a neuron. The loss of a neuron
 * and token is the binary cross-entropy of the score's sigmoid; neurons that fire weigh as much as they contribute relative
 * to the mean, the others 1. Its minimum ranks neurons by the contribution that is to be expected of them.
 *
 * Every number is summed by one thread in one order: the result does not depend on the number of threads.
 */
#include <cstddef>
#include <cstdint>

#include "native/base/status.h"

namespace pi2 {

/** Sizes of a predictor of one bank. */
struct PredictorShape {
  size_t hidden_size;
  size_t neuron_count;
  size_t rank;

  /** fc1 (rank, hidden), then fc2 (rank, neurons), then bias (neurons). */
  size_t parameter_count() const { return rank * (hidden_size + neuron_count) + neuron_count; }
};

/** Tokens to learn from, and what is learned: views of the caller's memory. */
struct TrainRequest {
  PredictorShape shape;
  const float* inputs;      // (token, hidden)
  const uint32_t* starts;   // (token + 1): entries of each token in the next two
  const uint32_t* neurons;  // (entry): a neuron that fires
  const float* weights;     // (entry): its contribution, relative to the mean
  float* parameters;
  float* moments;         // two for each parameter, all first ones first: Adam's, zero before the first step
  size_t steps_before;    // since the moments were zero
  const uint32_t* order;  // (order_count): tokens in the order they are learned, batch_size of them a step
  size_t order_count;
  size_t batch_size;
  float learning_rate;
  size_t threads;
};

/** Bytes that train_predictor allocates. */
size_t train_bytes(const PredictorShape& shape, size_t batch_size, size_t threads);

/** Takes one step of Adam for each batch. Fails only for lack of memory. The caller has checked all bounds. */
Status train_predictor(const TrainRequest& request);

/** scores (token, neuron) of `tokens` inputs (token, hidden). Fails only for lack of memory. */
Status score_predictor(const PredictorShape& shape, const float* parameters, const float* inputs, size_t tokens,
                       size_t threads, float* scores);

}  // namespace pi2
