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
  /** For traces: set by the caller when it submits, and by the reader (only then) when it sees that the read is done. */
  uint64_t submitted_ns = 0;
  uint64_t done_ns = 0;

  static constexpr uint32_t kPending = 0;
  static constexpr uint32_t kDone = 1;
  static constexpr uint32_t kFailed = 2;
};

inline constexpr size_t kPageBytes = 4096;

class Reader {
 public:
  virtual ~Reader() = default;

  /**
   * Starts `count` reads and returns without waiting for them, but for room where too many are under way; any thread.
   * Returns how long it waited for room, in nanoseconds.
   */
  virtual uint64_t submit(ReadRequest* requests, size_t count) = 0;

  /** Waits until a request is done; any thread. A failed read is said in words, with the file's name. */
  virtual Status wait(ReadRequest& request) = 0;

  /** Lets requests that are done show it, without waiting; any thread. */
  virtual void poll() {}

  /** How bytes are really read, for the report: "direct, 4 threads", "buffered, io_uring". */
  virtual std::string description() const = 0;
};

/** What the user asked of the storage; the names of `--load-mode` and `--io`. */
enum class ReadMode { kDirect, kBuffered };
enum class ReadBackend { kThreads, kUring };

/** Trouble that a test asks for. Reads are numbered from 1 in the order of their submission; 0 is none. */
struct ReaderTrial {
  size_t fail_read = 0;   // this read fails with EIO
  size_t short_read = 0;  // the file ends inside this read
  size_t delay_us = 0;    // every read takes this long, one after another

  bool enabled() const { return fail_read > 0 || short_read > 0 || delay_us > 0; }
};

/**
 * Opens `path` for random reads. Direct I/O is tried and verified by reading one page both ways; where the file system
 * refuses it or lies, the reader is buffered and `description` says so. `lanes`: reads under way at once (threads of the
 * pool).
 */
Status open_reader(const std::string& path, ReadMode mode, ReadBackend backend, size_t lanes, const ReaderTrial& trial,
                   std::unique_ptr<Reader>* reader);

/**
 * Reads what is missing behind the first `done` bytes of a request; the state it ends in. Without direct I/O the kernel is
 * told to forget the pages: what is worth keeping has its place in the neuron cache, and a budget of memory includes page
 * cache.
 */
uint32_t read_rest(int descriptor, bool direct, const ReadRequest& request, size_t done);

/** Sleeps until a request is done, after a few microseconds of looking. For readers that notify. */
Status wait_notified(ReadRequest& request, const std::string& path);

/** The words for a request that is done but not with kDone. */
Status read_failure(const ReadRequest& request, const std::string& path);

}  // namespace pi2
