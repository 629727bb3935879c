#include "native/engine/weights.h"

#include "native/engine/load.h"

namespace pi2 {
namespace {

/** Kernels may load a line past the last row. */
constexpr size_t kTailBytes = 4096;

}  // namespace

Status Weights::load(const EngineConfig& config) {
  Status status = config.mapped ? resident_.map(config.resident_path, config.extents, config.tensors, config.threads)
                                : resident_.load(config.resident_path, config.extents, config.tensors, config.threads,
                                                 "resident weights");
  if (status.is_ok() && !config.stream.enabled() && !config.mapped) status = load_neurons(config);
  if (status.is_ok()) status = bind(config);
  return status;
}

size_t Weights::neuron_bytes_needed(const EngineConfig& config) {
  const size_t row = row_bytes(config.ffn_encoding, config.hidden_size);
  return config.expert_offsets.size() * config.layout.matrices * config.neuron_count * row + kTailBytes;
}

Status Weights::load_neurons(const EngineConfig& config) {
  const BundleLayout& layout = config.layout;
  const size_t row = row_bytes(config.ffn_encoding, config.hidden_size);
  Status status = check_neurons(config);
  if (!status.is_ok()) return status;
  const size_t matrix_bytes = config.neuron_count * row;
  const size_t expert_bytes = layout.matrices * matrix_bytes;
  status = neurons_.allocate(neuron_bytes_needed(config), "neurons");
  if (!status.is_ok()) return status;

  layers.resize(config.layer_count);
  for (size_t i = 0; i < config.expert_offsets.size(); i++) {
    const auto matrix = [&](size_t m) {
      return Matrix{neurons_.data() + i * expert_bytes + m * matrix_bytes, config.ffn_encoding, config.neuron_count,
                    config.hidden_size};
    };
    ExpertWeights expert;
    if (config.gated) expert.gate = matrix(0);
    expert.up = matrix(layout.matrices - 2);
    expert.down = matrix(layout.matrices - 1);
    layers[i / config.expert_count].experts.push_back(expert);
  }

  return load_bundles(config, [&](size_t bank, size_t neuron, const uint8_t* part1, const uint8_t* part2) {
    uint8_t* base = neurons_.data() + bank * expert_bytes + neuron * row;
    uint8_t* const rows[3] = {base, base + matrix_bytes, base + 2 * matrix_bytes};
    unpack_bundle(config, part1, part2, rows);
  });
}

Status Weights::bind(const EngineConfig& config) {
  layers.resize(config.layer_count);
  TensorTaker taker(resident_);
  const auto take = [&](const std::string& name, size_t rows, size_t columns, bool needed, bool is_float, Matrix* out) {
    taker.take(name, rows, columns, needed, is_float, out);
  };
  const size_t hidden = config.hidden_size;
  const auto vector = [&](const std::string& name, size_t size, bool needed, Matrix* out) {
    take(name, 1, size, needed, true, out);
  };
  take("embedding", config.vocab_size, hidden, true, false, &embedding);
  if (config.rope_frequencies.empty()) {
    const Matrix* positions = resident_.find("position_embedding");
    const size_t rows = positions == nullptr ? 0 : positions->rows;
    if (rows < config.context_length) return Status::argument("position_embedding: fewer rows than the context");
    take("position_embedding", rows, hidden, true, false, &position_embedding);
  }
  head = embedding;
  take("head", config.vocab_size, hidden, false, false, &head);
  vector("output_norm", hidden, true, &output_norm);
  vector("output_norm_bias", hidden, false, &output_norm_bias);
  for (size_t i = 0; i < config.layer_count; i++) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    LayerWeights& layer = layers[i];
    vector(prefix + "attention_norm", hidden, true, &layer.attention_norm);
    vector(prefix + "attention_norm_bias", hidden, false, &layer.attention_norm_bias);
    take(prefix + "q", config.query_size(), hidden, true, false, &layer.q);
    take(prefix + "k", config.kv_size(), hidden, true, false, &layer.k);
    take(prefix + "v", config.kv_size(), hidden, true, false, &layer.v);
    take(prefix + "o", hidden, config.query_size(), true, false, &layer.o);
    vector(prefix + "q_bias", config.query_size(), false, &layer.q_bias);
    vector(prefix + "k_bias", config.kv_size(), false, &layer.k_bias);
    vector(prefix + "v_bias", config.kv_size(), false, &layer.v_bias);
    vector(prefix + "o_bias", hidden, false, &layer.o_bias);
    vector(prefix + "q_norm", config.head_dim, false, &layer.q_norm);
    vector(prefix + "k_norm", config.head_dim, false, &layer.k_norm);
    vector(prefix + "ffn_norm", hidden, true, &layer.ffn_norm);
    vector(prefix + "ffn_norm_bias", hidden, false, &layer.ffn_norm_bias);
    take(prefix + "router", config.expert_count, hidden, config.expert_count > 1, true, &layer.router);
    vector(prefix + "up_bias", config.neuron_count, false, &layer.up_bias);
    vector(prefix + "down_bias", hidden, false, &layer.down_bias);
  }
  return taker.status();
}

}  // namespace pi2
