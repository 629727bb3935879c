#include "native/storage/faulty_reader.h"

#include <cerrno>

namespace pi2 {

uint64_t FaultyReader::submit(ReadRequest* requests, size_t count) {
  const std::lock_guard<std::mutex> lock(lock_);
  size_t passed = 0;
  uint64_t waited_ns = 0;
  for (size_t i = 0; i < count; i++) {
    submitted_++;
    if (submitted_ != fail_read_ && submitted_ != short_read_) continue;
    waited_ns += inner_->submit(requests + passed, i - passed);
    passed = i + 1;
    const uint32_t error = submitted_ == fail_read_ ? EIO : 0;
    requests[i].state.store(ReadRequest::kFailed + error, std::memory_order_release);
  }
  return waited_ns + inner_->submit(requests + passed, count - passed);
}

}  // namespace pi2
