#pragma once
/**
 * Replay of a recorded trace through the neuron cache: the calls that the engine makes, in its order, without weights. The
 * share of needed neurons that a policy finds is then known without running the model again, and next to what others would
 * find.
 */
#include <cstddef>
#include <cstdint>
#include <vector>

#include "native/base/status.h"
#include "native/cache/neuron_cache.h"

namespace pi2 {

/** Which neurons tokens needed, in order of the tokens; bits as `StepRecord` has them. */
struct NeuronTrace {
  size_t tokens = 0;
  size_t layers = 0;
  size_t experts = 0;
  size_t neurons = 0;
  const uint8_t* fired = nullptr;   // (token, layer, expert, ceil(neurons / 8))
  const uint8_t* routed = nullptr;  // (token, layer, ceil(experts / 8))

  size_t banks() const { return layers * experts; }
  size_t fired_bytes_per_token() const { return banks() * ((neurons + 7) / 8); }
  size_t routed_bytes_per_token() const { return layers * ((experts + 7) / 8); }
};

/** Needed neurons by where they were found. */
struct ReplayCounters {
  uint64_t hot_hits = 0;
  uint64_t cold_hits = 0;
  uint64_t misses = 0;
};

/**
 * Drives a NeuronCache with `plans`, one for each bank, through the trace, one token after another; counts from token
 * `count_from` on. `firing_rates` as for NeuronCache::allocate. Fails for lack of memory.
 */
Status replay(const NeuronTrace& trace, const std::vector<BankPlan>& plans, const std::vector<float>& firing_rates,
              size_t count_from, ReplayCounters* counters);

}  // namespace pi2
