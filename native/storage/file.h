#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "native/base/status.h"

namespace pi2 {

/** A file open for reading at offsets. Errors name the file; a short read is an error. */
class File {
 public:
  File() = default;
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  Status open(const std::string& path);
  /** Bytes of the file when it was opened. */
  size_t size() const { return size_; }
  Status read(size_t offset, size_t bytes, uint8_t* out) const;
  /** Tells the kernel that the range will not be read again: weights are kept in our own memory, once. */
  void forget(size_t offset, size_t bytes) const;

 private:
  int descriptor_ = -1;
  size_t size_ = 0;
  std::string path_;
};

}  // namespace pi2
