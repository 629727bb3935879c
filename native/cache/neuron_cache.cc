#include "native/cache/neuron_cache.h"

#include <cmath>

#include "native/base/carver.h"

namespace pi2 {
namespace {

/** Ticks (tokens) after which a use counts half. */
constexpr float kHalfLife = 64.0f;
/** Slots looked at to find one to take: close to the true least scored, at a constant price. */
constexpr int kSamples = 12;

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
  for (const BankPlan& plan : plans) records += 12 * (neurons + 16) + 4 * (plan.cold_slots + 16);
  return weight_bytes_needed(plans, part1_bytes, slot_bytes) + records;
}

Status NeuronCache::allocate(const std::vector<BankPlan>& plans, size_t neurons, size_t part1_bytes, size_t slot_bytes) {
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
    bank.score = carver.take<float>(neurons);
    bank.used = carver.take<uint32_t>(neurons);
    bank.slot_of = carver.take<int32_t>(neurons);
    bank.neuron_of = carver.take<int32_t>(plans[i].cold_slots);
    for (size_t n = 0; n < neurons; n++) bank.slot_of[n] = kNoSlot;
    for (size_t s = 0; s < plans[i].cold_slots; s++) bank.neuron_of[s] = kNoSlot;
    bank.random = 0x9e3779b97f4a7c15ull * (i + 1);
    banks_.push_back(bank);
  }
  return status;
}

float NeuronCache::score_now(const Bank& bank, size_t neuron) {
  return bank.score[neuron] * std::exp2(-static_cast<float>(bank.tick - bank.used[neuron]) / kHalfLife);
}

void NeuronCache::touch(size_t bank_index, size_t neuron) {
  const Bank& bank = banks_[bank_index];
  bank.score[neuron] = score_now(bank, neuron) + 1.0f;
  bank.used[neuron] = bank.tick;
}

int32_t NeuronCache::admit(size_t bank_index, size_t neuron) {
  Bank& bank = banks_[bank_index];
  if (bank.free_from < bank.plan.cold_slots) {
    const auto slot = static_cast<int32_t>(bank.free_from++);
    bank.neuron_of[slot] = static_cast<int32_t>(neuron);
    return slot;
  }
  if (bank.plan.cold_slots == 0) return kNoSlot;
  int32_t best = kNoSlot;
  float best_score = bank.score[neuron];
  for (int i = 0; i < kSamples; i++) {
    bank.random ^= bank.random << 13;
    bank.random ^= bank.random >> 7;
    bank.random ^= bank.random << 17;
    const auto slot = static_cast<int32_t>(bank.random % bank.plan.cold_slots);
    const int32_t kept = bank.neuron_of[slot];
    if (kept == kNoSlot) {
      best = slot;
      break;
    }
    if (bank.used[kept] == bank.tick) continue;  // in use, or being filled
    const float score = score_now(bank, static_cast<size_t>(kept));
    if (score < best_score) {
      best_score = score;
      best = slot;
    }
  }
  if (best == kNoSlot) return kNoSlot;
  const int32_t victim = bank.neuron_of[best];
  if (victim != kNoSlot) bank.slot_of[victim] = kNoSlot;
  bank.neuron_of[best] = static_cast<int32_t>(neuron);
  return best;
}

void NeuronCache::commit(size_t bank_index, size_t neuron, int32_t slot) { banks_[bank_index].slot_of[neuron] = slot; }

void NeuronCache::abandon(size_t bank_index, int32_t slot) { banks_[bank_index].neuron_of[slot] = kNoSlot; }

}  // namespace pi2
