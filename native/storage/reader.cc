#include "native/storage/reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "native/base/memory.h"
#include "native/storage/threads_reader.h"
#include "native/storage/uring_reader.h"

namespace pi2 {
namespace {

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

Status open_reader(const std::string& path, ReadMode mode, ReadBackend backend, size_t lanes,
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

}  // namespace pi2
