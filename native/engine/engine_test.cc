/**
 * Opens a model and computes it on every kernel set, with several numbers of threads and cuts into steps: for the sanitizers
 * (test/42-sanitizers.ts), which watch threads and memory while bits are compared. Argument: a file with one field of
 * EngineRequest (src/engine/contract.ts) a line, name and values separated by spaces. Prints "SET: N steps" for each set.
 */
#include "native/engine/engine.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "native/kernels/dispatch.h"

namespace pi2 {

namespace {

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

Encoding read_encoding(std::istream& in) {
  const std::map<std::string, Encoding> encodings = {
      {"f32", Encoding::kF32}, {"f16", Encoding::kF16}, {"q8", Encoding::kQ8}, {"q4", Encoding::kQ4}};
  std::string name;
  in >> name;
  require(encodings.count(name) == 1, "an encoding called " + name);
  return encodings.at(name);
}

template <class T>
std::vector<T> read_all(std::istream& in) {
  std::vector<T> values;
  for (T value; in >> value;) values.push_back(value);
  return values;
}

void read_field(const std::string& name, std::istream& in, EngineConfig* c) {
  const std::map<std::string, size_t*> sizes = {{"hiddenSize", &c->hidden_size},
                                                {"layerCount", &c->layer_count},
                                                {"headCount", &c->head_count},
                                                {"kvHeadCount", &c->kv_head_count},
                                                {"headDim", &c->head_dim},
                                                {"neuronCount", &c->neuron_count},
                                                {"vocabSize", &c->vocab_size},
                                                {"expertCount", &c->expert_count},
                                                {"contextLength", &c->context_length},
                                                {"expertsPerToken", &c->experts_per_token},
                                                {"batchSize", &c->batch_size}};
  const std::map<std::string, ActivationKind> activations = {{"silu", ActivationKind::kSilu},
                                                             {"relu", ActivationKind::kRelu},
                                                             {"drelu", ActivationKind::kDRelu},
                                                             {"fatrelu", ActivationKind::kFatRelu}};
  BundleLayout& l = c->layout;
  std::string word;
  if (sizes.count(name) == 1) {
    in >> *sizes.at(name);
  } else if (name == "residentPath") {
    std::getline(in >> std::ws, c->resident_path);
  } else if (name == "neuronsPath") {
    std::getline(in >> std::ws, c->neurons_path);
  } else if (name == "extent") {
    ExtentConfig extent{};
    in >> extent.name >> word >> extent.offset >> extent.bytes >> extent.crc32;
    extent.is_neurons = word == "neurons";
    c->extents.push_back(extent);
  } else if (name == "tensor") {
    TensorConfig tensor{};
    in >> tensor.name >> tensor.offset >> tensor.bytes;
    tensor.encoding = read_encoding(in);
    in >> tensor.rows >> tensor.columns;
    c->tensors.push_back(tensor);
  } else if (name == "expertOffsets") {
    c->expert_offsets = read_all<size_t>(in);
  } else if (name == "layout") {
    in >> l.matrices >> l.part1_bytes >> l.part2_bytes >> l.neurons_per_unit >> l.unit_bytes >> l.part1_stride >>
        l.part2_offset >> l.part2_stride;
  } else if (name == "ffnEncoding") {
    c->ffn_encoding = read_encoding(in);
  } else if (name == "normKind") {
    in >> word;
    c->norm_kind = word == "layer" ? NormKind::kLayer : NormKind::kRms;
  } else if (name == "normEpsilon") {
    in >> c->norm_epsilon;
  } else if (name == "ropeFrequencies") {
    c->rope_frequencies = read_all<float>(in);
  } else if (name == "windows") {
    c->windows = read_all<size_t>(in);
  } else if (name == "gated") {
    in >> std::boolalpha >> c->gated;
  } else if (name == "activation") {
    in >> word;
    c->activation = activations.at(word);
  } else if (name == "threshold") {
    in >> c->threshold;
  } else {
    require(false, "a field called " + name);
  }
}

EngineConfig read_config(const char* path) {
  EngineConfig config{};
  std::ifstream file(path);
  require(file.good(), std::string("cannot read ") + path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string name;
    fields >> name;
    read_field(name, fields, &config);
  }
  return config;
}

/** What a sequence gave: the logits of all tokens and which neurons fired. */
struct Result {
  std::vector<float> logits;
  std::vector<uint8_t> fired_bits;

  bool operator==(const Result& other) const {
    return std::memcmp(logits.data(), other.logits.data(), 4 * logits.size()) == 0 && fired_bits == other.fired_bits;
  }
};

/** Computes a sequence in steps of `piece`. */
Result compute(EngineConfig config, const std::string& kernel_set, size_t threads, size_t piece, size_t* steps) {
  config.kernel_set = kernel_set;
  config.threads = threads;
  std::unique_ptr<Engine> engine;
  const Status opened = Engine::open(config, &engine);
  require(opened.is_ok(), opened.message());
  std::vector<int32_t> tokens(config.context_length);
  for (size_t i = 0; i < tokens.size(); i++) tokens[i] = static_cast<int32_t>(i * i % config.vocab_size);
  const size_t fired_bytes = engine->fired_bytes_per_token();
  Result result{std::vector<float>(tokens.size() * config.vocab_size), std::vector<uint8_t>(tokens.size() * fired_bytes)};
  for (size_t at = 0; at < tokens.size(); at += piece) {
    const size_t count = std::min(piece, tokens.size() - at);
    const Run run{0, at, count};
    const StepInput input{.tokens = tokens.data() + at, .runs = &run, .run_count = 1, .all = true};
    const Status status = engine->step(input, result.logits.data() + at * config.vocab_size,
                                       FiringRecord{.fired = result.fired_bits.data() + at * fired_bytes});
    require(status.is_ok(), status.message());
    ++*steps;
  }
  size_t fired = 0;
  for (const uint8_t bits : result.fired_bits) fired += static_cast<size_t>(std::popcount(bits));
  require(fired == engine->counters().neurons_fired, "another number of neurons fired than was counted");
  return result;
}

int run(const char* path) {
  const EngineConfig config = read_config(path);
  for (const Kernels* kernels : available_kernels()) {
    size_t steps = 0;
    const Result expected = compute(config, kernels->name, 1, config.context_length, &steps);
    const struct {
      size_t threads;
      size_t piece;
    } ways[] = {{2, config.context_length}, {4, 1}, {3, 7}};
    for (const auto& way : ways) {
      require(compute(config, kernels->name, way.threads, way.piece, &steps) == expected,
              std::string(kernels->name) + ": other bits with " + std::to_string(way.threads) + " threads");
    }
    std::printf("%s: %zu steps\n", kernels->name, steps);
  }
  return 0;
}

}  // namespace
}  // namespace pi2

int main(int, char** arguments) { return pi2::run(arguments[1]); }
