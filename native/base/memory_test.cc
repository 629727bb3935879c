/**
 * HugeMemory for programs under sanitizers, in place of memory.cc: the heap's, of exactly the bytes asked for, so that
 * AddressSanitizer sees a step past the end.
 */
#include "native/base/memory.h"

#include <cstdlib>
#include <cstring>

namespace pi2 {

Status HugeMemory::allocate(size_t bytes, const char* what) {
  release();
  if (posix_memalign(&mapping_, 4096, bytes) != 0) return Status::memory(what);
  std::memset(mapping_, 0, bytes);
  data_ = static_cast<uint8_t*>(mapping_);
  bytes_ = bytes;
  return Status::ok();
}

void HugeMemory::release() {
  std::free(mapping_);
  mapping_ = nullptr;
}

}  // namespace pi2
