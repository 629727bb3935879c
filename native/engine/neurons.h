#pragma once
/** What resident and streamed experts share: how neurons are cut into chunks and parts, and what a neuron contributes. */
#include <cstddef>
#include <cstdint>

#include "native/engine/config.h"
#include "native/engine/exponential.h"

namespace pi2 {

/** Neurons that one thread takes at a time: the CPU's cluster (paper section 1.3). Product.h says why not fewer. */
inline constexpr size_t kNeuronChunk = 128;

/** Predictors score neurons in groups of kGroup. */
inline constexpr size_t kChunksPerGroup = kGroup / kNeuronChunk;

/**
 * Parts of the down sum. Part p holds the neurons of every kParts-th chunk, is summed by one thread in ascending order, and
 * parts are added in order. A column is read whole by one thread (DRAM dislikes halves), and a sum never depends on threads,
 * batching or where a neuron was kept. More parts than threads on any phone, few enough that adding them up costs nothing.
 */
inline constexpr size_t kParts = 8;

/**
 * Most tokens of a job that are few, as decoding several sequences has them: memory is their limit, so each looks for its
 * own rows, which those before it brought into the core's cache. Of more, nearly every row is wanted by one of them, and
 * arithmetic is the limit.
 */
inline constexpr size_t kFewTokens = 8;

/** Tokens whose sums one thread keeps at a time. */
inline constexpr size_t kTokenTile = 16;

constexpr size_t chunk_total(size_t neurons) { return (neurons + kNeuronChunk - 1) / kNeuronChunk; }

/** Room for the neurons of one part. */
constexpr size_t part_room(size_t neurons) { return (chunk_total(neurons) + kParts - 1) / kParts * kNeuronChunk; }

/** Bytes of one token's fired bits of one expert. */
constexpr size_t fired_bytes(size_t neurons) { return (neurons + 7) / 8; }

/** Bytes of one token's routed bits of one layer. */
constexpr size_t routed_bytes(size_t experts) { return (experts + 7) / 8; }

/** Whether a neuron with this product of its gate row can contribute at all. */
inline bool gate_fires(const EngineConfig& config, float gate) {
  switch (config.activation) {
    case ActivationKind::kSilu: return true;
    case ActivationKind::kRelu:
    case ActivationKind::kDRelu: return gate > 0;
    case ActivationKind::kFatRelu: return gate >= config.threshold;
  }
  return true;
}

/**
 * values[j] = what a neuron contributes for its gate and up products, 0 if it does not fire. Without a gate, its up product
 * counts as gate and `ups` are 1. `values` may be `gates`. Loops over many neurons, so that compilers make vector code of
 * it.
 */
inline void activate(const EngineConfig& config, const float* gates, const float* ups, size_t count, float* values) {
  const float threshold = config.threshold;
  switch (config.activation) {
    case ActivationKind::kSilu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] / (1.0f + exponential(-gates[j])) * ups[j];
      return;
    case ActivationKind::kRelu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] > 0 ? gates[j] * ups[j] : 0.0f;
      return;
    case ActivationKind::kDRelu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] > 0 && ups[j] > 0 ? gates[j] * ups[j] : 0.0f;
      return;
    case ActivationKind::kFatRelu:
      for (size_t j = 0; j < count; j++) values[j] = gates[j] >= threshold ? gates[j] * ups[j] : 0.0f;
      return;
  }
}

}  // namespace pi2
