#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#include "native/base/status.h"

namespace pi2 {

/**
 * Anonymous memory, zeroed, aligned to 2 MiB and backed by huge pages where the kernel gives them: sparse access to weights
 * touches thousands of pages a token. Anonymous because idle page cache is evicted. Freed by the destructor.
 */
class HugeMemory {
 public:
  HugeMemory() = default;
  ~HugeMemory() { release(); }
  HugeMemory(HugeMemory&& other) noexcept { swap(other); }
  HugeMemory& operator=(HugeMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  HugeMemory(const HugeMemory&) = delete;
  HugeMemory& operator=(const HugeMemory&) = delete;

  /** `what` names the memory in the error. */
  Status allocate(size_t bytes, const char* what);

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void release();
  void swap(HugeMemory& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapping_, other.mapping_);
    std::swap(mapping_bytes_, other.mapping_bytes_);
  }

  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
};

}  // namespace pi2
