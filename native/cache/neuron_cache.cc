#include "native/cache/neuron_cache.h"

#include <algorithm>
#include <cmath>

#include "native/base/carver.h"

namespace pi2 {
namespace {

/** Ticks (tokens) after which a use counts half. */
constexpr float kHalfLife = 16.0f;
/** What one use a tick comes to: the sum of 2^(-k / kHalfLife). */
constexpr float kTicksCounted = 1.4427f * kHalfLife + 0.5f;
/** Ticks after which nothing is left of a use. */
constexpr size_t kTicksRemembered = 1024;
/** What a neuron is taken to fire without rates: about what sparse models do. */
constexpr float kAssumedRate = 0.1f;
/** Slots looked at to find one to take: close to the true least scored, at a constant price. */
constexpr size_t kLooks = 24;

size_t weight_bytes_needed(const std::vector<BankPlan>& plans, size_t part1_bytes, size_t slot_bytes) {
  size_t bytes = 0;
  for (const BankPlan& plan : plans) {
    bytes += plan.resident_gates * part1_bytes + (plan.hot_neurons + plan.cold_slots) * slot_bytes;
  }
  // Kernels may load a line past a vector.
  return bytes + 4096;
}

}  // namespace

size_t NeuronCache::bytes_needed(const std::vector<BankPlan>& plans, size_t neurons, size_t part1_bytes, size_t slot_bytes) {
  size_t records = 0;
  for (const BankPlan& plan : plans)
    records += 16 * (neurons + 16) + 4 * (plan.cold_slots + 16) + 4 * (group_count(neurons) + 16);
  return weight_bytes_needed(plans, part1_bytes, slot_bytes) + records;
}

Status NeuronCache::allocate(const std::vector<BankPlan>& plans, size_t neurons, size_t part1_bytes, size_t slot_bytes,
                             const std::vector<float>& firing_rates, CachePolicy policy) {
  policy_ = policy;
  knows_rates_ = !firing_rates.empty();
  decay_.resize(kTicksRemembered);
  for (size_t tick = 0; tick < kTicksRemembered; tick++) decay_[tick] = std::exp2(-static_cast<float>(tick) / kHalfLife);
  part1_bytes_ = part1_bytes;
  slot_bytes_ = slot_bytes;
  const size_t weights = weight_bytes_needed(plans, part1_bytes, slot_bytes);
  Status status = memory_.allocate(weights, "the neuron cache");
  if (status.is_ok()) {
    status =
        records_.allocate(bytes_needed(plans, neurons, part1_bytes, slot_bytes) - weights, "the neuron cache's records");
  }
  if (!status.is_ok()) return status;
  uint8_t* next = memory_.data();
  Carver carver(records_.data());
  for (size_t i = 0; i < plans.size(); i++) {
    Bank bank{};
    bank.plan = plans[i];
    bank.gates = next;
    bank.hot = bank.gates + plans[i].resident_gates * part1_bytes;
    bank.cold = bank.hot + plans[i].hot_neurons * slot_bytes;
    next = bank.cold + plans[i].cold_slots * slot_bytes;
    bank.neurons = carver.take<Neuron>(neurons);
    bank.neuron_of = carver.take<int32_t>(plans[i].cold_slots);
    bank.elsewhere = carver.take<uint32_t>(group_count(neurons));
    for (size_t n = 0; n < neurons; n++) {
      const float rate = firing_rates.empty() ? 0.0f : firing_rates[i * neurons + n];
      bank.neurons[n] = {.recent = 0.0f, .usual = kTicksCounted * rate, .used = 0, .slot = kNoSlot};
    }
    for (size_t s = 0; s < plans[i].cold_slots; s++) bank.neuron_of[s] = kNoSlot;
    // In heat order, the neurons after the hot ones are the likeliest.
    const size_t first = bank.plan.hot_neurons;
    const size_t filled = firing_rates.empty() ? 0 : std::min(bank.plan.cold_slots, neurons - first);
    for (; bank.free_from < filled; bank.free_from++) {
      bank.neurons[first + bank.free_from].slot = static_cast<int32_t>(bank.free_from);
      bank.neuron_of[bank.free_from] = static_cast<int32_t>(first + bank.free_from);
    }
    for (size_t n = first; n < neurons; n++) {
      if (bank.neurons[n].slot == kNoSlot) bank.elsewhere[n / kGroup] += rate_units(bank.neurons[n]);
    }
    banks_.push_back(bank);
  }
  return status;
}

float NeuronCache::recent_now(const Bank& bank, const Neuron& neuron) const {
  const uint32_t ticks = bank.tick - neuron.used;
  return ticks < kTicksRemembered ? neuron.recent * decay_[ticks] : 0.0f;
}

uint32_t NeuronCache::rate_units(const Neuron& neuron) const {
  const float rate = knows_rates_ ? neuron.usual / kTicksCounted : kAssumedRate;
  return static_cast<uint32_t>(rate * kRateUnits + 0.5f);
}

void NeuronCache::touch(size_t bank_index, size_t neuron) {
  const Bank& bank = banks_[bank_index];
  Neuron& touched = bank.neurons[neuron];
  touched.recent = recent_now(bank, touched) + 1.0f;
  touched.used = bank.tick;
}

int32_t NeuronCache::admit(size_t bank_index, size_t neuron) {
  Bank& bank = banks_[bank_index];
  const size_t slots = bank.plan.cold_slots;
  if (bank.free_from < slots) {
    const auto slot = static_cast<int32_t>(bank.free_from++);
    bank.neuron_of[slot] = static_cast<int32_t>(neuron);
    return slot;
  }
  int32_t best = kNoSlot;
  float best_score = score_now(bank, bank.neurons[neuron]);
  for (size_t i = 0; i < std::min(kLooks, slots); i++) {
    bank.hand = bank.hand + 1 < slots ? bank.hand + 1 : 0;
    const auto slot = static_cast<int32_t>(bank.hand);
    const int32_t kept = bank.neuron_of[slot];
    if (kept == kNoSlot) {
      best = slot;
      break;
    }
    const Neuron& candidate = bank.neurons[kept];
    if (candidate.used == bank.tick) continue;  // in use, or being filled
    const float score = score_now(bank, candidate);
    if (score < best_score) {
      best_score = score;
      best = slot;
    }
  }
  if (best == kNoSlot) return kNoSlot;
  const int32_t victim = bank.neuron_of[best];
  if (victim != kNoSlot) {
    bank.neurons[victim].slot = kNoSlot;
    bank.elsewhere[static_cast<size_t>(victim) / kGroup] += rate_units(bank.neurons[victim]);
  }
  bank.neuron_of[best] = static_cast<int32_t>(neuron);
  return best;
}

void NeuronCache::commit(size_t bank_index, size_t neuron, int32_t slot) {
  Bank& bank = banks_[bank_index];
  bank.neurons[neuron].slot = slot;
  bank.elsewhere[neuron / kGroup] -= rate_units(bank.neurons[neuron]);
}

void NeuronCache::abandon(size_t bank_index, int32_t slot) { banks_[bank_index].neuron_of[slot] = kNoSlot; }

}  // namespace pi2
