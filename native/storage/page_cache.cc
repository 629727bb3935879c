#include "native/storage/page_cache.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

namespace pi2 {
namespace {

/** Mapped at once: the answer has a byte for each page. */
constexpr uint64_t kWindowBytes = uint64_t{1} << 30;

/** For others Linux (since 5.2) says that every page is there. */
bool may_ask(const std::string& path, const struct stat& found) {
  const uid_t user = geteuid();
  return user == 0 || user == found.st_uid || faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) == 0;
}

/** Adds the resident pages of `bytes` bytes at `offset`; false leaves the reason in errno. */
bool add_window(int descriptor, uint64_t offset, uint64_t bytes, uint64_t page_bytes, uint64_t* total) {
  void* mapped = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, static_cast<off_t>(offset));
  if (mapped == MAP_FAILED) return false;
  std::vector<unsigned char> pages((bytes + page_bytes - 1) / page_bytes);
  const bool is_told = mincore(mapped, bytes, pages.data()) == 0;
  const int error = errno;
  munmap(mapped, bytes);
  errno = error;
  // Bits above the lowest one are undefined.
  *total += page_bytes * std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
  return is_told;
}

}  // namespace

Status page_cache_share(const std::string& path, PageCacheShare* share) {
  *share = {};
  const auto failed = [&] { return Status::io("cannot map " + path + ": " + std::strerror(errno)); };
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return failed();
  struct stat found;
  Status status = fstat(descriptor, &found) == 0 ? Status::ok() : failed();
  share->is_known = status.is_ok() && may_ask(path, found);
  const uint64_t size = share->is_known ? static_cast<uint64_t>(found.st_size) : 0;
  const auto page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  for (uint64_t at = 0; at < size && status.is_ok(); at += kWindowBytes) {
    const uint64_t bytes = std::min(kWindowBytes, size - at);
    if (!add_window(descriptor, at, bytes, page_bytes, &share->bytes)) status = failed();
  }
  close(descriptor);
  return status;
}

}  // namespace pi2
