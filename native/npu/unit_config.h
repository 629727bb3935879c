#pragma once
#include <array>
#include <cstddef>

#include "native/npu/dense_unit.h"
#include "native/npu/onnxruntime_config.h"

namespace pi2 {

/** What a dense unit is; `--npu`. */
enum class UnitKind { kNone, kHost, kOnnxruntime };

/** Each of 1 .. kSmallBatches tokens has graphs of its own; what is more is a chunk of a prompt. */
inline constexpr size_t kSmallBatches = 4;
/** Tokens of the graphs for a chunk of a prompt. Fewer are padded with zeros, if they fill at least half of it. */
inline constexpr size_t kChunkTokens = 128;
inline constexpr size_t kLeastChunk = kChunkTokens / 2;
/** Most clusters of a bank. */
inline constexpr size_t kMostClusters = 8;

/** Which dense unit an engine has and what it computes; UnitRequest of src/engine/contract.ts. */
struct UnitConfig {
  /** Clusters that are the unit's: of 1 to kSmallBatches tokens, and of a chunk. 0: the CPU computes all. */
  using Schedule = std::array<size_t, kSmallBatches + 1>;

  UnitKind kind = UnitKind::kNone;
  /** Cores that the unit takes from the engine's threads while it computes. */
  size_t threads = 0;
  size_t cluster_neurons = 0;
  /** No schedule has more. */
  size_t most_clusters = 0;
  Schedule clusters{};
  /** Of kOnnxruntime. */
  OnnxruntimeConfig onnxruntime;
  /** Trouble that tests ask for: the job that fails, from 1. */
  size_t fail_job = 0;

  bool enabled() const { return kind != UnitKind::kNone; }
};

/**
 * The graph for so many tokens; clusters 0: the CPU computes them all. Exactly so many tokens as it has, but for chunks:
 * more than kSmallBatches and less than kLeastChunk are the CPU's alone.
 */
inline GraphShape scheduled_shape(const UnitConfig::Schedule& clusters, size_t tokens) {
  if (tokens <= kSmallBatches) return {tokens, clusters[tokens - 1]};
  if (tokens >= kLeastChunk && tokens <= kChunkTokens) return {kChunkTokens, clusters[kSmallBatches]};
  return {};
}

/** Neurons of the first `clusters` clusters of a bank. */
inline size_t cluster_end(const UnitConfig& unit, size_t clusters, size_t neuron_count) {
  const size_t end = clusters * unit.cluster_neurons;
  return end < neuron_count ? end : neuron_count;
}

}  // namespace pi2
