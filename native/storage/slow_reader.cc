#include "native/storage/slow_reader.h"

#include <chrono>
#include <utility>

namespace pi2 {

SlowReader::SlowReader(std::unique_ptr<Reader> inner, std::string path, size_t delay_us)
    : inner_(std::move(inner)), path_(std::move(path)), delay_us_(delay_us), lane_([this] { serve(); }) {}

SlowReader::~SlowReader() {
  {
    const std::lock_guard<std::mutex> lock(lock_);
    stop_ = true;
  }
  work_.notify_all();
  lane_.join();
}

uint64_t SlowReader::submit(ReadRequest* requests, size_t count) {
  {
    const std::lock_guard<std::mutex> lock(lock_);
    for (size_t i = 0; i < count; i++) {
      requests[i].state.store(ReadRequest::kPending, std::memory_order_relaxed);
      waiting_.push_back(&requests[i]);
    }
  }
  work_.notify_all();
  return 0;
}

void SlowReader::serve() {
  while (true) {
    ReadRequest* request = nullptr;
    {
      std::unique_lock<std::mutex> lock(lock_);
      work_.wait(lock, [this] { return !waiting_.empty() || stop_; });
      if (stop_) return;
      request = waiting_.front();
      waiting_.pop_front();
    }
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us_));
    // The inner reader gets a request of its own: the caller's stays pending until the bytes are there.
    ReadRequest inner;
    inner.offset = request->offset;
    inner.bytes = request->bytes;
    inner.buffer = request->buffer;
    inner_->submit(&inner, 1);
    // The state says all that the words do.
    static_cast<void>(inner_->wait(inner));
    request->state.store(inner.state.load(std::memory_order_acquire), std::memory_order_release);
    request->state.notify_all();
  }
}

std::string SlowReader::description() const { return inner_->description() + ", slowed"; }

}  // namespace pi2
