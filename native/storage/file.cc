#include "native/storage/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "native/storage/reader.h"

namespace pi2 {

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
  if (direct_ >= 0) close(direct_);
}

Status File::open(const std::string& path) {
  path_ = path;
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) return Status::io("cannot open " + path + ": " + std::strerror(errno));
  struct stat found;
  if (fstat(descriptor_, &found) != 0) return Status::io("cannot open " + path + ": " + std::strerror(errno));
  size_ = static_cast<size_t>(found.st_size);
  direct_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  return Status::ok();
}

Status File::read(size_t offset, size_t bytes, uint8_t* out) const {
  return read_from(descriptor_, offset, bytes, bytes, out);
}

Status File::read_once(size_t offset, size_t bytes, uint8_t* out) const {
  const bool aligned = offset % kPageBytes == 0 && reinterpret_cast<uintptr_t>(out) % kPageBytes == 0;
  if (aligned && direct_ >= 0) {
    const size_t most = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    // Whatever is wrong with it, the ordinary way shows whether it is the file's fault, and says so.
    if (read_from(direct_, offset, bytes, most, out).is_ok()) return Status::ok();
  }
  Status status = read(offset, bytes, out);
  posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
  return status;
}

/** Reads `bytes` bytes at least, `most` at most. */
Status File::read_from(int descriptor, size_t offset, size_t bytes, size_t most, uint8_t* out) const {
  for (size_t done = 0; done < bytes;) {
    const size_t at = offset + done;
    const ssize_t got = pread(descriptor, out + done, most - done, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    const std::string where = " at byte " + std::to_string(at) + " of " + path_;
    if (got < 0) return Status::io("read failed" + where + ": " + std::strerror(errno));
    if (got == 0) return Status::io("the file ends" + where + ", " + std::to_string(bytes - done) + " bytes early");
    done += static_cast<size_t>(got);
  }
  return Status::ok();
}

}  // namespace pi2
