#pragma once
/**
 * The neuron cache (paper section 1.5): which parts of which neurons are in memory. A bank is one expert of one layer; its
 * neurons are in heat order. The byte budget is decided at open and never exceeded; nothing is allocated afterwards.
 *
 *   gates  part 1 (gate weights and all scales) of neurons 0 .. resident_gates, always there: exact mode needs every gate.
 *   hot    up and down rows of neurons 0 .. hot_neurons, always there: the hottest by profile, one run of memory.
 *   cold   up and down rows of any other neuron, in slots of one size, by neuron.
 *
 * Up and down rows are kept as kernels want them, weights and scales together, without the padding of flash.
 *
 * Life of a cold slot: free -> filling (admit: it has a neuron, nobody finds it) -> kept (commit: find returns it) ->
 * filling for another neuron, or free again (abandon, after a failed read). With firing rates slots begin as kept. A slot
 * whose neuron was used in the current tick is never taken away, so pointers that `rows` returned stay good until the bank's
 * next tick.
 *
 * Policy: what a neuron did of late and what it does in the long run. A use adds 1 to its score, which halves every
 * kHalfLife ticks of its bank; to that comes what the score would be in the mean if the neuron fired as often as on
 * calibration text. A new neuron takes the least scored of some slots, and only if its own score is higher. Each bank has
 * its own slots, so one layer cannot flush the next (the cliff of a global LRU). docs/CACHE.md has the traces that this was
 * chosen on.
 *
 * Threads: `touch` may run on several threads for distinct neurons; everything else on the planning thread, between regions.
 */
#include <cstddef>
#include <cstdint>
#include <vector>

#include "native/base/memory.h"
#include "native/base/status.h"
#include "native/kernels/encoding.h"

namespace pi2 {

/** How much of a bank is kept. resident_gates is a multiple of a chunk or all neurons. */
struct BankPlan {
  size_t resident_gates = 0;
  size_t hot_neurons = 0;
  size_t cold_slots = 0;
};

/** Which neurons slots keep: the policy above, or those used last, which baselines do and which replays compare with. */
enum class CachePolicy { kFrequency, kRecency };

class NeuronCache {
 public:
  static constexpr int32_t kNoSlot = -1;

  /**
   * Takes all memory. `firing_rates` (bank, neuron): the share of its bank's ticks in which each neuron fires on calibration
   * text; empty where that is not known. With rates slots do not begin free, but with the hottest neurons that are not hot.
   */
  Status allocate(const std::vector<BankPlan>& plans, size_t neurons, size_t part1_bytes, size_t slot_bytes,
                  const std::vector<float>& firing_rates, CachePolicy policy = CachePolicy::kFrequency);

  const BankPlan& plan(size_t bank) const { return banks_[bank].plan; }
  /** Memory of a resident gate, to read or (while loading) to fill; null if the neuron has none. */
  uint8_t* part1(size_t bank, size_t neuron) const {
    const Bank& b = banks_[bank];
    return neuron < b.plan.resident_gates ? b.gates + neuron * part1_bytes_ : nullptr;
  }
  /** Memory of the rows of a neuron that is kept from the start, to fill while loading; null if it is not. */
  uint8_t* first_rows(size_t bank, size_t neuron) const { return place(bank, neuron); }
  /** Up and down rows wherever they are kept, or null. */
  const uint8_t* rows(size_t bank, size_t neuron) const { return place(bank, neuron); }
  /**
   * How many neurons of group `group` (kGroup in a row) that have no place fire in a tick, in the mean: by their rates, or
   * kAssumedRate each. Kept up to date, so that it costs nothing to ask.
   */
  float fired_elsewhere(size_t bank, size_t group) const {
    return static_cast<float>(banks_[bank].elsewhere[group]) / kRateUnits;
  }

  /** A new token (or batch) reaches the bank. */
  void begin_tick(size_t bank) { banks_[bank].tick++; }
  /** The neuron is used in this tick. */
  void touch(size_t bank, size_t neuron);
  /** Whether the bank has a slot that was never given out. */
  bool has_free_slot(size_t bank) const { return banks_[bank].free_from < banks_[bank].plan.cold_slots; }
  /** A slot for a neuron that is being read, or kNoSlot if it is not worth one. */
  int32_t admit(size_t bank, size_t neuron);
  uint8_t* slot(size_t bank, int32_t slot) const { return banks_[bank].cold + static_cast<size_t>(slot) * slot_bytes_; }
  /** The slot's bytes are there: the neuron is found from now on. */
  void commit(size_t bank, size_t neuron, int32_t slot);
  /** The slot's bytes will not come. */
  void abandon(size_t bank, int32_t slot);

  /** Bytes of weights and of bookkeeping, fixed at `allocate`. */
  size_t bytes() const { return memory_.bytes() + records_.bytes(); }
  static size_t bytes_needed(const std::vector<BankPlan>& plans, size_t neurons, size_t part1_bytes, size_t slot_bytes);

 private:
  /** What is known of a neuron: together, since a victim is looked for among neurons that are nowhere near each other. */
  struct Neuron {
    float recent;   // decayed uses, as of `used`
    float usual;    // what `recent` is in the mean by the neuron's rate
    uint32_t used;  // last tick it was touched in
    int32_t slot;
  };
  struct Bank {
    BankPlan plan;
    uint8_t* gates;
    uint8_t* hot;
    uint8_t* cold;
    Neuron* neurons;
    int32_t* neuron_of;   // (slot); kNoSlot if free
    uint32_t* elsewhere;  // (group): rates of the neurons that have no place, added up; see rate_units
    size_t free_from;     // slots below it have been given out at least once
    size_t hand;          // slot that is looked at next for one to take
    uint32_t tick;
  };

  uint8_t* place(size_t bank, size_t neuron) const {
    const Bank& b = banks_[bank];
    if (neuron < b.plan.hot_neurons) return b.hot + neuron * slot_bytes_;
    const int32_t slot = b.neurons[neuron].slot;
    return slot == kNoSlot ? nullptr : b.cold + static_cast<size_t>(slot) * slot_bytes_;
  }
  float recent_now(const Bank& bank, const Neuron& neuron) const;
  uint32_t rate_units(const Neuron& neuron) const;
  /** How much a neuron is worth a slot. */
  float score_now(const Bank& bank, const Neuron& neuron) const {
    if (policy_ == CachePolicy::kRecency) return static_cast<float>(neuron.used);
    return recent_now(bank, neuron) + neuron.usual;
  }

  /** Rates are added up as integers of this unit: what comes in and goes out again leaves nothing. */
  static constexpr float kRateUnits = 4096.0f;

  CachePolicy policy_ = CachePolicy::kFrequency;
  std::vector<float> decay_;  // (ticks): what is left of a use
  bool knows_rates_ = false;
  size_t part1_bytes_ = 0;
  size_t slot_bytes_ = 0;
  HugeMemory memory_;
  HugeMemory records_;
  std::vector<Bank> banks_;
};

}  // namespace pi2
