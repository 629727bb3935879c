#pragma once
/** Sizes of streaming: how much is read at once and how much memory its stages need. */
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "native/engine/config.h"
#include "native/engine/neurons.h"
#include "native/storage/reader.h"

namespace pi2 {

/** A read no longer gains speed beyond this, and shorter ones start computing sooner. */
inline constexpr size_t kMostReadBytes = size_t{256} << 10;
/**
 * Pages between two wanted ones that are read along. Measured at depth 32 a 4 KiB read takes 12 us of the device and 4 KiB
 * more of the same read 3 us, so up to some 10 KiB of gap are cheaper than a second request.
 */
inline constexpr size_t kGapBytes = size_t{8} << 10;
/** Kernels may load a line past a vector. */
inline constexpr size_t kTailBytes = 64;

inline size_t page_down(size_t offset) { return offset / kPageBytes * kPageBytes; }
inline size_t page_up(size_t offset) { return (offset + kPageBytes - 1) / kPageBytes * kPageBytes; }

/** Whether slots keep gates too: with a predictor nobody wants the gates of all neurons. */
inline bool keeps_gates(const EngineConfig& config) { return config.predictor.enabled(); }

/** Bytes of the rows that a slot keeps: (gate,) up (if there is a gate) and down. */
inline size_t slot_bytes(const EngineConfig& config) {
  const size_t rows = config.layout.matrices - (keeps_gates(config) ? 0 : 1);
  return rows * row_bytes(config.ffn_encoding, config.hidden_size);
}

/** Whether parts 1 and 2 of a bundle lie on pages of their own, so that one can be read without the other. */
inline bool has_split_parts(const EngineConfig& config) { return config.layout.part2_offset % kPageBytes == 0; }

/**
 * Most bytes of staging that one chunk can need: all units that it touches, some of them twice where a read ends between two
 * neurons that share pages; without bundles each row has pages of its own.
 */
inline size_t chunk_flash_bytes(const EngineConfig& config) {
  const size_t unit = page_up(config.layout.unit_bytes);
  const size_t units = kNeuronChunk / config.layout.neurons_per_unit + 2;
  const size_t merged = (units + units * unit / kMostReadBytes + 1) * unit;
  // Pages between two parts 1 are parts 2: a phase that reads them along may ask for as much as both.
  const size_t phases = has_split_parts(config) ? 2 : 1;
  const size_t row = page_up(config.layout.part2_bytes) + kPageBytes;
  return phases * merged + (config.stream.bundles ? 0 : kNeuronChunk * config.layout.matrices * row);
}

/**
 * Most bytes of staging that a missing neuron can need, `distance` neurons behind the last missing one of its chunk: the
 * pages of both parts, and where that one is near, pages of neighbours and gaps that reads take along. Rounds are cut by it,
 * not by what is really read: what was read ahead, or in one phase instead of two, must not change which neurons share a
 * round, since that decides which of them get a slot.
 */
inline size_t entry_flash_bytes(const EngineConfig& config, size_t distance) {
  const BundleLayout& layout = config.layout;
  const size_t own = std::max(page_up(layout.part1_bytes) + page_up(layout.part2_bytes), layout.unit_bytes);
  const bool is_alone = layout.neurons_per_unit == 1 && (distance - 1) * layout.unit_bytes > kGapBytes;
  // A unit is whole pages: a part at its start touches no other.
  return is_alone && has_split_parts(config) ? own : own + 2 * (kPageBytes + kGapBytes);
}

/** Most reads of one chunk, both phases. */
inline size_t chunk_reads(const EngineConfig& config) {
  return 3 * kNeuronChunk + chunk_flash_bytes(config) / kMostReadBytes + 1;
}

/** Bytes and most reads of one of the two halves of staging memory. */
inline size_t half_bytes(const EngineConfig& config) {
  return page_up(std::max(config.stream.staging_bytes / 2, chunk_flash_bytes(config)));
}
inline size_t half_requests(const EngineConfig& config) { return half_bytes(config) / kPageBytes + chunk_reads(config); }

/** Most neurons that are read ahead, each by a read of its own at the worst. */
inline size_t most_ahead(const EngineConfig& config) { return config.stream.prefetch_bytes / kPageBytes; }
/** Requests of both halves and of those ahead. */
inline size_t request_total(const EngineConfig& config) { return 2 * half_requests(config) + most_ahead(config); }

/** Jobs that are found at a time: of a dense model the next one is not known before this one is computed. */
inline size_t found_count(const EngineConfig& config) { return config.expert_count > 1 ? 2 : 1; }

inline size_t padded_hidden(const EngineConfig& config) { return group_count(config.hidden_size) * kGroup; }

}  // namespace pi2
