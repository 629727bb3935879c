#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "native/base/status.h"

namespace pi2 {

/**
 * A file mapped for reading: the kernel's page cache decides which of its pages are in memory. A page of zeros follows the
 * last one, since kernels may load a line past a row.
 *
 * A page that cannot be read any more (the file was shortened, the device failed) raises SIGBUS in whatever thread touches
 * it. A handler then puts zeros in place of the whole mapping and `check` fails from then on: what was computed with it must
 * not be used. Signals from other memory go to the handler that was there before.
 */
class MappedFile {
 public:
  MappedFile() = default;
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  Status open(const std::string& path);
  const uint8_t* data() const { return data_; }
  /** Bytes of the file when it was opened. */
  size_t size() const { return size_; }
  /** Fails once a page could not be read. */
  Status check() const;

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  size_t mapping_bytes_ = 0;
  std::string path_;
  size_t watch_ = 0;
};

}  // namespace pi2
