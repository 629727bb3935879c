#include "native/base/memory.h"

#include <sys/mman.h>

#include <string>

namespace pi2 {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

Status HugeMemory::allocate(size_t bytes, const char* what) {
  release();
  if (bytes == 0) return Status::ok();
  mapping_bytes_ = (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    return Status::memory("no memory for " + std::string(what) + " (" + std::to_string(bytes) + " bytes)");
  }
  const uintptr_t start = (reinterpret_cast<uintptr_t>(mapping_) + kHugePage - 1) / kHugePage * kHugePage;
  data_ = reinterpret_cast<uint8_t*>(start);
  bytes_ = bytes;
  // Small buffers would waste most of a huge page.
  if (bytes >= kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
  return Status::ok();
}

void HugeMemory::release() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
  mapping_ = nullptr;
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace pi2
