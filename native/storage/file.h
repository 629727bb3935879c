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
  /**
   * Reads what will not be read again: weights are kept in our own memory, once. Past the page cache, if `offset` and `out`
   * are multiples of a page and the file system can; else through it, and what it kept is given back. `out` has room for
   * whole pages.
   */
  Status read_once(size_t offset, size_t bytes, uint8_t* out) const;

 private:
  Status read_from(int descriptor, size_t offset, size_t bytes, size_t most, uint8_t* out) const;

  int descriptor_ = -1;
  int direct_ = -1;  // the same file past the page cache, or -1
  size_t size_ = 0;
  std::string path_;
};

}  // namespace pi2
