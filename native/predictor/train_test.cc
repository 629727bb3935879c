/**
 * A program that trains a predictor on one thread and on several, for sanitizers: sizes that are no multiple of anything, a
 * last batch that is not full. Prints how many parameters differ, and how much of the loss is left.
 */
#include "native/predictor/train.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

using pi2::PredictorShape;

namespace {

constexpr size_t kTokens = 107;
constexpr PredictorShape kShape{37, 61, 13};

struct Samples {
  std::vector<float> inputs;
  std::vector<uint32_t> starts{0};
  std::vector<uint32_t> neurons;
  std::vector<float> weights;
  std::vector<uint32_t> order;
};

float random_number() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

/** Neuron j fires if input j % hidden is positive. */
Samples make_samples() {
  Samples samples;
  for (size_t t = 0; t < kTokens; t++) {
    for (size_t i = 0; i < kShape.hidden_size; i++) samples.inputs.push_back(random_number());
    for (size_t j = 0; j < kShape.neuron_count; j++) {
      const float x = samples.inputs[t * kShape.hidden_size + j % kShape.hidden_size];
      if (x <= 0) continue;
      samples.neurons.push_back(static_cast<uint32_t>(j));
      samples.weights.push_back(4 * x);
    }
    samples.starts.push_back(static_cast<uint32_t>(samples.neurons.size()));
    samples.order.push_back(static_cast<uint32_t>(t));
  }
  return samples;
}

double loss(const Samples& samples, const std::vector<float>& parameters) {
  std::vector<float> scores(kTokens * kShape.neuron_count);
  if (!pi2::score_predictor(kShape, parameters.data(), samples.inputs.data(), kTokens, 2, scores.data()).is_ok()) return -1;
  double sum = 0;
  for (size_t t = 0; t < kTokens; t++) {
    std::vector<float> weights(kShape.neuron_count);
    for (uint32_t e = samples.starts[t]; e < samples.starts[t + 1]; e++) weights[samples.neurons[e]] = samples.weights[e];
    for (size_t j = 0; j < kShape.neuron_count; j++) {
      const double score = scores[t * kShape.neuron_count + j];
      sum += weights[j] > 0 ? weights[j] * std::log1p(std::exp(-score)) : std::log1p(std::exp(score));
    }
  }
  return sum;
}

std::vector<float> train(const Samples& samples, std::vector<float> parameters, size_t threads) {
  std::vector<float> moments(2 * parameters.size());
  for (size_t pass = 0; pass < 60; pass++) {
    const size_t steps = pass * ((kTokens + 15) / 16);
    const pi2::TrainRequest request{kShape,
                                    samples.inputs.data(),
                                    samples.starts.data(),
                                    samples.neurons.data(),
                                    samples.weights.data(),
                                    parameters.data(),
                                    moments.data(),
                                    steps,
                                    samples.order.data(),
                                    kTokens,
                                    16,
                                    0.02f,
                                    threads};
    if (!pi2::train_predictor(request).is_ok()) std::abort();
  }
  return parameters;
}

}  // namespace

int main() {
  const Samples samples = make_samples();
  std::vector<float> start(kShape.parameter_count());
  for (float& parameter : start) parameter = random_number();
  const std::vector<float> one = train(samples, start, 1);
  const std::vector<float> three = train(samples, start, 3);
  size_t different = 0;
  for (size_t i = 0; i < one.size(); i++) different += one[i] != three[i];
  std::printf("%zu of %zu parameters differ, %s\n", different, one.size(),
              loss(samples, one) < 0.5 * loss(samples, start) ? "learned" : "not learned");
}
