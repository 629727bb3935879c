#include "native/base/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace pi2 {
namespace {

/** Far beyond any cache. */
constexpr size_t kMostBytes = size_t{1} << 30;
constexpr size_t kChunkBytes = size_t{256} << 10;
/** Sweeps of little memory go on for so long. */
constexpr double kLeastSeconds = 0.03;
constexpr int kLeastSweeps = 3;

/** A 64-byte load on targets that have one, several loads elsewhere. */
typedef uint64_t Line __attribute__((vector_size(64), aligned(64), may_alias));

uint64_t sum_lines(std::span<const uint8_t> bytes) {
  Line sums[4] = {};
  const Line* lines = reinterpret_cast<const Line*>(bytes.data());
  for (size_t i = 0; i + 4 <= bytes.size() / sizeof(Line); i += 4) {
    for (size_t k = 0; k < 4; k++) sums[k] += lines[i + k];
  }
  const Line total = sums[0] + sums[1] + sums[2] + sums[3];
  return total[0] + total[1] + total[2] + total[3] + total[4] + total[5] + total[6] + total[7];
}

}  // namespace

double measure_read_bandwidth(ThreadPool& pool, const std::vector<std::span<const uint8_t>>& memory) {
  using Clock = std::chrono::steady_clock;
  std::vector<std::span<const uint8_t>> chunks;
  double bytes = 0;
  for (const auto& piece : memory) {
    for (size_t at = 0; at < piece.size() && chunks.size() < kMostBytes / kChunkBytes; at += kChunkBytes) {
      chunks.push_back(piece.subspan(at, std::min(kChunkBytes, piece.size() - at)));
      bytes += static_cast<double>(chunks.back().size());
    }
  }
  if (chunks.empty()) return 0;
  std::atomic<uint64_t> sink{0};
  double best = 0;
  double total_seconds = 0;
  for (int sweep = 0; sweep < kLeastSweeps || total_seconds < kLeastSeconds; sweep++) {
    const auto start = Clock::now();
    pool.run(chunks.size(),
             [&](size_t chunk, size_t) { sink.fetch_add(sum_lines(chunks[chunk]), std::memory_order_relaxed); });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    total_seconds += seconds;
    best = std::max(best, bytes / seconds);
  }
  return best;
}

}  // namespace pi2
