#include "native/storage/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace pi2 {

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

Status File::open(const std::string& path) {
  path_ = path;
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) return Status::io("cannot open " + path + ": " + std::strerror(errno));
  struct stat found;
  if (fstat(descriptor_, &found) != 0) return Status::io("cannot open " + path + ": " + std::strerror(errno));
  size_ = static_cast<size_t>(found.st_size);
  return Status::ok();
}

Status File::read(size_t offset, size_t bytes, uint8_t* out) const {
  while (bytes > 0) {
    const ssize_t got = pread(descriptor_, out, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    const std::string where = " at byte " + std::to_string(offset) + " of " + path_;
    if (got < 0) return Status::io("read failed" + where + ": " + std::strerror(errno));
    if (got == 0) return Status::io("the file ends" + where + ", " + std::to_string(bytes) + " bytes early");
    offset += static_cast<size_t>(got);
    out += got;
    bytes -= static_cast<size_t>(got);
  }
  return Status::ok();
}

void File::forget(size_t offset, size_t bytes) const {
  posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
}

}  // namespace pi2
