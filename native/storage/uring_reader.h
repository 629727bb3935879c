#pragma once
#include <mutex>

#include "native/storage/reader.h"

struct io_uring_sqe;
struct io_uring_cqe;

namespace pi2 {

/**
 * io_uring by raw system calls: half the CPU time a read of the thread pool costs. Whoever waits reaps for everybody, under
 * a lock that is free between two looks: others submit meanwhile. Who has looked for long sleeps in the kernel.
 */
class UringReader : public Reader {
 public:
  /** Takes ownership of `descriptor`. Null if the kernel has no io_uring or forbids it. */
  static std::unique_ptr<UringReader> create(int descriptor, std::string path, bool direct);
  ~UringReader() override;

  uint64_t submit(ReadRequest* requests, size_t count) override;
  Status wait(ReadRequest& request) override;
  void poll() override;
  std::string description() const override;

 private:
  UringReader(int descriptor, std::string path, bool direct)
      : descriptor_(descriptor), path_(std::move(path)), direct_(direct) {}
  bool set_up();
  /** Hands out what the completion queue holds; returns how many. Under the lock. */
  size_t reap();
  /** Tells the kernel of new entries and, if asked, sleeps until one completion. */
  void enter(uint32_t submitted, bool sleep);
  /** Continues a read that came back shorter than asked, as the kernel may. Under the lock. */
  void finish(ReadRequest& request, int32_t result);

  const int descriptor_;
  const std::string path_;
  const bool direct_;
  int ring_ = -1;
  std::mutex lock_;
  uint32_t in_flight_ = 0;
  uint32_t entries_ = 0;
  void* rings_ = nullptr;
  size_t rings_bytes_ = 0;
  io_uring_sqe* submissions_ = nullptr;
  size_t submissions_bytes_ = 0;
  uint32_t* sq_tail_ = nullptr;
  uint32_t* sq_array_ = nullptr;
  uint32_t sq_mask_ = 0;
  uint32_t* cq_head_ = nullptr;
  uint32_t* cq_tail_ = nullptr;
  uint32_t cq_mask_ = 0;
  io_uring_cqe* completions_ = nullptr;
};

}  // namespace pi2
