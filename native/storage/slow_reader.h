#pragma once
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "native/storage/reader.h"

namespace pi2 {

/** A flash with one lane that takes its time: each read is passed on when the one before it is done and the delay is over.
 */
class SlowReader : public Reader {
 public:
  SlowReader(std::unique_ptr<Reader> inner, std::string path, size_t delay_us);
  ~SlowReader() override;

  uint64_t submit(ReadRequest* requests, size_t count) override;
  Status wait(ReadRequest& request) override { return wait_notified(request, path_); }
  std::string description() const override;

 private:
  void serve();

  const std::unique_ptr<Reader> inner_;
  const std::string path_;
  const size_t delay_us_;
  std::mutex lock_;
  std::condition_variable work_;
  std::deque<ReadRequest*> waiting_;
  bool stop_ = false;
  std::thread lane_;
};

}  // namespace pi2
