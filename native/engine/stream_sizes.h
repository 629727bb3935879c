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

/** Bytes of the rows that a slot keeps: up (if there is a gate) and down. */
inline size_t slot_bytes(const EngineConfig& config) {
  return (config.layout.matrices - 1) * row_bytes(config.ffn_encoding, config.hidden_size);
}

/** Most bytes of staging that one chunk can need: all units that it touches. */
inline size_t chunk_flash_bytes(const EngineConfig& config) {
  return (kNeuronChunk / config.layout.neurons_per_unit + 2) * page_up(config.layout.unit_bytes);
}

/** Most reads of one chunk. */
inline size_t chunk_reads(const EngineConfig& config) {
  return kNeuronChunk + chunk_flash_bytes(config) / kMostReadBytes + 1;
}

/** Bytes and most reads of one of the two halves of staging memory. */
inline size_t half_bytes(const EngineConfig& config) {
  return page_up(std::max(config.stream.staging_bytes / 2, chunk_flash_bytes(config)));
}
inline size_t half_requests(const EngineConfig& config) { return half_bytes(config) / kPageBytes + chunk_reads(config); }

inline size_t padded_hidden(const EngineConfig& config) { return group_count(config.hidden_size) * kGroup; }

}  // namespace pi2
