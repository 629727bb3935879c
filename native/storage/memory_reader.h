#pragma once
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "native/storage/reader.h"

namespace pi2 {

/** A file that is in memory: what readers promise, without a disk. For tests, alone or inside a slow or faulty reader. */
class MemoryReader : public Reader {
 public:
  /** `name` stands for the file's path in errors. */
  MemoryReader(std::vector<uint8_t> bytes, std::string name) : bytes_(std::move(bytes)), name_(std::move(name)) {}

  uint64_t submit(ReadRequest* requests, size_t count) override {
    for (size_t i = 0; i < count; i++) {
      ReadRequest& request = requests[i];
      const bool inside = request.offset <= bytes_.size() && request.bytes <= bytes_.size() - request.offset;
      if (inside) std::memcpy(request.buffer, bytes_.data() + request.offset, request.bytes);
      request.state.store(inside ? ReadRequest::kDone : ReadRequest::kFailed, std::memory_order_release);
    }
    return 0;
  }
  Status wait(ReadRequest& request) override { return wait_notified(request, name_); }
  std::string description() const override { return "memory"; }

 private:
  const std::vector<uint8_t> bytes_;
  const std::string name_;
};

}  // namespace pi2
