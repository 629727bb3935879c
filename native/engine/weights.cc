#include "native/engine/weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "native/base/crc32.h"
#include "native/base/threads.h"
#include "native/storage/file.h"

namespace pi2 {
namespace {

/** Bytes of one read while loading: long enough for sequential speed, short enough for a bounce buffer a thread. */
constexpr size_t kReadBytes = size_t{4} << 20;
constexpr size_t kAlignment = 4096;
/** Tensors begin at multiples of this; FORMAT.md section 3. */
constexpr size_t kTensorAlignment = 64;

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

/** Keeps the first failure of several threads. */
class FirstFailure {
 public:
  void meet(Status status) {
    if (status.is_ok()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (status_.is_ok()) status_ = std::move(status);
    failed_.store(true, std::memory_order_relaxed);
  }
  bool any() const { return failed_.load(std::memory_order_relaxed); }
  Status take() { return status_; }

 private:
  std::mutex mutex_;
  Status status_;
  std::atomic<bool> failed_{false};
};

Status compare_checksum(const ExtentConfig& extent, uint32_t sum) {
  if (sum == extent.crc32) return Status::ok();
  return Status::checksum(extent.name + ": the bytes on flash do not match their checksum");
}

/** Whether the file holds every extent, each of them once: no more is allocated than it has. */
Status check_extents(const EngineConfig& config, bool neurons, const File& file, const std::string& path) {
  size_t left = file.size();
  for (const ExtentConfig& extent : config.extents) {
    if (extent.is_neurons != neurons) continue;
    if (extent.offset > file.size() || extent.bytes > file.size() - extent.offset) {
      return Status::io(path + " ends before " + extent.name + " does");
    }
    if (extent.bytes > left) return Status::argument(extent.name + ": overlaps another extent");
    left -= extent.bytes;
  }
  return Status::ok();
}

/** Runs `load` on every extent of one file, on all threads. */
template <class Load>
Status load_extents(const EngineConfig& config, bool neurons, const Load& load) {
  std::vector<size_t> wanted;
  for (size_t i = 0; i < config.extents.size(); i++) {
    if (config.extents[i].is_neurons == neurons) wanted.push_back(i);
  }
  FirstFailure failure;
  std::atomic<size_t> next{0};
  run_in_ranges(config.threads, config.threads, [&](size_t, size_t) {
    for (size_t i = next.fetch_add(1); i < wanted.size() && !failure.any(); i = next.fetch_add(1)) {
      failure.meet(load(wanted[i]));
    }
  });
  return failure.take();
}

/** Takes one bundle apart: FORMAT.md section 4 to three rows of weights and scales. */
void unpack_bundle(const EngineConfig& config, const uint8_t* part1, const uint8_t* part2, uint8_t* const rows[3]) {
  const size_t weights = weight_bytes(config.ffn_encoding, config.hidden_size);
  const size_t scales = scale_bytes(config.ffn_encoding, config.hidden_size);
  std::memcpy(rows[0], part1, weights);
  for (size_t m = 1; m < config.layout.matrices; m++) std::memcpy(rows[m], part2 + (m - 1) * weights, weights);
  for (size_t m = 0; m < config.layout.matrices; m++) std::memcpy(rows[m] + weights, part1 + weights + m * scales, scales);
}

}  // namespace

Status Weights::load(const EngineConfig& config) {
  Status status = load_resident(config);
  if (status.is_ok()) status = load_neurons(config);
  if (status.is_ok()) status = bind(config);
  return status;
}

Status Weights::load_resident(const EngineConfig& config) {
  File file;
  Status status = file.open(config.resident_path);
  if (status.is_ok()) status = check_extents(config, false, file, config.resident_path);
  if (!status.is_ok()) return status;
  std::vector<size_t> places(config.extents.size(), 0);
  size_t total = 0;
  for (size_t i = 0; i < config.extents.size(); i++) {
    if (config.extents[i].is_neurons) continue;
    places[i] = total;
    total += round_up(config.extents[i].bytes, kAlignment);
  }
  // Kernels may load a line past a row's scales: keep one page behind the last extent.
  status = resident_.allocate(total + kAlignment, "resident weights");
  if (!status.is_ok()) return status;
  status = load_extents(config, false, [&](size_t index) {
    const ExtentConfig& extent = config.extents[index];
    uint8_t* place = resident_.data() + places[index];
    uint32_t sum = 0;
    for (size_t done = 0; done < extent.bytes; done += kReadBytes) {
      const size_t bytes = std::min(kReadBytes, extent.bytes - done);
      Status read = file.read(extent.offset + done, bytes, place + done);
      if (!read.is_ok()) return read;
      sum = crc32(place + done, bytes, sum);
    }
    file.forget(extent.offset, extent.bytes);
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
    bool found = false;
    for (size_t i = 0; i < config.extents.size() && !found; i++) {
      const ExtentConfig& extent = config.extents[i];
      if (extent.is_neurons || tensor.offset < extent.offset) continue;
      const size_t inside = tensor.offset - extent.offset;
      if (inside > extent.bytes || tensor.bytes > extent.bytes - inside) continue;
      tensors_[tensor.name] = {resident_.data() + places[i] + inside, tensor.encoding, tensor.rows, tensor.columns};
      found = true;
    }
    if (!found) return Status::argument(tensor.name + ": in no extent");
  }
  return Status::ok();
}

Status Weights::load_neurons(const EngineConfig& config) {
  const BundleLayout& layout = config.layout;
  const size_t row = row_bytes(config.ffn_encoding, config.hidden_size);
  const size_t weights = weight_bytes(config.ffn_encoding, config.hidden_size);
  const size_t scales = scale_bytes(config.ffn_encoding, config.hidden_size);
  if (layout.part1_bytes != weights + layout.matrices * scales || layout.part2_bytes != (layout.matrices - 1) * weights ||
      layout.matrices != (config.gated ? 3u : 2u)) {
    return Status::argument("the bundle layout does not match the model's shape");
  }
  if (config.expert_offsets.size() != config.layer_count * config.expert_count) {
    return Status::argument("expertOffsets must have one entry a layer and expert");
  }
  const size_t matrix_bytes = config.neuron_count * row;
  const size_t expert_bytes = layout.matrices * matrix_bytes;
  const size_t expert_flash_bytes = layout.bytes(config.neuron_count);
  File file;
  Status status = file.open(config.neurons_path);
  if (status.is_ok()) status = check_extents(config, true, file, config.neurons_path);
  if (!status.is_ok()) return status;
  if (config.expert_offsets.size() > file.size() / expert_flash_bytes) {
    return Status::argument("neurons.bin is too small for every expert");
  }
  status = neurons_.allocate(config.expert_offsets.size() * expert_bytes + kAlignment, "neurons");
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

  std::vector<std::atomic<size_t>> neurons_loaded(config.expert_offsets.size());
  const size_t units_per_read = std::max<size_t>(1, kReadBytes / layout.unit_bytes);
  status = load_extents(config, true, [&](size_t index) {
    const ExtentConfig& extent = config.extents[index];
    std::vector<uint8_t> buffer(std::min(units_per_read * layout.unit_bytes, extent.bytes));
    uint32_t sum = 0;
    for (size_t done = 0; done < extent.bytes; done += buffer.size()) {
      const size_t bytes = std::min(buffer.size(), extent.bytes - done);
      Status read = file.read(extent.offset + done, bytes, buffer.data());
      if (!read.is_ok()) return read;
      sum = crc32(buffer.data(), bytes, sum);
      const size_t begin = extent.offset + done;
      for (size_t i = 0; i < config.expert_offsets.size(); i++) {
        const size_t expert = config.expert_offsets[i];
        const size_t first_byte = std::max(begin, expert);
        const size_t end_byte = std::min(begin + bytes, expert + expert_flash_bytes);
        for (size_t at = first_byte; at + layout.unit_bytes <= end_byte; at += layout.unit_bytes) {
          if ((at - expert) % layout.unit_bytes != 0)
            return Status::argument(extent.name + ": bundles are not aligned to units");
          const size_t first = (at - expert) / layout.unit_bytes * layout.neurons_per_unit;
          const size_t end = std::min(first + layout.neurons_per_unit, config.neuron_count);
          const uint8_t* unit = buffer.data() + (at - begin);
          for (size_t j = first; j < end; j++) {
            const size_t slot = j - first;
            uint8_t* base = neurons_.data() + i * expert_bytes + j * row;
            uint8_t* const rows[3] = {base, base + matrix_bytes, base + 2 * matrix_bytes};
            unpack_bundle(config, unit + slot * layout.part1_stride, unit + layout.part2_offset + slot * layout.part2_stride,
                          rows);
          }
          neurons_loaded[i].fetch_add(end - first, std::memory_order_relaxed);
        }
      }
    }
    file.forget(extent.offset, extent.bytes);
    return compare_checksum(extent, sum);
  });
  if (!status.is_ok()) return status;
  for (const std::atomic<size_t>& loaded : neurons_loaded) {
    if (loaded.load() != config.neuron_count) return Status::argument("the extents do not hold every neuron once");
  }
  return Status::ok();
}

Status Weights::bind(const EngineConfig& config) {
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
