#pragma once
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "native/storage/reader.h"

namespace pi2 {

/**
 * A few threads that call pread: works everywhere. Requests wait in a ring guarded by one lock, taken once for a submission
 * and once for a read of at least a page.
 */
class ThreadsReader : public Reader {
 public:
  /** Takes ownership of `descriptor`. */
  ThreadsReader(int descriptor, std::string path, bool direct, size_t lanes);
  ~ThreadsReader() override;

  uint64_t submit(ReadRequest* requests, size_t count) override;
  Status wait(ReadRequest& request) override { return wait_notified(request, path_); }
  std::string description() const override;

 private:
  void serve();

  const int descriptor_;
  const std::string path_;
  const bool direct_;
  std::mutex lock_;
  std::condition_variable work_;
  std::vector<ReadRequest*> ring_;
  size_t first_ = 0;
  size_t waiting_ = 0;
  bool stop_ = false;
  std::vector<std::thread> lanes_;
};

}  // namespace pi2
