#include "native/base/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "native/base/memory.h"
#include "native/base/threads.h"

namespace pi2 {
namespace {

constexpr int kSweeps = 7;

/** A 64-byte load on targets that have one, several loads elsewhere. */
typedef uint64_t Line __attribute__((vector_size(64), aligned(64), may_alias));

uint64_t sum_lines(const uint8_t* bytes, size_t count) {
  Line sums[4] = {};
  const Line* lines = reinterpret_cast<const Line*>(bytes);
  for (size_t i = 0; i + 4 <= count / sizeof(Line); i += 4) {
    for (size_t k = 0; k < 4; k++) sums[k] += lines[i + k];
  }
  const Line total = sums[0] + sums[1] + sums[2] + sums[3];
  return total[0] + total[1] + total[2] + total[3] + total[4] + total[5] + total[6] + total[7];
}

}  // namespace

Status measure_read_bandwidth(size_t threads, size_t bytes, double* bytes_per_second) {
  HugeMemory memory;
  Status status = memory.allocate(bytes, "the bandwidth test");
  if (!status.is_ok()) return status;
  std::memset(memory.data(), 1, bytes);
  std::atomic<uint64_t> sink{0};
  double best_seconds = 1e30;
  for (int sweep = 0; sweep < kSweeps; sweep++) {
    const auto start = std::chrono::steady_clock::now();
    run_in_ranges(threads, bytes / 4096, [&](size_t begin, size_t end) {
      sink.fetch_add(sum_lines(memory.data() + begin * 4096, (end - begin) * 4096), std::memory_order_relaxed);
    });
    best_seconds = std::min(best_seconds, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  *bytes_per_second = static_cast<double>(bytes / 4096 * 4096) / best_seconds;
  return Status::ok();
}

}  // namespace pi2
