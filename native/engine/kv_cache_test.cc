/**
 * KvCache against a model that is a list of numbers for each sequence: random steps, rewinds, forks and releases. Built and
 * run by test/46-batches.ts under sanitizers. Prints "N steps, M refused".
 */
#include "native/engine/kv_cache.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>

namespace pi2 {
namespace {

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

/** One cache with its model, driven by one random generator. */
class Trial {
 public:
  explicit Trial(uint32_t seed) : random_(seed) {
    config_.windows = {0, 9, 40, 0, 1};
    if (seed % 3 == 0) config_.windows = {25, 25};
    config_.kv_head_count = 2;
    config_.head_dim = 8;
    config_.context_length = 20 + below(300);
    config_.sequences = 1 + below(6);
    config_.batch_size = 1 + below(40);
    texts_.resize(config_.sequences);
    const Status status = cache_.allocate(config_);
    require(status.is_ok(), status.message());
  }

  void run(size_t operations) {
    for (size_t i = 0; i < operations; i++) {
      const size_t what = below(8);
      if (what == 0) {
        const size_t sequence = below(config_.sequences);
        require(cache_.release(sequence).is_ok(), "a release");
        texts_[sequence].clear();
      } else if (what <= 2) {
        fork();
      } else {
        step();
      }
      compare();
    }
  }

  size_t steps = 0;
  size_t refused = 0;

 private:
  size_t below(size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(random_); }

  void fork() {
    const size_t from = below(config_.sequences);
    const size_t to = below(config_.sequences);
    const size_t positions = below(texts_[from].size() + 1);
    const bool empty = texts_[to].empty();
    const Status status = cache_.fork(from, to, positions);
    if (!status.is_ok()) return require(from == to || !empty || positions < texts_[from].size(), status.message());
    require(from != to && empty, "a fork to a sequence in use");
    texts_[to].assign(texts_[from].begin(), texts_[from].begin() + static_cast<long>(positions));
  }

  /** Some sequences go on from where they are, or from before. */
  void step() {
    std::vector<Run> runs;
    std::vector<std::vector<uint32_t>> after = texts_;
    for (size_t s = 0; s < config_.sequences; s++) {
      if (below(2) == 0) continue;
      const size_t filled = texts_[s].size();
      const size_t position = below(4) == 0 ? below(filled + 1) : filled;
      if (position == config_.context_length) continue;
      const size_t count = 1 + below(std::min(config_.context_length - position, below(3) == 0 ? size_t{60} : size_t{3}));
      runs.push_back({s, position, count});
      after[s].resize(position);
      for (size_t i = 0; i < count; i++) after[s].push_back(next_++);
    }
    if (runs.empty()) return;
    std::set<uint32_t> different;
    for (const std::vector<uint32_t>& text : after) different.insert(text.begin(), text.end());
    const Status status = cache_.check(runs.data(), runs.size());
    steps++;
    if (!status.is_ok()) {
      refused++;
      const bool is_full = status.message().find("full") != std::string::npos;
      return require(!is_full || different.size() > config_.context_length, "full, with room: " + status.message());
    }
    for (const Run& run : runs) cache_.rewind(run.sequence, run.position);
    for (const Run& run : runs) {
      for (size_t done = 0; done < run.count;) {
        const size_t count = std::min(config_.batch_size, run.count - done);
        cache_.extend(run.sequence, run.position + done, count);
        for (size_t i = 0; i < count; i++) {
          const size_t position = run.position + done + i;
          write({run.sequence, position}, after[run.sequence][position]);
        }
        done += count;
        cache_.fill(run.sequence, run.position + done);
        compare_past(run.sequence, after[run.sequence], run.position + done - 1);
      }
    }
    texts_ = after;
  }

  uint16_t mark(uint32_t number, size_t layer, size_t head) const {
    return static_cast<uint16_t>(number * 31 + layer * 7 + head);
  }

  void write(const Place& place, uint32_t number) {
    for (size_t i = 0; i < config_.windows.size(); i++) {
      const KvCache::Layer& layer = cache_.layer(i);
      const size_t slot = cache_.slot_of(layer, place);
      for (size_t head = 0; head < config_.kv_head_count; head++) {
        const size_t at = (head * layer.slots + slot) * cache_.padded_dim();
        for (size_t j = 0; j < config_.head_dim; j++) {
          layer.keys[at + j] = mark(number, i, head);
          layer.values[at + j] = static_cast<uint16_t>(~mark(number, i, head));
        }
      }
    }
  }

  /** What a token at `position` attends to is what was written. */
  void compare_past(size_t sequence, const std::vector<uint32_t>& text, size_t position) {
    for (size_t i = 0; i < config_.windows.size(); i++) {
      const KvCache::Layer& layer = cache_.layer(i);
      const size_t window = config_.windows[i];
      const size_t begin = window != 0 && position + 1 > window ? position + 1 - window : 0;
      size_t at = begin;
      cache_.for_slots(layer, sequence, begin, position + 1 - begin, [&](size_t slot, size_t count) {
        for (size_t k = 0; k < count; k++, at++) {
          for (size_t head = 0; head < config_.kv_head_count; head++) {
            const size_t half = (head * layer.slots + slot + k) * cache_.padded_dim() + config_.head_dim - 1;
            require(layer.keys[half] == mark(text[at], i, head), "a key of position " + std::to_string(at));
            require(layer.values[half] == static_cast<uint16_t>(~layer.keys[half]), "a value");
          }
        }
      });
      require(at == position + 1, "every position once");
    }
  }

  void compare() {
    for (size_t s = 0; s < texts_.size(); s++) {
      if (!texts_[s].empty()) compare_past(s, texts_[s], texts_[s].size() - 1);
    }
  }

  std::mt19937 random_;
  EngineConfig config_{};
  KvCache cache_;
  std::vector<std::vector<uint32_t>> texts_;
  uint32_t next_ = 0;
};

int run() {
  size_t steps = 0;
  size_t refused = 0;
  for (uint32_t seed = 0; seed < 60; seed++) {
    Trial trial(seed);
    trial.run(150);
    steps += trial.steps;
    refused += trial.refused;
  }
  std::printf("%zu steps, %zu refused\n", steps, refused);
  return 0;
}

}  // namespace
}  // namespace pi2

int main() { return pi2::run(); }
