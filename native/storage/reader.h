#pragma once
/**
 * Reading of neurons from flash. One interface: real files behind a pool of threads or io_uring, and decorators that slow it
 * down or make it fail, for tests.
 *
 * A request belongs to the caller until it is submitted, to the reader until it is done, and to the caller again after that.
 * Nothing is allocated for a request.
 */
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "native/base/status.h"

namespace pi2 {

/** One read of `bytes` bytes at `offset` into `buffer`. With direct I/O all three are multiples of kPageBytes. */
struct ReadRequest {
  size_t offset = 0;
  size_t bytes = 0;
  uint8_t* buffer = nullptr;
  /** 0 while it is on its way, 1 when the bytes are there, else 2 + errno (2 alone: the file ended early). */
  std::atomic<uint32_t> state{0};

  static constexpr uint32_t kPending = 0;
  static constexpr uint32_t kDone = 1;
  static constexpr uint32_t kFailed = 2;
};

inline constexpr size_t kPageBytes = 4096;

class Reader {
 public:
  virtual ~Reader() = default;

  /** Starts `count` reads and returns at once. One submitting thread. */
  virtual void submit(ReadRequest* requests, size_t count) = 0;

  /** Waits until a request is done; any thread. A failed read is said in words, with the file's name. */
  virtual Status wait(ReadRequest& request) = 0;

  /** How bytes are really read, for the report: "direct, 4 threads", "buffered, io_uring". */
  virtual std::string description() const = 0;
};

/** What the user asked of the storage; the names of `--load-mode` and `--io`. */
enum class ReadMode { kDirect, kBuffered };
enum class ReadBackend { kThreads, kUring };

/**
 * Opens `path` for random reads. Direct I/O is tried and verified by reading one page both ways; where the file system
 * refuses it or lies, the reader is buffered and `description` says so. `lanes`: reads under way at once (threads of the
 * pool).
 */
Status open_reader(const std::string& path, ReadMode mode, ReadBackend backend, size_t lanes,
                   std::unique_ptr<Reader>* reader);

/** The words for a request that is done but not with kDone. */
Status read_failure(const ReadRequest& request, const std::string& path);

}  // namespace pi2
