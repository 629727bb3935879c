#pragma once
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "native/base/memory.h"
#include "native/base/status.h"
#include "native/engine/config.h"
#include "native/engine/matrix.h"
#include "native/storage/mapped_file.h"

namespace pi2 {

/** Extents of one file in memory or mapped, in their form on flash, and the tensors in them: resident.bin, predictor.bin. */
class TensorFile {
 public:
  /** Bytes that `load` takes. */
  static size_t bytes_needed(const std::vector<ExtentConfig>& extents);

  /**
   * Reads the extents (those of neurons.bin are passed over), compares their checksums and finds the tensors. `what` names
   * the memory in errors. Both lists must outlive this object.
   */
  Status load(const std::string& path, const std::vector<ExtentConfig>& extents, const std::vector<TensorConfig>& tensors,
              size_t threads, const char* what);

  /** As `load`, but the file is mapped: its checksums are compared in a pass of their own, and no memory is taken. */
  Status map(const std::string& path, const std::vector<ExtentConfig>& extents, const std::vector<TensorConfig>& tensors,
             size_t threads);
  /** Fails once a page of a mapped file could not be read. */
  Status check() const { return mapping_.check(); }

  /** A tensor by name, or null. */
  const Matrix* find(const std::string& name) const;
  /** Memory of `bytes` bytes at `offset` of the file, or null if they were not loaded. */
  const uint8_t* at(size_t offset, size_t bytes) const;
  size_t bytes() const { return memory_.bytes(); }
  /** Everything that was loaded; empty for a mapped file. */
  std::span<const uint8_t> memory() const { return {memory_.data(), memory_.bytes()}; }

 private:
  Status find_tensors(const std::vector<TensorConfig>& tensors);

  const std::vector<ExtentConfig>* extents_ = nullptr;
  std::vector<size_t> places_;  // (extent): where it begins behind base_
  const uint8_t* base_ = nullptr;
  HugeMemory memory_;
  MappedFile mapping_;
  std::unordered_map<std::string, Matrix> tensors_;
};

/**
 * Takes tensors by name, each with the shape that the model wants of it, and keeps what was wrong with the first that has
 * not.
 */
class TensorTaker {
 public:
  explicit TensorTaker(const TensorFile& file) : file_(&file) {}
  /** f32 if `is_float`, else encoded. A missing tensor is trouble only if it is `needed`. */
  void take(const std::string& name, size_t rows, size_t columns, bool needed, bool is_float, Matrix* matrix);
  Status status() const { return status_; }

 private:
  const TensorFile* file_;
  Status status_;
};

}  // namespace pi2
