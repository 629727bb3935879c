#include "native/cache/replay.h"

#include <bit>
#include <utility>

namespace pi2 {
namespace {

/** Neurons have one byte here: the policy does not look at sizes. */
constexpr size_t kTinyBytes = 1;

/** The numbers of the first `count` bits that are set, ascending. */
void list_bits(const uint8_t* bytes, size_t count, std::vector<uint32_t>* list) {
  list->clear();
  for (size_t first = 0; first < count; first += 8) {
    for (uint32_t rest = bytes[first / 8]; rest != 0; rest &= rest - 1) {
      const size_t number = first + static_cast<size_t>(std::countr_zero(rest));
      if (number < count) list->push_back(static_cast<uint32_t>(number));
    }
  }
}

}  // namespace

Status replay(const NeuronTrace& trace, const std::vector<BankPlan>& plans, const std::vector<float>& firing_rates,
              size_t count_from, ReplayCounters* counters) {
  NeuronCache cache;
  Status status = cache.allocate(plans, trace.neurons, kTinyBytes, kTinyBytes, firing_rates);
  if (!status.is_ok()) return status;
  const size_t bank_bytes = (trace.neurons + 7) / 8;
  const size_t layer_bytes = (trace.experts + 7) / 8;
  std::vector<uint32_t> needed;
  std::vector<std::pair<uint32_t, int32_t>> filling;
  needed.reserve(trace.neurons);
  filling.reserve(trace.neurons);
  for (size_t token = 0; token < trace.tokens; token++) {
    const uint8_t* fired = trace.fired + token * trace.fired_bytes_per_token();
    const uint8_t* routed = trace.routed + token * trace.routed_bytes_per_token();
    const bool counts = token >= count_from;
    for (size_t bank = 0; bank < trace.banks(); bank++) {
      const size_t expert = bank % trace.experts;
      if ((routed[bank / trace.experts * layer_bytes + expert / 8] >> (expert % 8) & 1) == 0) continue;
      list_bits(fired + bank * bank_bytes, trace.neurons, &needed);
      cache.begin_tick(bank);
      for (const uint32_t neuron : needed) cache.touch(bank, neuron);
      filling.clear();
      for (const uint32_t neuron : needed) {
        if (cache.rows(bank, neuron) != nullptr) {
          if (counts) (neuron < plans[bank].hot_neurons ? counters->hot_hits : counters->cold_hits)++;
          continue;
        }
        if (counts) counters->misses++;
        const int32_t slot = cache.admit(bank, neuron);
        if (slot != NeuronCache::kNoSlot) filling.emplace_back(neuron, slot);
      }
      for (const auto& [neuron, slot] : filling) cache.commit(bank, neuron, slot);
    }
  }
  return Status::ok();
}

}  // namespace pi2
