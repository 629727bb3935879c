#pragma once
#include <cstddef>
#include <string>

#include "native/base/status.h"

namespace pi2 {

/** How a file is read to find out what its device gives. */
struct FlashProbe {
  size_t block_bytes = 0;  // of one read; a multiple of kPageBytes
  size_t lanes = 0;        // reads under way at once
  bool random = false;     // blocks anywhere, instead of one after another
  double seconds = 0;
};

/**
 * Bytes a second that reads of `path` bring, past the page cache where the file system allows it; `how` says how they were
 * really made, as `Reader::description`. The denominator of every "share of what flash gives".
 */
Status measure_flash_bandwidth(const std::string& path, const FlashProbe& probe, double* bytes_per_second, std::string* how);

}  // namespace pi2
