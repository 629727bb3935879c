#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "native/base/thread_pool.h"

namespace pi2 {

/**
 * Bytes a second that the threads of a pool read together from memory that is in use: the best of several sweeps through the
 * first GiB of `memory`, which must be filled (pages never written to are all one page). Takes no memory and, beyond some
 * 0.1 s, no time. The denominator of every "share of bandwidth"; of memory that fits a cache of the CPU, that cache's.
 */
double measure_read_bandwidth(ThreadPool& pool, const std::vector<std::span<const uint8_t>>& memory);

}  // namespace pi2
