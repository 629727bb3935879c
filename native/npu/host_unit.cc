#include "native/npu/host_unit.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "native/base/carver.h"
#include "native/base/pause.h"
#include "native/engine/neurons.h"
#include "native/engine/product.h"

namespace pi2 {
namespace {

/** About 50 us of pauses, as those of ThreadPool: between two layers there is attention, between two experts less. */
constexpr int kSpins = 2000;

/** Waits, spinning and then asleep, until `number` is not `old`; returns it. */
uint32_t wait_for_change(const std::atomic<uint32_t>& number, uint32_t old) {
  uint32_t value = number.load(std::memory_order_acquire);
  for (int spin = 0; value == old && spin < kSpins; spin++) {
    pause_cpu();
    value = number.load(std::memory_order_acquire);
  }
  while (value == old) {
    number.wait(old, std::memory_order_acquire);
    value = number.load(std::memory_order_acquire);
  }
  return value;
}

/** Most tokens that are computed together. */
size_t most_tokens(const EngineConfig& config) {
  return config.batch_size < kLeastChunk ? std::min(config.batch_size, kSmallBatches) : kChunkTokens;
}

size_t most_neurons(const EngineConfig& config) {
  return cluster_end(config.unit, config.unit.most_clusters, config.neuron_count);
}

std::string describe(GraphShape shape) {
  return std::to_string(shape.tokens) + " tokens and " + std::to_string(shape.clusters) + " clusters";
}

}  // namespace

size_t HostUnit::carve(const EngineConfig& config, uint8_t* memory) {
  Carver carver(memory);
  const size_t tokens = most_tokens(config);
  const size_t neurons = most_neurons(config);
  const size_t hidden = config.hidden_size;
  inputs_ = carver.take<float>(tokens * hidden);
  sums_ = carver.take<float>(tokens * hidden);
  tiles_ = carver.take<float>(config.unit.threads * 2 * tokens * kNeuronChunk);
  factors_ = carver.take<float>(neurons * tokens);
  columns_ = carver.take<Column>(kParts * part_room(neurons));
  numbers_ = carver.take<uint32_t>(neurons);
  part_sums_ = carver.take<float>(kParts * kGroup * group_count(hidden));
  tile_sums_ = carver.take<float>(config.unit.threads * kTokenTile * kGroup);
  float* values = carver.take<float>(Activations::float_bytes(hidden, tokens) / sizeof(float));
  x_ = Activations(values, carver.take<uint8_t>(Activations::form_bytes(nullptr, hidden, tokens)), hidden);
  return carver.used();
}

HostUnit::HostUnit(const EngineConfig& config, const Kernels& kernels, std::vector<HotRows> banks, size_t threads)
    : config_(&config), kernels_(&kernels), banks_(std::move(banks)), pool_(threads) {}

size_t HostUnit::bytes_needed(const EngineConfig& config) {
  // The pointers that carve sets are dropped with this object.
  return HostUnit(config, scalar_kernels(), {}, 1).carve(config, nullptr);
}

Status HostUnit::open(const EngineConfig& config, const Kernels& kernels, std::vector<HotRows> banks,
                      std::unique_ptr<DenseUnit>* result) {
  std::unique_ptr<HostUnit> unit(new HostUnit(config, kernels, std::move(banks), config.unit.threads));
  Status status = unit->memory_.allocate(bytes_needed(config), "the dense unit");
  if (!status.is_ok()) return status;
  unit->carve(config, unit->memory_.data());
  for (size_t i = 0; i < most_neurons(config); i++) unit->numbers_[i] = static_cast<uint32_t>(i);
  HostUnit* served = unit.get();
  unit->leader_ = std::thread([served] { served->serve(); });
  *result = std::move(unit);
  return status;
}

HostUnit::~HostUnit() {
  if (!leader_.joinable()) return;
  stop_.store(true, std::memory_order_relaxed);
  asked_.fetch_add(1, std::memory_order_release);
  asked_.notify_one();
  leader_.join();
}

bool HostUnit::is_loaded(GraphShape shape) const {
  return std::find(loaded_.begin(), loaded_.end(), shape) != loaded_.end();
}

void HostUnit::load(GraphShape shape) {
  const bool fits = shape.tokens > 0 && shape.tokens <= most_tokens(*config_) && shape.clusters > 0 &&
                    shape.clusters <= config_->unit.most_clusters;
  if (!fits) {
    load_status_ = Status::argument("the host unit has no room for " + describe(shape));
  } else if (!is_loaded(shape)) {
    loaded_.push_back(shape);
  }
}

void HostUnit::unload(GraphShape shape) {
  if (!(shape == active_)) std::erase(loaded_, shape);
}

Status HostUnit::activate(GraphShape shape) {
  if (!is_loaded(shape)) return Status::argument("the dense unit has no graph of " + describe(shape));
  active_ = shape;
  return Status::ok();
}

Status HostUnit::start(size_t bank, size_t tokens) {
  if (active_.clusters == 0 || tokens != active_.tokens) {
    return Status::argument("the dense unit was given " + std::to_string(tokens) + " tokens for a graph of " +
                            describe(active_));
  }
  if (bank >= banks_.size()) return Status::argument("the dense unit has no bank " + std::to_string(bank));
  bank_ = bank;
  asked_.fetch_add(1, std::memory_order_release);
  asked_.notify_one();
  return Status::ok();
}

Status HostUnit::finish() {
  const uint32_t asked = asked_.load(std::memory_order_relaxed);
  if (done_.load(std::memory_order_acquire) != asked) wait_for_change(done_, asked - 1);
  return Status::ok();
}

/** The life of the leader: thread 0 of the unit's pool. */
void HostUnit::serve() {
  for (uint32_t seen = 0;;) {
    seen = wait_for_change(asked_, seen);
    if (stop_.load(std::memory_order_relaxed)) return;
    const auto start = std::chrono::steady_clock::now();
    compute(banks_[bank_], active_.tokens, cluster_end(config_->unit, active_.clusters, config_->neuron_count));
    const auto took = std::chrono::steady_clock::now() - start;
    busy_ns_ += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(took).count());
    done_.store(seen, std::memory_order_release);
    done_.notify_one();
  }
}

void HostUnit::compute(const HotRows& rows, size_t tokens, size_t neurons) {
  for (size_t t = 0; t < tokens; t++) {
    std::copy_n(inputs_ + t * config_->hidden_size, config_->hidden_size, x_.token(t));
  }
  x_.prepare(*kernels_, pool_, tokens, false);
  pool_.run(chunk_total(neurons), [&](size_t chunk, size_t thread) {
    const size_t first = chunk * kNeuronChunk;
    activate_chunk(rows, tokens, first, std::min(kNeuronChunk, neurons - first), thread);
  });
  if (tokens == 1) {
    sum_one(neurons);
  } else {
    sum_batch(rows, tokens, neurons);
  }
}

/** What each token takes of the down columns of neurons [first, first + count). */
void HostUnit::activate_chunk(const HotRows& rows, size_t tokens, size_t first, size_t count, size_t thread) {
  const Encoding encoding = config_->ffn_encoding;
  const auto from = [&](const Rows& all) {
    return Rows{all.weights + first * all.stride, all.scales + first * all.stride, all.stride};
  };
  float* gates = tiles_ + thread * 2 * tokens * kNeuronChunk;  // (token, neuron of the chunk)
  float* ups = gates + tokens * kNeuronChunk;
  multiply(*kernels_, encoding, from(rows.first), count, x_, tokens, gates, kNeuronChunk);
  if (config_->gated) {
    multiply(*kernels_, encoding, from(rows.up), count, x_, tokens, ups, kNeuronChunk);
  } else {
    std::fill_n(ups, tokens * kNeuronChunk, 1.0f);
  }
  const size_t chunk = first / kNeuronChunk;
  Column* columns = columns_ + chunk % kParts * part_room(most_neurons(*config_)) + chunk / kParts * kNeuronChunk;
  for (size_t t = 0; t < tokens; t++) {
    float* values = gates + t * kNeuronChunk;
    for (size_t j = 0; rows.bias != nullptr && j < count; j++) values[j] += rows.bias[first + j];
    pi2::activate(*config_, values, ups + t * kNeuronChunk, count, values);
    for (size_t j = 0; tokens > 1 && j < count; j++) factors_[(first + j) * tokens + t] = values[j];
  }
  const Rows down = from(rows.down);
  for (size_t j = 0; tokens == 1 && j < count; j++) {
    columns[j] = {down.weights + j * down.stride, down.scales + j * down.stride, gates[j]};
  }
}

/** Sums the columns in parts, as the CPU does, so that threads have no say in the result. */
void HostUnit::sum_one(size_t neurons) {
  const size_t groups = group_count(config_->hidden_size);
  const size_t chunks = chunk_total(neurons);
  pool_.run(kParts, [&](size_t part, size_t) {
    float* sums = part_sums_ + part * groups * kGroup;
    std::memset(sums, 0, groups * kGroup * sizeof(float));
    if (part >= chunks) return;
    // All of its chunks are full but the bank's last.
    const size_t last = part + (chunks - 1 - part) / kParts * kParts;
    const size_t count = last / kParts * kNeuronChunk + std::min(kNeuronChunk, neurons - last * kNeuronChunk);
    const Column* columns = columns_ + part * part_room(most_neurons(*config_));
    add_columns(*kernels_, config_->ffn_encoding, columns, count, groups, sums);
  });
  float* y = part_sums_;
  for (size_t part = 1; part < kParts; part++) {
    for (size_t i = 0; i < groups * kGroup; i++) y[i] += part_sums_[part * groups * kGroup + i];
  }
  kernels_->to_natural_order(config_->ffn_encoding, y, groups);
  std::copy_n(y, config_->hidden_size, sums_);
}

void HostUnit::sum_batch(const HotRows& rows, size_t tokens, size_t neurons) {
  const size_t hidden = config_->hidden_size;
  const size_t tiles = (tokens + kTokenTile - 1) / kTokenTile;
  pool_.run(group_count(hidden) * tiles, [&](size_t task, size_t thread) {
    const size_t group = task / tiles;
    const size_t first = task % tiles * kTokenTile;
    const size_t count = std::min(kTokenTile, tokens - first);
    float* sums = tile_sums_ + thread * kTokenTile * kGroup;  // (token of the tile, output of the group)
    std::memset(sums, 0, count * kGroup * sizeof(float));
    const ColumnList list{rows.down, numbers_, neurons, factors_ + first, tokens};
    add_columns(*kernels_, config_->ffn_encoding, list, group, count, sums, kGroup);
    for (size_t t = 0; t < count; t++) {
      kernels_->to_natural_order(config_->ffn_encoding, sums + t * kGroup, 1);
      std::copy_n(sums + t * kGroup, std::min(kGroup, hidden - group * kGroup),
                  sums_ + (first + t) * hidden + group * kGroup);
    }
  });
}

}  // namespace pi2
