#pragma once
#include <cstddef>
#include <cstdint>

namespace pi2 {

/** Hands out pieces of one block of memory, each on a cache line. With a null base it only measures. */
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace pi2
