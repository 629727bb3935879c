#include "native/engine/tensor_file.h"

#include <algorithm>

#include "native/engine/load.h"

namespace pi2 {
namespace {

/** Extents begin on pages in memory too; and kernels may load a line past the last row. */
constexpr size_t kAlignment = 4096;
/** Tensors begin at multiples of this; FORMAT.md section 3. */
constexpr size_t kTensorAlignment = 64;

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

}  // namespace

size_t TensorFile::bytes_needed(const std::vector<ExtentConfig>& extents) {
  // Kernels may load a line past a row's scales: one page is kept behind the last extent.
  size_t total = kAlignment;
  for (const ExtentConfig& extent : extents) {
    if (!extent.is_neurons) total += round_up(extent.bytes, kAlignment);
  }
  return total;
}

Status TensorFile::load(const std::string& path, const std::vector<ExtentConfig>& extents,
                        const std::vector<TensorConfig>& tensors, size_t threads, const char* what) {
  extents_ = &extents;
  File file;
  Status status = file.open(path);
  if (status.is_ok()) status = check_extents(path, extents, false, file);
  if (!status.is_ok()) return status;
  size_t total = 0;
  for (const ExtentConfig& extent : extents) {
    places_.push_back(total);
    if (!extent.is_neurons) total += round_up(extent.bytes, kAlignment);
  }
  status = memory_.allocate(bytes_needed(extents), what);
  if (!status.is_ok()) return status;
  status = load_extents(extents, false, threads, [&](size_t index) {
    const ExtentConfig& extent = extents[index];
    uint8_t* place = memory_.data() + places_[index];
    uint32_t sum = 0;
    for (size_t done = 0; done < extent.bytes; done += kLoadBytes) {
      const size_t bytes = std::min(kLoadBytes, extent.bytes - done);
      Status read = file.read_once(extent.offset + done, bytes, place + done);
      if (!read.is_ok()) return read;
      sum = crc32(place + done, bytes, sum);
    }
    return compare_checksum(extent, sum);
  });
  base_ = memory_.data();
  return status.is_ok() ? find_tensors(tensors) : status;
}

Status TensorFile::map(const std::string& path, const std::vector<ExtentConfig>& extents,
                       const std::vector<TensorConfig>& tensors, size_t threads) {
  extents_ = &extents;
  Status status = mapping_.open(path);
  if (status.is_ok()) status = verify_extents(path, extents, false, threads);
  if (!status.is_ok()) return status;
  for (const ExtentConfig& extent : extents) {
    const bool inside = extent.is_neurons || extent.offset + extent.bytes <= mapping_.size();
    if (!inside) return Status::io(path + " ends before " + extent.name + " does");
    places_.push_back(extent.offset);
  }
  base_ = mapping_.data();
  return find_tensors(tensors);
}

Status TensorFile::find_tensors(const std::vector<TensorConfig>& tensors) {
  for (const TensorConfig& tensor : tensors) {
    // Divided, not multiplied: a product of absurd sizes overflows.
    const size_t row = row_bytes(tensor.encoding, tensor.columns);
    if (row == 0 || tensor.bytes % row != 0 || tensor.bytes / row != tensor.rows) {
      return Status::argument(tensor.name + ": bytes do not match its shape");
    }
    if (tensor.offset % kTensorAlignment != 0) return Status::argument(tensor.name + ": not aligned");
    const uint8_t* place = at(tensor.offset, tensor.bytes);
    if (place == nullptr) return Status::argument(tensor.name + ": in no extent");
    tensors_[tensor.name] = {place, tensor.encoding, tensor.rows, tensor.columns};
  }
  return Status::ok();
}

const Matrix* TensorFile::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const uint8_t* TensorFile::at(size_t offset, size_t bytes) const {
  for (size_t i = 0; i < extents_->size(); i++) {
    const ExtentConfig& extent = (*extents_)[i];
    if (extent.is_neurons || offset < extent.offset) continue;
    const size_t inside = offset - extent.offset;
    if (inside <= extent.bytes && bytes <= extent.bytes - inside) return base_ + places_[i] + inside;
  }
  return nullptr;
}

void TensorTaker::take(const std::string& name, size_t rows, size_t columns, bool needed, bool is_float, Matrix* matrix) {
  const Matrix* found = file_->find(name);
  if (found == nullptr) {
    if (needed && status_.is_ok()) status_ = Status::argument(name + ": missing");
    return;
  }
  if (found->rows != rows || found->columns != columns || is_float != (found->encoding == Encoding::kF32)) {
    if (status_.is_ok()) status_ = Status::argument(name + ": wrong shape or encoding");
    return;
  }
  *matrix = *found;
}

}  // namespace pi2
