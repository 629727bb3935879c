/**
 * Experts and dense unit at the same time, under sanitizers (test/42-sanitizers.ts): random models of several families,
 * resident and streamed, with several numbers of threads, schedules and changes of the number of tokens. Logits must be the
 * same bits whatever the threads and wherever neurons are, and near those of the CPU alone. Argument: a directory to write
 * models to. Prints "NAME: N engines" for each model.
 */
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "native/engine/engine.h"
#include "native/engine/neurons.h"
#include "native/engine/random_model_test.h"

namespace pi2 {
namespace {

constexpr size_t kSteps[] = {6, 1, 4, 2, 1, 3, 1};
constexpr size_t kTokens = 18;

/** Logits of all tokens, in steps of changing length. */
std::vector<float> compute(const EngineConfig& config) {
  std::unique_ptr<Engine> engine;
  const Status opened = Engine::open(config, &engine);
  require(opened.is_ok(), opened.message());
  int32_t tokens[kTokens];
  for (size_t i = 0; i < kTokens; i++) tokens[i] = static_cast<int32_t>((7 * i * i + i) % config.vocab_size);
  std::vector<float> logits(kTokens * config.vocab_size);
  size_t at = 0;
  for (const size_t count : kSteps) {
    const Run run{0, at, count};
    const StepInput input{tokens + at, &run, 1, true, false, count > kSmallBatches};
    const Status status = engine->step(input, logits.data() + at * config.vocab_size, FiringRecord{});
    require(status.is_ok(), status.message());
    at += count;
  }
  if (config.unit.clusters[0] > 0) require(engine->hybrid()->unit_counters().jobs > 0, "a unit that computes nothing");
  return logits;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/** Root of the mean square of the difference, relative to the numbers. */
double deviation(const std::vector<float>& a, const std::vector<float>& b) {
  double differences = 0;
  double squares = 0;
  for (size_t i = 0; i < a.size(); i++) {
    differences += (a[i] - b[i]) * (a[i] - b[i]);
    squares += a[i] * a[i];
  }
  return std::sqrt(differences / squares);
}

void try_model(const std::string& directory, const RandomShape& shape, uint32_t seed) {
  const RandomModel model(directory, shape, seed);
  const std::vector<float> alone = compute(model.config);
  size_t engines = 1;
  EngineConfig config = model.config;
  config.unit.kind = UnitKind::kHost;
  config.unit.cluster_neurons = kNeuronChunk;
  const size_t all = chunk_total(config.neuron_count);
  config.unit.most_clusters = all;
  for (const UnitConfig::Schedule& schedule :
       {UnitConfig::Schedule{1, 1, 1, 1, 1}, UnitConfig::Schedule{all, all - 1, 0, 1, 0}}) {
    config.unit.clusters = schedule;
    std::vector<float> expected;
    for (const size_t threads : {1, 2, 4}) {
      for (const bool is_streamed : {false, true}) {
        config.threads = threads;
        config.unit.threads = threads < 2 ? 1 : threads / 2;
        const size_t hot = cluster_end(config.unit, all, config.neuron_count);
        config.stream = {};
        if (is_streamed) config.stream.banks.assign(config.expert_offsets.size(), {config.neuron_count, hot, 0});
        config.stream.lanes = 2;
        const std::vector<float> logits = compute(config);
        if (expected.empty()) expected = logits;
        require(same_bits(logits, expected), std::string(shape.name) + ": other bits with " + std::to_string(threads) +
                                                 " threads" + (is_streamed ? ", streamed" : ""));
        engines++;
      }
    }
    require(deviation(alone, expected) < 0.03, std::string(shape.name) + ": far from what the CPU computes");
  }
  std::printf("%s: %zu engines\n", shape.name, engines);
}

constexpr RandomShape kShapes[] = {
    {"hybrid-drelu-q4", Encoding::kQ4, 256, 300, 7, false, true, ActivationKind::kDRelu, 0, 1, 1},
    {"hybrid-relu-f16", Encoding::kF16, 320, 200, 1, true, false, ActivationKind::kRelu, 0, 1, 1},
    {"hybrid-experts-q8", Encoding::kQ8, 256, 130, 3, false, true, ActivationKind::kSilu, 0, 4, 2},
};

}  // namespace
}  // namespace pi2

int main(int count, char** arguments) {
  pi2::require(count == 2, "usage: hybrid_test DIRECTORY");
  uint32_t seed = 1;
  for (const pi2::RandomShape& shape : pi2::kShapes) pi2::try_model(arguments[1], shape, seed++);
  return 0;
}
