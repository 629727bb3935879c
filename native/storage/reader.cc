#include "native/storage/reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "native/base/memory.h"
#include "native/base/pause.h"
#include "native/storage/faulty_reader.h"
#include "native/storage/slow_reader.h"
#include "native/storage/threads_reader.h"
#include "native/storage/uring_reader.h"

namespace pi2 {
namespace {

/** A wait spins this often, a few microseconds, before it sleeps. */
constexpr int kSpins = 200;

/** Whether direct reads give the bytes that buffered ones do: on FUSE the open may succeed and the data be wrong. */
bool direct_is_honest(int direct, int buffered) {
  HugeMemory pages;
  if (!pages.allocate(2 * kPageBytes, "the direct I/O test").is_ok()) return false;
  uint8_t* first = pages.data();
  uint8_t* second = first + kPageBytes;
  const ssize_t got = pread(direct, first, kPageBytes, 0);
  return got > 0 && pread(buffered, second, kPageBytes, 0) == got &&
         std::memcmp(first, second, static_cast<size_t>(got)) == 0;
}

}  // namespace

Status read_failure(const ReadRequest& request, const std::string& path) {
  const std::string where = " at byte " + std::to_string(request.offset) + " of " + path;
  const uint32_t error = request.state.load(std::memory_order_acquire) - ReadRequest::kFailed;
  if (error == 0)
    return Status::io("the file ends" + where + ", inside a read of " + std::to_string(request.bytes) + " bytes");
  return Status::io("read failed" + where + ": " + std::strerror(static_cast<int>(error)));
}

uint32_t read_rest(int descriptor, bool direct, const ReadRequest& request, size_t done) {
  while (done < request.bytes) {
    const ssize_t got =
        pread(descriptor, request.buffer + done, request.bytes - done, static_cast<off_t>(request.offset + done));
    if (got < 0 && errno == EINTR) continue;
    // Direct reads stop between pages only at the end of the file, from where they cannot go on.
    const bool ended = got == 0 || (got < 0 && errno == EINVAL && done % kPageBytes != 0);
    if (ended) return ReadRequest::kFailed;
    if (got < 0) return ReadRequest::kFailed + static_cast<uint32_t>(errno);
    done += static_cast<size_t>(got);
  }
  if (!direct) {
    posix_fadvise(descriptor, static_cast<off_t>(request.offset), static_cast<off_t>(request.bytes), POSIX_FADV_DONTNEED);
  }
  return ReadRequest::kDone;
}

Status wait_notified(ReadRequest& request, const std::string& path) {
  uint32_t state = request.state.load(std::memory_order_acquire);
  for (int spin = 0; state == ReadRequest::kPending && spin < kSpins; spin++) {
    pause_cpu();
    state = request.state.load(std::memory_order_acquire);
  }
  while (state == ReadRequest::kPending) {
    request.state.wait(ReadRequest::kPending, std::memory_order_acquire);
    state = request.state.load(std::memory_order_acquire);
  }
  return state == ReadRequest::kDone ? Status::ok() : read_failure(request, path);
}

namespace {

Status open_file_reader(const std::string& path, ReadMode mode, ReadBackend backend, size_t lanes,
                        std::unique_ptr<Reader>* reader) {
  int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return Status::io("cannot open " + path + ": " + std::strerror(errno));
  bool direct = false;
  if (mode == ReadMode::kDirect) {
    const int other = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct = other >= 0 && direct_is_honest(other, descriptor);
    if (direct) {
      close(descriptor);
      descriptor = other;
    } else if (other >= 0) {
      close(other);
    }
  }
  // Random reads of a page must not bring in a megabyte of neighbours.
  if (!direct) posix_fadvise(descriptor, 0, 0, POSIX_FADV_RANDOM);
  if (backend == ReadBackend::kUring) {
    const int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    *reader = own < 0 ? nullptr : UringReader::create(own, path, direct);
    if (*reader != nullptr) {
      close(descriptor);
      return Status::ok();
    }
  }
  *reader = std::make_unique<ThreadsReader>(descriptor, path, direct, lanes);
  return Status::ok();
}

}  // namespace

Status open_reader(const std::string& path, ReadMode mode, ReadBackend backend, size_t lanes, const ReaderTrial& trial,
                   std::unique_ptr<Reader>* reader) {
  Status status = open_file_reader(path, mode, backend, lanes, reader);
  if (!status.is_ok()) return status;
  if (trial.delay_us > 0) *reader = std::make_unique<SlowReader>(std::move(*reader), path, trial.delay_us);
  if (trial.fail_read > 0 || trial.short_read > 0) {
    *reader = std::make_unique<FaultyReader>(std::move(*reader), trial.fail_read, trial.short_read);
  }
  return status;
}

}  // namespace pi2
