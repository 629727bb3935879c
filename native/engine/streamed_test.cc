/**
 * The streamed engine and the mapped one against the resident one, under sanitizers (test/42-sanitizers.ts): random models
 * of several families, opened with many plans of memory and ways to read, some of them on flash that fails. Logits and
 * firing must be the same bits, also in the step after one that failed. Arguments: a directory to write models to, and how
 * many ways to try for each. Prints "NAME: N ways, M faults" for each model.
 */
#include <fcntl.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>

#include "native/engine/engine.h"
#include "native/engine/neurons.h"
#include "native/engine/random_model_test.h"
#include "native/kernels/dispatch.h"

namespace pi2 {
namespace {

constexpr size_t kPrompt = 8;  // more than a batch
constexpr size_t kTokens = 12;

/** What happens to one step of a run. */
enum class Fault { kNone, kRead, kShortRead, kFlippedBytes };

/** What a predictor has to say: there is none; the same for all neurons; it chooses all; all steps, or those of the prompt,
 * are exact. */
enum class Guess { kNone, kHalf, kAll, kExact, kExactPrompt };
constexpr size_t kGuesses = 5;

/** How a sequence is computed. */
struct Course {
  Guess guess = Guess::kNone;
  /** Tokens of the first step: of the prompt, which is the step after it. */
  size_t first = kPrompt;
  /** Whether the prompt is computed as such. */
  bool prompt = true;
};

/** What a sequence gave. */
struct Result {
  std::vector<float> logits;
  std::vector<uint8_t> fired;
  std::vector<uint8_t> routed;

  bool operator==(const Result& other) const {
    return std::memcmp(logits.data(), other.logits.data(), logits.size() * sizeof(float)) == 0 && fired == other.fired &&
           routed == other.routed;
  }
};

/** Changes bytes of an open file in place. */
void overwrite(const std::string& path, const std::vector<uint8_t>& bytes) {
  const int file = open(path.c_str(), O_WRONLY);
  require(file >= 0 && write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()) && close(file) == 0,
          "cannot overwrite " + path);
}

/** The model's neurons with a bit flipped in both parts of every neuron of the last layer. */
std::vector<uint8_t> damaged(const RandomModel& model) {
  const EngineConfig& c = model.config;
  std::vector<uint8_t> bytes = model.neurons;
  for (size_t bank = c.expert_offsets.size() - c.expert_count; bank < c.expert_offsets.size(); bank++) {
    for (size_t j = 0; j < c.neuron_count; j++) {
      bytes[c.expert_offsets[bank] + c.layout.part1_at(j)] ^= 4;
      bytes[c.expert_offsets[bank] + c.layout.part2_at(j) + 3] ^= 4;
    }
  }
  return bytes;
}

/** Computes a prompt in one step or two and then token by token. A step that fails is done again, once. */
Result compute(const RandomModel& model, const EngineConfig& config, Fault fault, Course course = {}) {
  std::unique_ptr<Engine> engine;
  const Status opened = Engine::open(config, &engine);
  require(opened.is_ok(), opened.message());
  if (fault == Fault::kFlippedBytes) overwrite(config.neurons_path, damaged(model));
  const size_t fired = engine->fired_bytes_per_token();
  const size_t routed = engine->routed_bytes_per_token();
  Result result{std::vector<float>(kTokens * config.vocab_size), std::vector<uint8_t>(kTokens * fired),
                std::vector<uint8_t>(kTokens * routed)};
  int32_t tokens[kTokens];
  for (size_t i = 0; i < kTokens; i++) tokens[i] = static_cast<int32_t>((7 * i * i + i) % config.vocab_size);
  size_t failures = 0;
  for (size_t at = 0, count = course.first; at < kTokens; at += count, count = at < kPrompt ? kPrompt - at : 1) {
    const bool of_prompt = at < kPrompt;
    const bool exact = course.guess == Guess::kExact || (course.guess == Guess::kExactPrompt && of_prompt);
    const auto step = [&] {
      const Run run{0, at, count};
      return engine->step(
          {tokens + at, &run, 1, true, exact, course.prompt && of_prompt}, result.logits.data() + at * config.vocab_size,
          FiringRecord{.fired = result.fired.data() + at * fired, .routed = result.routed.data() + at * routed});
    };
    Status status = step();
    if (!status.is_ok() && fault != Fault::kNone && failures++ == 0) {
      const StatusCode code = fault == Fault::kFlippedBytes ? StatusCode::kChecksum : StatusCode::kIo;
      require(status.code() == code, "another failure than was made: " + status.message());
      if (fault == Fault::kFlippedBytes) overwrite(config.neurons_path, model.neurons);
      status = step();
    }
    require(status.is_ok(), status.message());
  }
  require(failures == (fault == Fault::kNone ? 0 : 1), "a fault that no step met");
  for (const float logit : result.logits) require(std::isfinite(logit), "a logit that is no number");
  return result;
}

/** Streamed with any plan, any way to read. */
EngineConfig any_way(const RandomModel& model, Fault fault, Guess guess, std::mt19937& random) {
  const auto below = [&](size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(random); };
  EngineConfig config = model.config;
  const size_t neurons = config.neuron_count;
  if (guess != Guess::kNone) config.predictor = model.predictor;
  if (guess == Guess::kAll) {
    config.predictor.memory_thresholds.assign(config.layer_count, -std::numeric_limits<float>::infinity());
    config.predictor.flash_thresholds = config.predictor.memory_thresholds;
  }
  StreamConfig& stream = config.stream;
  for (size_t bank = 0; bank < config.expert_offsets.size(); bank++) {
    BankPlan plan;
    const size_t gates[] = {0, below(neurons / kNeuronChunk + 1) * kNeuronChunk, neurons, neurons};
    plan.resident_gates = guess == Guess::kNone ? gates[below(4)] : 0;
    const size_t most_hot = guess == Guess::kNone ? plan.resident_gates : neurons;
    plan.hot_neurons = below(2) * below(most_hot + 1);
    // A fault needs enough reads to be met.
    const size_t slots[] = {0, 1, below(neurons + 1), neurons};
    plan.cold_slots = slots[fault == Fault::kNone ? below(4) : below(2)];
    stream.banks.push_back(plan);
  }
  // With rates slots do not begin free.
  if (below(2) == 0) stream.firing_rates.assign(stream.banks.size() * neurons, 0.25f);
  const size_t staging[] = {0, 40'000, 1 << 20};
  stream.staging_bytes = staging[below(3)];
  stream.mode = below(2) == 0 ? ReadMode::kDirect : ReadMode::kBuffered;
  stream.backend = below(2) == 0 ? ReadBackend::kThreads : ReadBackend::kUring;
  stream.lanes = 1 + below(4);
  const size_t prefetch[] = {0, 0, 1 << 16, 1 << 20};
  stream.prefetch_bytes = prefetch[below(4)];
  stream.two_phase = below(3) > 0;
  stream.bundles = below(4) > 0;
  stream.pipeline = below(4) > 0;
  if (fault == Fault::kRead) stream.trial.fail_read = 1 + below(9);
  if (fault == Fault::kShortRead) stream.trial.short_read = 1 + below(9);
  if (below(4) == 0) stream.trial.delay_us = 20;
  config.threads = 1 + below(3);
  return config;
}

std::string describe(const EngineConfig& config) {
  const StreamConfig& s = config.stream;
  std::string text = std::to_string(config.threads) + " threads" + (config.predictor.enabled() ? ", predicted" : "") +
                     ", staging " + std::to_string(s.staging_bytes) + ", prefetch " + std::to_string(s.prefetch_bytes) +
                     (s.mode == ReadMode::kDirect ? ", direct" : ", buffered") +
                     (s.backend == ReadBackend::kUring ? ", io_uring" : ", threads") + (s.two_phase ? "" : ", one phase") +
                     (s.bundles ? "" : ", no bundles") + (s.pipeline ? "" : ", no pipeline") +
                     (s.firing_rates.empty() ? "" : ", rates") + ", banks";
  for (const BankPlan& plan : s.banks) {
    text += " " + std::to_string(plan.resident_gates) + "/" + std::to_string(plan.hot_neurons) + "/" +
            std::to_string(plan.cold_slots);
  }
  return text;
}

/** Mapped, with every kernel set: the same bits, and words when the file is shortened meanwhile. */
void try_mapped(const RandomModel& model, size_t threads) {
  for (const Kernels* kernels : available_kernels()) {
    EngineConfig config = model.config;
    config.kernel_set = kernels->name;
    const Result expected = compute(model, config, Fault::kNone, {.prompt = false});
    config.mapped = true;
    config.threads = threads;
    require(compute(model, config, Fault::kNone) == expected, std::string("mapped: other bits with ") + kernels->name);
  }
  // One thread: ThreadSanitizer takes the handler's new mapping for a write, which races with what others read of the old
  // one.
  EngineConfig config = model.config;
  config.mapped = true;
  config.threads = 1;
  std::unique_ptr<Engine> engine;
  const Status opened = Engine::open(config, &engine);
  require(opened.is_ok(), opened.message());
  require(truncate(config.neurons_path.c_str(), kPageBytes) == 0, "cannot shorten " + config.neurons_path);
  std::vector<float> logits(config.vocab_size);
  for (size_t i = 0; i < 2; i++) {
    const int32_t token = 1;
    const Run run{0, 0, 1};
    const Status status = engine->step({&token, &run, 1, true, true, false}, logits.data(), FiringRecord{});
    require(status.code() == StatusCode::kIo, "a shortened file that no step met");
  }
}

/** Flash has a threshold of its own: then the plan of memory has a say, but neither threads nor the way to read. */
void try_thresholds(const RandomModel& model) {
  EngineConfig config = model.config;
  config.predictor = model.predictor;
  config.predictor.flash_thresholds.assign(config.layer_count, 0.4f);
  config.stream.banks.assign(config.expert_offsets.size(), {0, 20, 30});
  config.stream.lanes = 2;
  const Result expected = compute(model, config, Fault::kNone);
  config.threads = 3;
  config.stream.backend = ReadBackend::kUring;
  config.stream.trial.delay_us = 20;
  config.stream.prefetch_bytes = 1 << 18;
  require(compute(model, config, Fault::kNone) == expected, "two thresholds: other bits with " + describe(config));
}

void try_model(const std::string& directory, const RandomShape& shape, uint32_t seed, size_t ways) {
  const RandomModel model(directory, shape, seed);
  const Result expected = compute(model, model.config, Fault::kNone);
  EngineConfig predicted = model.config;
  predicted.predictor = model.predictor;
  const Result guessed = compute(model, predicted, Fault::kNone, {Guess::kHalf});
  const Result guessed_later = compute(model, predicted, Fault::kNone, {Guess::kExactPrompt});
  require(!(guessed == expected) && !(guessed_later == expected), "a predictor that leaves nothing out");
  std::mt19937 random(seed);
  size_t faults = 0;
  for (size_t number = 0; number < ways; number++) {
    const Fault fault = number % 2 == 0 ? Fault::kNone : static_cast<Fault>(1 + number / 2 % 3);
    const auto guess = static_cast<Guess>(number * 7 / 3 % kGuesses);
    const EngineConfig config = any_way(model, fault, guess, random);
    // Neurons that are kept come in with the first step: of any length, or a failed one.
    const size_t firsts[] = {kPrompt, 1, 3};
    const Course course{guess, firsts[number / 5 % 3]};
    const Result& wanted = guess == Guess::kHalf ? guessed : guess == Guess::kExactPrompt ? guessed_later : expected;
    require(compute(model, config, fault, course) == wanted, std::string(shape.name) + ", way " + std::to_string(number) +
                                                                 ": other bits with a first step of " +
                                                                 std::to_string(course.first) + ", " + describe(config));
    faults += fault != Fault::kNone;
  }
  try_thresholds(model);
  try_mapped(model, 1 + seed % 3);
  std::printf("%s: %zu ways, %zu faults\n", shape.name, ways, faults);
}

/** Every encoding, activation and packing; hidden sizes of whole groups and not; neurons of whole chunks, units and not. */
constexpr RandomShape kShapes[] = {
    {"drelu-q4", Encoding::kQ4, 256, 300, 7, false, true, ActivationKind::kDRelu, 0, 1, 1},
    {"relu-f16", Encoding::kF16, 320, 200, 1, true, false, ActivationKind::kRelu, 0, 1, 1},
    {"experts-q8", Encoding::kQ8, 256, 130, 3, false, true, ActivationKind::kFatRelu, 0.7f, 4, 2},
    {"silu-q4", Encoding::kQ4, 544, 256, 4, true, true, ActivationKind::kSilu, 0, 1, 1},
};

}  // namespace
}  // namespace pi2

int main(int count, char** arguments) {
  pi2::require(count == 3, "usage: streamed_test DIRECTORY WAYS");
  uint32_t seed = 1;
  for (const pi2::RandomShape& shape : pi2::kShapes) {
    pi2::try_model(arguments[1], shape, seed++, std::strtoul(arguments[2], nullptr, 10));
  }
  return 0;
}
