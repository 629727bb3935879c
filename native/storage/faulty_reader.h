#pragma once
#include <memory>
#include <mutex>
#include <utility>

#include "native/storage/reader.h"

namespace pi2 {

/** Lets one read fail and one end early, and passes all others on: how an engine takes bad flash is tested with it. */
class FaultyReader : public Reader {
 public:
  FaultyReader(std::unique_ptr<Reader> inner, size_t fail_read, size_t short_read)
      : inner_(std::move(inner)), fail_read_(fail_read), short_read_(short_read) {}

  uint64_t submit(ReadRequest* requests, size_t count) override;
  Status wait(ReadRequest& request) override { return inner_->wait(request); }
  void poll() override { inner_->poll(); }
  std::string description() const override { return inner_->description(); }

 private:
  const std::unique_ptr<Reader> inner_;
  const size_t fail_read_;
  const size_t short_read_;
  std::mutex lock_;
  size_t submitted_ = 0;
};

}  // namespace pi2
