/**
 * NeuronCache against a model that is a map: random plans, random traces, random failures. Built and run by
 * test/43-streamed.ts under sanitizers. Prints "N checks, 0 failed".
 */
#include "native/cache/neuron_cache.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <thread>
#include <vector>

namespace pi2 {
namespace {

size_t checks = 0;
size_t failures = 0;

void expect(bool holds, const char* what, size_t bank, size_t neuron) {
  checks++;
  if (holds) return;
  failures++;
  std::printf("FAILED: %s, bank %zu, neuron %zu\n", what, bank, neuron);
}

/** What a neuron's bytes are, on flash and wherever they are kept. `kind` tells gates from rows. */
uint8_t byte_of(size_t bank, size_t neuron, size_t kind) {
  return static_cast<uint8_t>((bank * 31 + neuron * 7 + kind * 101 + neuron / 251) & 0xff);
}

bool holds(const uint8_t* bytes, size_t size, uint8_t value) {
  return bytes != nullptr && std::all_of(bytes, bytes + size, [&](uint8_t byte) { return byte == value; });
}

/** One cache with its model, driven by one random generator. */
class Trial {
 public:
  explicit Trial(uint32_t seed) : random_(seed) {
    neurons_ = below(700) + 1;
    part1_bytes_ = (below(40) + 1) * 4;
    slot_bytes_ = (below(60) + 1) * 4;
    const size_t banks = below(5) + 1;
    for (size_t i = 0; i < banks; i++) {
      const size_t gates = below(2) == 0 ? neurons_ : below(neurons_ / 64 + 1) * 64;
      // Now and then nothing can be kept, or everything.
      const size_t cold = below(4) == 0 ? below(2) * neurons_ : below(neurons_ + 1);
      plans_.push_back({gates, below(gates + 1), cold});
    }
    kept_.resize(banks);
    if (below(2) == 0) return;
    for (size_t i = 0; i < banks * neurons_; i++) rates_.push_back(static_cast<float>(below(1001)) / 1000.0f);
  }

  void run() {
    if (!cache_.allocate(plans_, neurons_, part1_bytes_, slot_bytes_, rates_).is_ok()) {
      expect(false, "allocation", 0, 0);
      return;
    }
    const size_t budget = NeuronCache::bytes_needed(plans_, neurons_, part1_bytes_, slot_bytes_);
    for (size_t bank = 0; bank < plans_.size(); bank++) fill(bank);
    const size_t ticks = below(150) + 20;
    for (size_t tick = 0; tick < ticks; tick++) run_tick(below(plans_.size()));
    expect(cache_.bytes() == budget, "memory is what was asked for", 0, 0);
    for (size_t bank = 0; bank < plans_.size(); bank++) check_all(bank);
  }

 private:
  size_t below(size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(random_); }

  /** As loading does. With rates, slots begin with the neurons after the hot ones. */
  void fill(size_t bank) {
    const size_t first = plans_[bank].hot_neurons;
    const size_t end = rates_.empty() ? first : std::min(first + plans_[bank].cold_slots, neurons_);
    for (size_t n = first; n < end; n++) kept_[bank][n] = static_cast<int32_t>(n - first);
    for (size_t n = 0; n < neurons_; n++) {
      if (uint8_t* gate = cache_.part1(bank, n)) std::memset(gate, byte_of(bank, n, 1), part1_bytes_);
      if (uint8_t* rows = cache_.first_rows(bank, n)) std::memset(rows, byte_of(bank, n, 2), slot_bytes_);
    }
  }

  /** Some neurons fire, as in a job: all are touched, then looked up in order, what is missing is read, some reads fail. */
  void run_tick(size_t bank) {
    std::vector<size_t> open;
    const size_t share = below(100) + 1;
    for (size_t n = 0; n < neurons_; n++) {
      // Low numbers are hotter, as in a real bank.
      if (below(100) < share && below(neurons_) + 1 > n / 2) open.push_back(n);
    }
    cache_.begin_tick(bank);
    touch_all(bank, open);
    std::map<size_t, const uint8_t*> used;
    std::map<size_t, int32_t> filling;
    for (const size_t n : open) {
      const uint8_t* rows = cache_.rows(bank, n);
      const bool expected = n < plans_[bank].hot_neurons || kept_[bank].count(n) > 0;
      expect((rows != nullptr) == expected, "found if and only if it was kept", bank, n);
      if (rows != nullptr) {
        used[n] = rows;
        continue;
      }
      const int32_t slot = cache_.admit(bank, n);
      if (slot == NeuronCache::kNoSlot) continue;
      expect(static_cast<size_t>(slot) < plans_[bank].cold_slots, "the slot is one of the bank's", bank, n);
      admit_to_model(bank, n, slot, used, filling);
      std::memset(cache_.slot(bank, slot), byte_of(bank, n, 2), slot_bytes_);
      expect(cache_.rows(bank, n) == nullptr, "not found while it is filling", bank, n);
    }
    for (const auto& [n, rows] : used) expect(holds(rows, slot_bytes_, byte_of(bank, n, 2)), "in use and intact", bank, n);
    const bool failed = below(6) == 0;
    for (const auto& [n, slot] : filling) {
      expect(holds(cache_.slot(bank, slot), slot_bytes_, byte_of(bank, n, 2)), "filled and intact", bank, n);
      if (failed) {
        std::memset(cache_.slot(bank, slot), 0xee, slot_bytes_);
        cache_.abandon(bank, slot);
      } else {
        cache_.commit(bank, n, slot);
        kept_[bank][n] = slot;
      }
    }
    expect(kept_[bank].size() <= plans_[bank].cold_slots, "no more kept than there are slots", bank, 0);
  }

  /** From two threads, each its own neurons, as gates are computed. */
  void touch_all(size_t bank, const std::vector<size_t>& open) {
    const auto touch = [&](size_t first) {
      for (size_t i = first; i < open.size(); i += 2) cache_.touch(bank, open[i]);
    };
    std::thread other(touch, 1);
    touch(0);
    other.join();
  }

  /** Whoever had the slot is gone; it may not be one that is used or filled in this tick. */
  void admit_to_model(size_t bank, size_t neuron, int32_t slot, const std::map<size_t, const uint8_t*>& used,
                      std::map<size_t, int32_t>& filling) {
    for (const auto& [other, taken] : filling) expect(taken != slot, "a filling slot is no victim", bank, other);
    for (auto kept = kept_[bank].begin(); kept != kept_[bank].end();) {
      if (kept->second != slot) {
        ++kept;
        continue;
      }
      expect(used.count(kept->first) == 0, "a neuron in use is no victim", bank, kept->first);
      expect(cache_.rows(bank, kept->first) == nullptr, "a victim is not found", bank, kept->first);
      kept = kept_[bank].erase(kept);
    }
    filling[neuron] = slot;
  }

  void check_all(size_t bank) {
    for (size_t n = 0; n < neurons_; n++) {
      const uint8_t* gate = cache_.part1(bank, n);
      expect((gate != nullptr) == (n < plans_[bank].resident_gates), "the gate is where the plan says", bank, n);
      if (gate != nullptr) expect(holds(gate, part1_bytes_, byte_of(bank, n, 1)), "the gate is intact", bank, n);
      const uint8_t* rows = cache_.rows(bank, n);
      const bool expected = n < plans_[bank].hot_neurons || kept_[bank].count(n) > 0;
      expect((rows != nullptr) == expected, "kept as the model says", bank, n);
      if (rows != nullptr) expect(holds(rows, slot_bytes_, byte_of(bank, n, 2)), "rows are intact", bank, n);
    }
    for (size_t group = 0; group < group_count(neurons_); group++) {
      float fired = 0;
      for (size_t n = group * kGroup; n < std::min((group + 1) * kGroup, neurons_); n++) {
        if (cache_.rows(bank, n) == nullptr) fired += rates_.empty() ? 0.1f : rates_[bank * neurons_ + n];
      }
      const bool is_close = std::abs(cache_.fired_elsewhere(bank, group) - fired) < 0.05f;
      expect(is_close, "what fires elsewhere is added up", bank, group * kGroup);
    }
  }

  std::mt19937 random_;
  size_t neurons_ = 0;
  size_t part1_bytes_ = 0;
  size_t slot_bytes_ = 0;
  std::vector<BankPlan> plans_;
  std::vector<float> rates_;
  NeuronCache cache_;
  std::vector<std::map<size_t, int32_t>> kept_;
};

}  // namespace
}  // namespace pi2

int main() {
  for (uint32_t seed = 1; seed <= 60; seed++) pi2::Trial(seed).run();
  std::printf("%zu checks, %zu failed\n", pi2::checks, pi2::failures);
  return pi2::failures == 0 ? 0 : 1;
}
