#include "native/storage/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "native/storage/reader.h"

namespace pi2 {
namespace {

/** A mapping that the signal handler may meet. It takes no locks, so there is a fixed number of them. */
struct Watch {
  std::atomic<bool> taken{false};
  std::atomic<uint8_t*> begin{nullptr};
  std::atomic<size_t> bytes{0};
  std::atomic<bool> broken{false};
};

constexpr size_t kWatches = 64;
Watch watches[kWatches];
struct sigaction handler_before;

void on_bus_error(int, siginfo_t* info, void*) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Watch& watch : watches) {
    uint8_t* begin = watch.begin.load();
    const auto first = reinterpret_cast<uintptr_t>(begin);
    const size_t bytes = watch.bytes.load();
    if (begin == nullptr || at < first || at - first >= bytes) continue;
    // Said before any thread can compute with the zeros.
    watch.broken.store(true);
    const int error = errno;
    const void* zeros = mmap(begin, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    errno = error;
    if (zeros != MAP_FAILED) return;
  }
  // Not ours: the instruction is run again and meets whoever was responsible before.
  sigaction(SIGBUS, &handler_before, nullptr);
}

void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGBUS, &action, &handler_before);
  });
}

}  // namespace

Status MappedFile::open(const std::string& path) {
  path_ = path;
  const auto failed = [&] { return Status::io("cannot map " + path + ": " + std::strerror(errno)); };
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat found;
  if (descriptor < 0) return failed();
  if (fstat(descriptor, &found) != 0) {
    Status status = failed();
    close(descriptor);
    return status;
  }
  size_ = static_cast<size_t>(found.st_size);
  mapping_bytes_ = (size_ + kPageBytes - 1) / kPageBytes * kPageBytes + kPageBytes;
  void* zeros = mmap(nullptr, mapping_bytes_, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  void* mapped = zeros;
  if (zeros != MAP_FAILED && size_ > 0) mapped = mmap(zeros, size_, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0);
  Status status = mapped == MAP_FAILED ? failed() : Status::ok();
  close(descriptor);
  if (zeros != MAP_FAILED) data_ = static_cast<uint8_t*>(zeros);
  if (!status.is_ok()) return status;
  install_handler();
  for (watch_ = 0; watch_ < kWatches; watch_++) {
    Watch& watch = watches[watch_];
    if (watch.taken.exchange(true)) continue;
    watch.broken.store(false);
    watch.bytes.store(mapping_bytes_);
    watch.begin.store(data_);
    return Status::ok();
  }
  return Status::memory("too many files are mapped at once");
}

MappedFile::~MappedFile() {
  if (data_ == nullptr) return;
  if (watch_ < kWatches && watches[watch_].begin.load() == data_) {
    watches[watch_].begin.store(nullptr);
    watches[watch_].taken.store(false);
  }
  munmap(data_, mapping_bytes_);
}

Status MappedFile::check() const {
  if (data_ == nullptr || !watches[watch_].broken.load()) return Status::ok();
  return Status::io(path_ + " could not be read any more: it was shortened, or the device failed");
}

}  // namespace pi2
