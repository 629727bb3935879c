#pragma once
#include <cstddef>

#include "native/base/status.h"

namespace pi2 {

/**
 * Bytes a second that `threads` threads read together from fresh anonymous memory of `bytes` bytes: the best of several
 * sequential sweeps. The denominator of every "share of bandwidth".
 */
Status measure_read_bandwidth(size_t threads, size_t bytes, double* bytes_per_second);

}  // namespace pi2
