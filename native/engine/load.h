#pragma once
/** Reading of whole extents at open: sequential, on all threads, checksums compared. */
#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <vector>

#include "native/base/crc32.h"
#include "native/base/status.h"
#include "native/base/threads.h"
#include "native/engine/config.h"
#include "native/storage/file.h"

namespace pi2 {

/** Bytes of one read while loading: long enough for sequential speed, short enough for a bounce buffer a loader. */
inline constexpr size_t kLoadBytes = size_t{2} << 20;
/** Loaders a thread of the engine: while one takes bundles apart, another waits for the disk. */
inline constexpr size_t kLoadersPerThread = 2;

/** Keeps the first failure of several threads. */
class FirstFailure {
 public:
  void meet(Status status) {
    if (status.is_ok()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (status_.is_ok()) status_ = std::move(status);
    failed_.store(true, std::memory_order_relaxed);
  }
  bool any() const { return failed_.load(std::memory_order_relaxed); }
  /** Once all threads are done. */
  Status take() { return std::move(status_); }

 private:
  std::mutex mutex_;
  Status status_;
  std::atomic<bool> failed_{false};
};

/** Fails, naming the extent, unless `sum` is its checksum. */
Status compare_checksum(const ExtentConfig& extent, uint32_t sum);

/** Runs load(index of the extent) on every extent of neurons.bin (`neurons`) or of the other file, on all loaders. */
Status load_extents(const std::vector<ExtentConfig>& extents, bool neurons, size_t threads,
                    const std::function<Status(size_t index)>& load);

/** Whether a file holds every extent of its own (see load_extents), each of them once. `path` names it in errors. */
Status check_extents(const std::string& path, const std::vector<ExtentConfig>& extents, bool neurons, const File& file);

/**
 * Compares the checksums of the extents of one file (see load_extents) and keeps nothing of it; what is read stays in the
 * page cache, as far as the kernel likes.
 */
Status verify_extents(const std::string& path, const std::vector<ExtentConfig>& extents, bool neurons, size_t threads);

/** Whether bundle layout, experts' offsets and neurons.bin fit the model's shape: no more is allocated than the file has. */
Status check_neurons(const EngineConfig& config);

/** Takes one bundle apart: FORMAT.md section 4 to two or three rows of weights and scales; null rows are left out. */
void unpack_bundle(const EngineConfig& config, const uint8_t* part1, const uint8_t* part2, uint8_t* const rows[3]);

/** Reads neurons.bin and hands out every bundle once; from several threads, each its own bundles. */
Status load_bundles(const EngineConfig& config,
                    const std::function<void(size_t bank, size_t neuron, const uint8_t* part1, const uint8_t* part2)>& take);

}  // namespace pi2
