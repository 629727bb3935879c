#include "native/engine/weights.h"

#include <algorithm>

#include "native/engine/load.h"

namespace pi2 {
namespace {

/** Extents begin on pages in memory too; and kernels may load a line past the last row. */
constexpr size_t kAlignment = 4096;
/** Tensors begin at multiples of this; FORMAT.md section 3. */
constexpr size_t kTensorAlignment = 64;

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

}  // namespace

Status Weights::load(const EngineConfig& config) {
  Status status = load_resident(config);
  if (status.is_ok() && !config.stream.enabled()) status = load_neurons(config);
  if (status.is_ok()) status = bind(config);
  return status;
}

Status Weights::load_resident(const EngineConfig& config) {
  File file;
  Status status = file.open(config.resident_path);
  if (status.is_ok()) status = check_extents(config, false, file);
  if (!status.is_ok()) return status;
  size_t total = 0;
  for (const ExtentConfig& extent : config.extents) {
    places_.push_back(total);
    if (!extent.is_neurons) total += round_up(extent.bytes, kAlignment);
  }
  status = resident_.allocate(resident_bytes_needed(config), "resident weights");
  if (!status.is_ok()) return status;
  status = load_extents(config, false, [&](size_t index) {
    const ExtentConfig& extent = config.extents[index];
    uint8_t* place = resident_.data() + places_[index];
    uint32_t sum = 0;
    for (size_t done = 0; done < extent.bytes; done += kLoadBytes) {
      const size_t bytes = std::min(kLoadBytes, extent.bytes - done);
      Status read = file.read(extent.offset + done, bytes, place + done);
      if (!read.is_ok()) return read;
      file.forget(extent.offset + done, bytes);
      sum = crc32(place + done, bytes, sum);
    }
    return compare_checksum(extent, sum);
  });
  if (!status.is_ok()) return status;

  for (const TensorConfig& tensor : config.tensors) {
    // Divided, not multiplied: a product of absurd sizes overflows.
    const size_t row = row_bytes(tensor.encoding, tensor.columns);
    if (row == 0 || tensor.bytes % row != 0 || tensor.bytes / row != tensor.rows) {
      return Status::argument(tensor.name + ": bytes do not match its shape");
    }
    if (tensor.offset % kTensorAlignment != 0) return Status::argument(tensor.name + ": not aligned");
    const uint8_t* place = resident_at(config, tensor.offset, tensor.bytes);
    if (place == nullptr) return Status::argument(tensor.name + ": in no extent");
    tensors_[tensor.name] = {place, tensor.encoding, tensor.rows, tensor.columns};
  }
  return Status::ok();
}

const uint8_t* Weights::resident_at(const EngineConfig& config, size_t offset, size_t bytes) const {
  for (size_t i = 0; i < config.extents.size(); i++) {
    const ExtentConfig& extent = config.extents[i];
    if (extent.is_neurons || offset < extent.offset) continue;
    const size_t inside = offset - extent.offset;
    if (inside <= extent.bytes && bytes <= extent.bytes - inside) return resident_.data() + places_[i] + inside;
  }
  return nullptr;
}

size_t Weights::resident_bytes_needed(const EngineConfig& config) {
  // Kernels may load a line past a row's scales: one page is kept behind the last extent.
  size_t total = kAlignment;
  for (const ExtentConfig& extent : config.extents) {
    if (!extent.is_neurons) total += round_up(extent.bytes, kAlignment);
  }
  return total;
}

size_t Weights::neuron_bytes_needed(const EngineConfig& config) {
  const size_t row = row_bytes(config.ffn_encoding, config.hidden_size);
  return config.expert_offsets.size() * config.layout.matrices * config.neuron_count * row + kAlignment;
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
  Status status;
  const auto take = [&](const std::string& name, size_t rows, size_t columns, bool needed, bool is_float, Matrix* out) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      if (needed && status.is_ok()) status = Status::argument(name + ": missing");
      return;
    }
    const Matrix& matrix = found->second;
    if (matrix.rows != rows || matrix.columns != columns || is_float != (matrix.encoding == Encoding::kF32)) {
      if (status.is_ok()) status = Status::argument(name + ": wrong shape or encoding");
      return;
    }
    *out = matrix;
  };
  const size_t hidden = config.hidden_size;
  const auto vector = [&](const std::string& name, size_t size, bool needed, Matrix* out) {
    take(name, 1, size, needed, true, out);
  };
  take("embedding", config.vocab_size, hidden, true, false, &embedding);
  if (config.rope_frequencies.empty()) {
    const auto positions = tensors_.find("position_embedding");
    const size_t rows = positions == tensors_.end() ? 0 : positions->second.rows;
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
  return status;
}

}  // namespace pi2
