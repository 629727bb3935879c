#pragma once
/** Small models with random weights, written as FORMAT.md has them: for programs that open engines under sanitizers. */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "native/base/crc32.h"
#include "native/engine/config.h"
#include "native/quantize/encode.h"

namespace pi2 {

/** What distinguishes one random model from another. */
struct RandomShape {
  const char* name;
  Encoding encoding;
  size_t hidden;
  size_t neurons;
  size_t neurons_per_unit;
  bool joint;  // parts 1 and 2 of a neuron side by side, or all parts 1 of a unit first
  bool gated;
  ActivationKind activation;
  float threshold;
  size_t experts;
  size_t experts_per_token;
};

/** Ends the program unless the condition holds. */
inline void require(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

/**
 * Writes resident.bin, neurons.bin and predictor.bin of a model with two layers, and fills a configuration that opens them.
 * Ungated models are like OPT: layer norms, biases, learned positions; gated ones like llama.
 */
class RandomModel {
 public:
  RandomModel(const std::string& directory, const RandomShape& shape, uint32_t seed) : shape_(shape), random_(seed) {
    set_sizes();
    set_layout();
    config.resident_path = directory + "/" + shape.name + ".resident";
    config.neurons_path = directory + "/" + shape.name + ".neurons";
    add_tensors();
    add_neurons();
    write(config.resident_path, resident_);
    write(config.neurons_path, neurons);
    predictor.path = directory + "/" + shape.name + ".predictor";
    add_predictor();
    write(predictor.path, predictor_);
  }

  /** Without stream and predictor. */
  EngineConfig config{};
  /** Its thresholds are 0 everywhere. */
  PredictorConfig predictor;
  /** The bytes of neurons.bin. */
  std::vector<uint8_t> neurons;

 private:
  void set_sizes() {
    EngineConfig& c = config;
    c.ffn_encoding = shape_.encoding;
    c.hidden_size = shape_.hidden;
    c.layer_count = 2;
    c.head_count = 2;
    c.kv_head_count = 1;
    c.head_dim = 32;
    c.neuron_count = shape_.neurons;
    c.vocab_size = 40;
    c.norm_kind = shape_.gated ? NormKind::kRms : NormKind::kLayer;
    c.norm_epsilon = 1e-5f;
    for (size_t i = 0; shape_.gated && i < c.head_dim / 2; i++)
      c.rope_frequencies.push_back(1.0f / static_cast<float>(i + 1));
    c.windows = {0, 0};
    c.gated = shape_.gated;
    c.activation = shape_.activation;
    c.threshold = shape_.threshold;
    c.expert_count = shape_.experts;
    c.experts_per_token = shape_.experts_per_token;
    c.context_length = 20;
    c.threads = 1;
    c.batch_size = 6;
  }

  void set_layout() {
    const size_t weights = weight_bytes(shape_.encoding, shape_.hidden);
    const size_t scales = scale_bytes(shape_.encoding, shape_.hidden);
    const auto whole_pages = [](size_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; };
    BundleLayout& l = config.layout;
    l.matrices = shape_.gated ? 3 : 2;
    l.part1_bytes = weights + l.matrices * scales;
    l.part2_bytes = (l.matrices - 1) * weights;
    l.neurons_per_unit = shape_.neurons_per_unit;
    const size_t both = l.part1_bytes + l.part2_bytes;
    l.part1_stride = shape_.joint ? both : l.part1_bytes;
    l.part2_stride = shape_.joint ? both : l.part2_bytes;
    l.part2_offset = shape_.joint ? l.part1_bytes : whole_pages(l.neurons_per_unit * l.part1_bytes);
    l.unit_bytes =
        whole_pages(shape_.joint ? l.neurons_per_unit * both : l.part2_offset + l.neurons_per_unit * l.part2_bytes);
    require(l.check().is_ok(), "the layout of a random model");
  }

  /** Encoded rows of uniform numbers around `center`, at most `most` from it. */
  std::vector<uint8_t> random_rows(Encoding encoding, size_t rows, size_t columns, float center, float most) {
    std::uniform_real_distribution<float> number(center - most, center + most);
    std::vector<float> source(rows * columns);
    for (float& value : source) value = number(random_);
    const size_t row = row_bytes(encoding, columns);
    std::vector<uint8_t> target(rows * row);
    const Placement placement{1, row, 0, row, weight_bytes(encoding, columns), row};
    const EncodeRequest request{reinterpret_cast<const uint8_t*>(source.data()),
                                SourceType::kF32,
                                rows,
                                columns,
                                encoding,
                                target.data(),
                                placement,
                                0,
                                nullptr,
                                1};
    require(!encode_rows(request).found, "a random number cannot be stored");
    return target;
  }

  /** What makes products with inputs of variance 1, `columns` of them, have variance 1. */
  static float unit_weight(size_t columns) { return std::sqrt(3.0f / static_cast<float>(columns)); }

  /** Appends a tensor to the bytes of a file. */
  void add_tensor(const std::string& name, Encoding encoding, size_t rows, size_t columns, float center, float most,
                  std::vector<uint8_t>* file, std::vector<TensorConfig>* tensors) {
    const std::vector<uint8_t> bytes = random_rows(encoding, rows, columns, center, most);
    file->resize((file->size() + 63) / 64 * 64);
    tensors->push_back({name, file->size(), bytes.size(), encoding, rows, columns});
    file->insert(file->end(), bytes.begin(), bytes.end());
  }

  void add_tensors() {
    const size_t hidden = config.hidden_size;
    const auto matrix = [&](const std::string& name, size_t rows, size_t columns) {
      add_tensor(name, Encoding::kQ8, rows, columns, 0, unit_weight(columns), &resident_, &config.tensors);
    };
    const auto floats = [&](const std::string& name, size_t rows, size_t columns, float center, float most) {
      add_tensor(name, Encoding::kF32, rows, columns, center, most, &resident_, &config.tensors);
    };
    const auto vector = [&](const std::string& name, size_t size) { floats(name, 1, size, 1.0f, 0.5f); };
    const auto bias = [&](const std::string& name, size_t size) { floats(name, 1, size, -0.4f, 0.5f); };
    matrix("embedding", config.vocab_size, hidden);
    if (!shape_.gated) matrix("position_embedding", config.context_length, hidden);
    vector("output_norm", hidden);
    for (size_t i = 0; i < config.layer_count; i++) {
      const std::string layer = "layers." + std::to_string(i) + ".";
      vector(layer + "attention_norm", hidden);
      vector(layer + "ffn_norm", hidden);
      matrix(layer + "q", config.query_size(), hidden);
      matrix(layer + "k", config.kv_size(), hidden);
      matrix(layer + "v", config.kv_size(), hidden);
      matrix(layer + "o", hidden, config.query_size());
      if (shape_.experts > 1) floats(layer + "router", shape_.experts, hidden, 0, unit_weight(hidden));
      if (shape_.gated) continue;
      bias(layer + "attention_norm_bias", hidden);
      bias(layer + "ffn_norm_bias", hidden);
      bias(layer + "up_bias", config.neuron_count);
      bias(layer + "down_bias", hidden);
    }
    end_extent("tensors", 0, false, &resident_, &config.extents);
  }

  /** What was appended to a file since `offset` is an extent; the next one begins on a page. */
  static void end_extent(const std::string& name, size_t offset, bool is_neurons, std::vector<uint8_t>* file,
                         std::vector<ExtentConfig>* extents) {
    const size_t bytes = file->size() - offset;
    extents->push_back({name, is_neurons, offset, bytes, crc32(file->data() + offset, bytes, 0)});
    file->resize((file->size() + kPageBytes - 1) / kPageBytes * kPageBytes);
  }

  /** A predictor that guesses at random, with another rank in each layer; about half of the neurons are chosen. */
  void add_predictor() {
    predictor.input = shape_.gated ? PredictorInput::kResidual : PredictorInput::kFfnNorm;
    for (size_t layer = 0; layer < config.layer_count; layer++) {
      const size_t begin = predictor_.size();
      const size_t rank = 20 + 8 * layer;
      const std::string name = "layers." + std::to_string(layer) + ".predictor";
      const auto add = [&](const char* part, Encoding encoding, size_t rows, size_t columns, float most) {
        add_tensor(name + part, encoding, rows, columns, 0, most, &predictor_, &predictor.tensors);
      };
      add(".fc1", shape_.encoding, shape_.experts * rank, shape_.hidden, unit_weight(shape_.hidden));
      add(".fc2", shape_.encoding, shape_.experts * rank, shape_.neurons, unit_weight(rank));
      add(".bias", Encoding::kF32, shape_.experts, shape_.neurons, 0.3f);
      end_extent(name, begin, false, &predictor_, &predictor.extents);
    }
    predictor.memory_thresholds.assign(config.layer_count, 0.0f);
    predictor.flash_thresholds = predictor.memory_thresholds;
  }

  void add_neurons() {
    const BundleLayout& l = config.layout;
    for (size_t layer = 0; layer < config.layer_count; layer++) {
      const size_t begin = neurons.size();
      const size_t checksums = resident_.size();
      for (size_t expert = 0; expert < config.expert_count; expert++) {
        const size_t base = neurons.size();
        config.expert_offsets.push_back(base);
        config.checksum_offsets.push_back(resident_.size());
        neurons.resize(base + l.bytes(config.neuron_count));
        add_expert(neurons.data() + base);
      }
      const std::string name = "layers." + std::to_string(layer);
      end_extent(name + ".neurons", begin, true, &neurons, &config.extents);
      end_extent(name + ".checksums", checksums, false, &resident_, &config.extents);
    }
  }

  /** Fills one expert's bundles and appends their checksums to resident.bin. */
  void add_expert(uint8_t* base) {
    const BundleLayout& l = config.layout;
    const size_t weights = weight_bytes(shape_.encoding, shape_.hidden);
    const size_t scales = scale_bytes(shape_.encoding, shape_.hidden);
    for (size_t m = 0; m < l.matrices; m++) {
      const std::vector<uint8_t> rows =
          random_rows(shape_.encoding, config.neuron_count, shape_.hidden, 0, unit_weight(shape_.hidden));
      for (size_t j = 0; j < config.neuron_count; j++) {
        const uint8_t* row = rows.data() + j * (weights + scales);
        std::memcpy(base + (m == 0 ? l.part1_at(j) : l.part2_at(j) + (m - 1) * weights), row, weights);
        std::memcpy(base + l.part1_at(j) + weights + m * scales, row + weights, scales);
      }
    }
    for (size_t j = 0; j < config.neuron_count; j++) {
      const uint32_t sums[2] = {crc32(base + l.part1_at(j), l.part1_bytes, 0),
                                crc32(base + l.part2_at(j), l.part2_bytes, 0)};
      const auto* bytes = reinterpret_cast<const uint8_t*>(sums);
      resident_.insert(resident_.end(), bytes, bytes + sizeof sums);
    }
  }

  static void write(const std::string& path, const std::vector<uint8_t>& bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    require(file.good(), "cannot write " + path);
  }

  RandomShape shape_;
  std::mt19937 random_;
  std::vector<uint8_t> resident_;
  std::vector<uint8_t> predictor_;
};

}  // namespace pi2
