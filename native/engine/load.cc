#include "native/engine/load.h"

#include <cstring>

#include "native/base/memory.h"
#include "native/storage/reader.h"

namespace pi2 {

Status compare_checksum(const ExtentConfig& extent, uint32_t sum) {
  if (sum == extent.crc32) return Status::ok();
  return Status::checksum(extent.name + ": the bytes on flash do not match their checksum");
}

Status load_extents(const std::vector<ExtentConfig>& extents, bool neurons, size_t threads,
                    const std::function<Status(size_t index)>& load) {
  std::vector<size_t> wanted;
  for (size_t i = 0; i < extents.size(); i++) {
    if (extents[i].is_neurons == neurons) wanted.push_back(i);
  }
  FirstFailure failure;
  std::atomic<size_t> next{0};
  const size_t loaders = threads * kLoadersPerThread;
  run_in_ranges(loaders, loaders, [&](size_t, size_t) {
    for (size_t i = next.fetch_add(1); i < wanted.size() && !failure.any(); i = next.fetch_add(1)) {
      failure.meet(load(wanted[i]));
    }
  });
  return failure.take();
}

Status check_extents(const std::string& path, const std::vector<ExtentConfig>& extents, bool neurons, const File& file) {
  size_t left = file.size();
  for (const ExtentConfig& extent : extents) {
    if (extent.is_neurons != neurons) continue;
    if (extent.offset > file.size() || extent.bytes > file.size() - extent.offset) {
      return Status::io(path + " ends before " + extent.name + " does");
    }
    if (extent.bytes > left) return Status::argument(extent.name + ": overlaps another extent");
    left -= extent.bytes;
  }
  return Status::ok();
}

Status verify_extents(const std::string& path, const std::vector<ExtentConfig>& extents, bool neurons, size_t threads) {
  File file;
  Status status = file.open(path);
  if (status.is_ok()) status = check_extents(path, extents, neurons, file);
  if (!status.is_ok()) return status;
  return load_extents(extents, neurons, threads, [&](size_t index) {
    const ExtentConfig& extent = extents[index];
    std::vector<uint8_t> buffer(std::min(kLoadBytes, extent.bytes));
    uint32_t sum = 0;
    for (size_t done = 0; done < extent.bytes; done += buffer.size()) {
      const size_t bytes = std::min(buffer.size(), extent.bytes - done);
      Status read = file.read(extent.offset + done, bytes, buffer.data());
      if (!read.is_ok()) return read;
      sum = crc32(buffer.data(), bytes, sum);
    }
    return compare_checksum(extent, sum);
  });
}

Status check_neurons(const EngineConfig& config) {
  const BundleLayout& layout = config.layout;
  const size_t weights = weight_bytes(config.ffn_encoding, config.hidden_size);
  const size_t scales = scale_bytes(config.ffn_encoding, config.hidden_size);
  if (layout.part1_bytes != weights + layout.matrices * scales || layout.part2_bytes != (layout.matrices - 1) * weights ||
      layout.matrices != (config.gated ? 3u : 2u)) {
    return Status::argument("the bundle layout does not match the model's shape");
  }
  if (config.expert_offsets.size() != config.layer_count * config.expert_count) {
    return Status::argument("expertOffsets must have one entry a layer and expert");
  }
  File file;
  Status status = file.open(config.neurons_path);
  if (status.is_ok()) status = check_extents(config.neurons_path, config.extents, true, file);
  if (status.is_ok() && config.expert_offsets.size() > file.size() / layout.bytes(config.neuron_count)) {
    status = Status::argument("neurons.bin is too small for every expert");
  }
  const size_t bytes = layout.bytes(config.neuron_count);
  for (size_t bank = 0; status.is_ok() && bank < config.expert_offsets.size(); bank++) {
    const size_t offset = config.expert_offsets[bank];
    const bool inside = std::any_of(config.extents.begin(), config.extents.end(), [&](const ExtentConfig& extent) {
      return extent.is_neurons && offset >= extent.offset && bytes <= extent.bytes &&
             offset - extent.offset <= extent.bytes - bytes;
    });
    if (!inside) status = Status::argument("the extents do not hold every neuron once");
  }
  return status;
}

void unpack_bundle(const EngineConfig& config, const uint8_t* part1, const uint8_t* part2, uint8_t* const rows[3]) {
  const size_t weights = weight_bytes(config.ffn_encoding, config.hidden_size);
  const size_t scales = scale_bytes(config.ffn_encoding, config.hidden_size);
  for (size_t m = 0; m < config.layout.matrices; m++) {
    if (rows[m] == nullptr) continue;
    std::memcpy(rows[m], m == 0 ? part1 : part2 + (m - 1) * weights, weights);
    std::memcpy(rows[m] + weights, part1 + weights + m * scales, scales);
  }
}

Status load_bundles(
    const EngineConfig& config,
    const std::function<void(size_t bank, size_t neuron, const uint8_t* part1, const uint8_t* part2)>& take) {
  const BundleLayout& layout = config.layout;
  File file;
  Status status = file.open(config.neurons_path);
  if (!status.is_ok()) return status;
  std::vector<std::atomic<size_t>> loaded(config.expert_offsets.size());
  const size_t units_per_read = std::max<size_t>(1, kLoadBytes / layout.unit_bytes);
  const size_t expert_bytes = layout.bytes(config.neuron_count);
  status = load_extents(config.extents, true, config.threads, [&](size_t index) {
    const ExtentConfig& extent = config.extents[index];
    const size_t most = std::min(units_per_read * layout.unit_bytes, extent.bytes);
    HugeMemory buffer;
    Status read = buffer.allocate((most + kPageBytes - 1) / kPageBytes * kPageBytes, "loading");
    uint32_t sum = 0;
    for (size_t done = 0; read.is_ok() && done < extent.bytes; done += most) {
      const size_t bytes = std::min(most, extent.bytes - done);
      read = file.read_once(extent.offset + done, bytes, buffer.data());
      if (!read.is_ok()) break;
      sum = crc32(buffer.data(), bytes, sum);
      const size_t begin = extent.offset + done;
      for (size_t bank = 0; bank < config.expert_offsets.size(); bank++) {
        const size_t expert = config.expert_offsets[bank];
        const size_t first_byte = std::max(begin, expert);
        const size_t end_byte = std::min(begin + bytes, expert + expert_bytes);
        for (size_t at = first_byte; at + layout.unit_bytes <= end_byte; at += layout.unit_bytes) {
          if ((at - expert) % layout.unit_bytes != 0) {
            return Status::argument(extent.name + ": bundles are not aligned to units");
          }
          const size_t first = (at - expert) / layout.unit_bytes * layout.neurons_per_unit;
          const size_t end = std::min(first + layout.neurons_per_unit, config.neuron_count);
          const uint8_t* unit = buffer.data() + (at - begin);
          for (size_t j = first; j < end; j++) {
            take(bank, j, unit + (j - first) * layout.part1_stride,
                 unit + layout.part2_offset + (j - first) * layout.part2_stride);
          }
          loaded[bank].fetch_add(end - first, std::memory_order_relaxed);
        }
      }
    }
    return read.is_ok() ? compare_checksum(extent, sum) : read;
  });
  if (!status.is_ok()) return status;
  for (const std::atomic<size_t>& count : loaded) {
    if (count.load() != config.neuron_count) return Status::argument("the extents do not hold every neuron once");
  }
  return Status::ok();
}

}  // namespace pi2
