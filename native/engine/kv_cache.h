#pragma once
/**
 * Keys and values of all past positions of all sequences, half floats, in pages of a fixed number of positions
 * (docs/BATCHES.md). A page belongs to every sequence that has its number in its table: sequences forked from one another
 * share what they have in common, and the first that writes into a shared page copies it. Which page holds what is decided
 * between regions, by the caller of a step; threads only read it.
 *
 * Layers with the same attention window form a group with pages and tables of its own: a layer with a window keeps the pages
 * that the window and a batch can reach, others all. The first group always is one without a window, though no layer may
 * have it: it is the account of positions, and the other groups never need a page that it does not have.
 */
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "native/base/memory.h"
#include "native/base/status.h"
#include "native/engine/config.h"
#include "native/engine/step.h"

namespace pi2 {

class KvCache {
 public:
  /**
   * Positions of a page. Few, since every sequence leaves a part of its last page unused; a head's keys of so many positions
   * are 2 KiB and more, so that memory gives pages anywhere as fast as a row of them.
   */
  static constexpr size_t kPagePositions = 16;

  /** Memory of one layer: [kv head][slot][padded head dim] of keys, then of values. */
  struct Layer {
    uint16_t* keys;
    uint16_t* values;
    size_t slots;
    size_t group;
  };

  Status allocate(const EngineConfig& config);
  /** Bytes that `allocate` takes. */
  static size_t bytes_needed(const EngineConfig& config);

  const Layer& layer(size_t index) const { return layers_[index]; }
  /** Halves of one position of one head; positions of a page follow each other. */
  size_t padded_dim() const { return padded_dim_; }
  size_t bytes() const { return memory_.bytes(); }

  /** Fails, in words, unless every run can be computed: sequences known and once each, positions filled, pages enough. */
  Status check(const Run* runs, size_t count) const;
  /** Positions of the sequence from this one on hold nothing any more. `check` was passed. */
  void rewind(size_t sequence, size_t position);
  /** Gives positions [position, position + count) of the sequence memory of their own, for at most a batch. */
  void extend(size_t sequence, size_t position, size_t count);
  /** The positions that `extend` last gave a place are written. */
  void fill(size_t sequence, size_t positions) { filled_[sequence] = positions; }
  /** Lets `to`, which must be empty, go on from the first `positions` positions of `from`. Takes no memory. */
  Status fork(size_t from, size_t to, size_t positions);
  /** Empties a sequence. */
  Status release(size_t sequence);

  /** The slot of a position that is in memory. */
  size_t slot_of(const Layer& layer, const Place& place) const {
    const Table& table = table_of(layer.group, place.sequence);
    return table.pages[place.position / kPagePositions % groups_[layer.group].most_pages] * kPagePositions +
           place.position % kPagePositions;
  }
  /** Calls visit(slot, count) for runs of slots that hold positions [begin, begin + count) of a sequence, in order. */
  template <class Visit>
  void for_slots(const Layer& layer, size_t sequence, size_t begin, size_t count, const Visit& visit) const {
    const size_t most_pages = groups_[layer.group].most_pages;
    const uint32_t* pages = table_of(layer.group, sequence).pages;
    for (size_t position = begin, end = begin + count; position < end;) {
      size_t number = position / kPagePositions;
      const size_t page = pages[number % most_pages];
      // Pages that lie side by side, as those of a lone sequence do, are one run.
      size_t run = 1;
      while (++number * kPagePositions < end && pages[number % most_pages] == page + run) run++;
      const size_t upto = std::min(number * kPagePositions, end);
      visit(page * kPagePositions + position % kPagePositions, upto - position);
      position = upto;
    }
  }

 private:
  /** Pages of one sequence in one group: numbers [first, end), number n at pages[n % most_pages]. */
  struct Table {
    uint32_t* pages;
    size_t first = 0;
    size_t end = 0;
  };
  struct Group {
    size_t window;
    size_t most_pages;  // that a sequence has at a time
    size_t total_pages;
    size_t free_pages;
    uint16_t* references;       // (page): sequences that have it
    std::vector<Table> tables;  // (sequence)
  };

  static size_t padded(size_t head_dim) { return (head_dim + 15) / 16 * 16; }
  static size_t pages_of(size_t positions) { return (positions + kPagePositions - 1) / kPagePositions; }
  /** Lays everything over `base` (null: only measures); returns the bytes it takes. */
  size_t carve(const EngineConfig& config, uint8_t* base);
  static size_t most_pages(const EngineConfig& config, size_t window);
  static size_t total_pages(const EngineConfig& config, size_t window);
  const Table& table_of(size_t group, size_t sequence) const { return groups_[group].tables[sequence]; }
  Status check_known(size_t sequence) const;
  bool holds_past(size_t sequence, size_t position) const;
  size_t pages_wanted(const Run* runs, size_t count) const;
  uint32_t take(Group& group, uint32_t after);
  static void drop(Group& group, uint32_t page);
  void copy_page(size_t group, uint32_t from, uint32_t to, size_t positions);

  HugeMemory memory_;
  std::vector<Layer> layers_;
  std::vector<Group> groups_;
  std::vector<size_t> filled_;  // (sequence): its positions that are written
  size_t kv_head_count_ = 0;
  size_t padded_dim_ = 0;
};

}  // namespace pi2
