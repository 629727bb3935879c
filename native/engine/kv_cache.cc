#include "native/engine/kv_cache.h"

#include <cstring>
#include <string>

#include "native/base/carver.h"

namespace pi2 {

/** A batch may reach a window behind its first position; the first and the last page may be used in part. */
size_t KvCache::most_pages(const EngineConfig& config, size_t window) {
  const size_t all = pages_of(config.context_length);
  return window == 0 ? all : std::min(pages_of(window + config.batch_size) + 1, all);
}

/**
 * Enough for as many different positions as the context has, whichever sequences they belong to: each sequence but one may
 * leave a part of its last page unused, and may have copied a part of the page where it left another.
 */
size_t KvCache::total_pages(const EngineConfig& config, size_t window) {
  const size_t shared = pages_of(config.context_length) + 2 * (config.sequences - 1);
  return window == 0 ? shared : std::min(shared, config.sequences * most_pages(config, window));
}

size_t KvCache::carve(const EngineConfig& config, uint8_t* base) {
  Carver carver(base);
  kv_head_count_ = config.kv_head_count;
  padded_dim_ = padded(config.head_dim);
  filled_.assign(config.sequences, 0);
  std::vector<size_t> windows = {0};
  layers_.clear();
  for (const size_t window : config.windows) {
    const auto known = std::find(windows.begin(), windows.end(), window);
    const auto group = static_cast<size_t>(known - windows.begin());
    if (known == windows.end()) windows.push_back(window);
    const size_t slots = total_pages(config, window) * kPagePositions;
    const size_t halves = slots * kv_head_count_ * padded_dim_;
    uint16_t* keys = carver.take<uint16_t>(halves);
    layers_.push_back({keys, carver.take<uint16_t>(halves), slots, group});
  }
  groups_.clear();
  for (const size_t window : windows) {
    const size_t most = most_pages(config, window);
    const size_t total = total_pages(config, window);
    groups_.push_back({window, most, total, total, carver.take<uint16_t>(total), {}});
    for (size_t s = 0; s < config.sequences; s++) groups_.back().tables.push_back({carver.take<uint32_t>(most)});
  }
  return carver.used();
}

size_t KvCache::bytes_needed(const EngineConfig& config) { return KvCache().carve(config, nullptr); }

Status KvCache::allocate(const EngineConfig& config) {
  Status status = memory_.allocate(bytes_needed(config), "the KV cache");
  if (status.is_ok()) carve(config, memory_.data());
  return status;
}

Status KvCache::check_known(size_t sequence) const {
  if (sequence < filled_.size()) return Status::ok();
  return Status::argument("there is no sequence " + std::to_string(sequence) + ": the engine was opened for " +
                          std::to_string(filled_.size()) + ", numbered from 0");
}

/** Whether all is in memory that a token at `position` attends to, besides itself. */
bool KvCache::holds_past(size_t sequence, size_t position) const {
  if (position == 0) return true;
  if (position > filled_[sequence]) return false;
  for (const Group& group : groups_) {
    const size_t lowest = group.window != 0 && position + 1 > group.window ? position + 1 - group.window : 0;
    if (group.tables[sequence].first > lowest / kPagePositions) return false;
  }
  return true;
}

/** Pages of the first group that the runs take, beyond those that they give back first. */
size_t KvCache::pages_wanted(const Run* runs, size_t count) const {
  const Group& group = groups_[0];
  const auto has = [&](const Run& run, size_t number, uint32_t page) {
    const Table& table = group.tables[run.sequence];
    return number < table.end && table.pages[number] == page;
  };
  size_t wanted = 0;
  size_t given_back = 0;
  for (size_t i = 0; i < count; i++) {
    const Run& run = runs[i];
    const Table& table = group.tables[run.sequence];
    const size_t kept = pages_of(run.position);
    wanted += pages_of(run.position + run.count) - kept;
    for (size_t number = kept; number < table.end; number++) {
      size_t left = group.references[table.pages[number]];
      for (size_t j = 0; j <= i; j++)
        left -= has(runs[j], number, table.pages[number]) && number >= pages_of(runs[j].position);
      given_back += left == 0;
    }
    if (run.position % kPagePositions == 0) continue;
    // The page written into is copied if others have it still: those that neither gave it back nor made a copy before.
    const uint32_t page = table.pages[kept - 1];
    size_t left = group.references[page];
    for (size_t j = 0; j < count; j++) {
      const size_t other = pages_of(runs[j].position);
      const bool copied = j < i && other == kept && runs[j].position % kPagePositions != 0;
      left -= has(runs[j], kept - 1, page) && (other < kept || copied);
    }
    wanted += left > 1;
  }
  return wanted > given_back ? wanted - given_back : 0;
}

Status KvCache::check(const Run* runs, size_t count) const {
  for (size_t i = 0; i < count; i++) {
    const Run& run = runs[i];
    const std::string of_sequence = filled_.size() == 1 ? "" : " of sequence " + std::to_string(run.sequence);
    Status known = check_known(run.sequence);
    if (!known.is_ok()) return known;
    for (size_t j = 0; j < i; j++) {
      if (runs[j].sequence == run.sequence) {
        return Status::argument("sequence " + std::to_string(run.sequence) + " is in the step twice");
      }
    }
    if (!holds_past(run.sequence, run.position)) {
      return Status::argument("the KV cache does not hold the positions before " + std::to_string(run.position) +
                              of_sequence);
    }
  }
  const size_t wanted = pages_wanted(runs, count);
  if (wanted > groups_[0].free_pages) {
    return Status::argument("the KV cache is full: its positions are shared by all sequences, and the step takes " +
                            std::to_string(wanted) + " pages of " + std::to_string(kPagePositions) + " positions where " +
                            std::to_string(groups_[0].free_pages) + " are free");
  }
  return Status::ok();
}

void KvCache::drop(Group& group, uint32_t page) {
  if (--group.references[page] == 0) group.free_pages++;
}

/** A free page, of which `check` has seen that there is one: the one behind `after` if possible, for a sequence in a row. */
uint32_t KvCache::take(Group& group, uint32_t after) {
  size_t page = size_t{after} + 1;
  if (page >= group.total_pages || group.references[page] != 0) {
    page = 0;
    while (group.references[page] != 0) page++;
  }
  group.references[page] = 1;
  group.free_pages--;
  return static_cast<uint32_t>(page);
}

void KvCache::rewind(size_t sequence, size_t position) {
  const size_t kept = pages_of(position);
  for (Group& group : groups_) {
    Table& table = group.tables[sequence];
    while (table.end > kept && table.end > table.first) drop(group, table.pages[--table.end % group.most_pages]);
    if (position == 0) table.first = table.end = 0;
  }
  filled_[sequence] = position;
}

void KvCache::copy_page(size_t group, uint32_t from, uint32_t to, size_t positions) {
  for (const Layer& layer : layers_) {
    if (layer.group != group) continue;
    for (size_t head = 0; head < kv_head_count_; head++) {
      const auto at = [&](uint32_t page) { return (head * layer.slots + page * kPagePositions) * padded_dim_; };
      std::memcpy(layer.keys + at(to), layer.keys + at(from), positions * padded_dim_ * sizeof(uint16_t));
      std::memcpy(layer.values + at(to), layer.values + at(from), positions * padded_dim_ * sizeof(uint16_t));
    }
  }
}

void KvCache::extend(size_t sequence, size_t position, size_t count) {
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    Table& table = group.tables[sequence];
    uint32_t last = table.end > table.first ? table.pages[(table.end - 1) % group.most_pages] : UINT32_MAX;
    if (position % kPagePositions != 0 && group.references[last] > 1) {
      const uint32_t copy = take(group, last);
      copy_page(g, last, copy, position % kPagePositions);
      drop(group, last);
      table.pages[(table.end - 1) % group.most_pages] = last = copy;
    }
    for (const size_t wanted = pages_of(position + count); table.end < wanted; table.end++) {
      // The oldest page is out of reach of the window by now.
      if (table.end - table.first == group.most_pages) drop(group, table.pages[table.first++ % group.most_pages]);
      table.pages[table.end % group.most_pages] = last = take(group, last);
    }
  }
}

Status KvCache::fork(size_t from, size_t to, size_t positions) {
  Status status = check_known(from);
  if (status.is_ok()) status = check_known(to);
  if (!status.is_ok()) return status;
  if (from == to) return Status::argument("a sequence cannot be forked to itself");
  if (filled_[to] > 0) {
    return Status::argument("sequence " + std::to_string(to) + " is in use: release it before another is forked to it");
  }
  if (!holds_past(from, positions)) {
    return Status::argument("sequence " + std::to_string(from) + " does not hold the positions before " +
                            std::to_string(positions));
  }
  rewind(to, 0);
  for (Group& group : groups_) {
    const Table& source = group.tables[from];
    Table& table = group.tables[to];
    table.first = std::min(source.first, pages_of(positions));
    table.end = pages_of(positions);
    for (size_t number = table.first; number < table.end; number++) {
      const uint32_t page = source.pages[number % group.most_pages];
      table.pages[number % group.most_pages] = page;
      group.references[page]++;
    }
  }
  filled_[to] = positions;
  return status;
}

Status KvCache::release(size_t sequence) {
  Status status = check_known(sequence);
  if (status.is_ok()) rewind(sequence, 0);
  return status;
}

}  // namespace pi2
