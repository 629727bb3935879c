#include "native/storage/threads_reader.h"

#include <unistd.h>

#include "native/base/trace.h"

namespace pi2 {
namespace {

/** Requests that may wait at once; a submission beyond it waits for room. */
constexpr size_t kRingSize = 4096;
}  // namespace

ThreadsReader::ThreadsReader(int descriptor, std::string path, bool direct, size_t lanes)
    : descriptor_(descriptor), path_(std::move(path)), direct_(direct), ring_(kRingSize) {
  for (size_t i = 0; i < lanes; i++) lanes_.emplace_back([this] { serve(); });
}

ThreadsReader::~ThreadsReader() {
  {
    const std::lock_guard<std::mutex> lock(lock_);
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& lane : lanes_) lane.join();
  close(descriptor_);
}

uint64_t ThreadsReader::submit(ReadRequest* requests, size_t count) {
  uint64_t waited_ns = 0;
  for (size_t done = 0; done < count;) {
    {
      const std::lock_guard<std::mutex> lock(lock_);
      for (; done < count && waiting_ < kRingSize; done++, waiting_++) {
        requests[done].state.store(ReadRequest::kPending, std::memory_order_relaxed);
        ring_[(first_ + waiting_) % kRingSize] = &requests[done];
      }
    }
    work_.notify_all();
    if (done == count) break;
    const uint64_t start = trace_now();
    std::this_thread::yield();
    waited_ns += trace_now() - start;
  }
  return waited_ns;
}

void ThreadsReader::serve() {
  while (true) {
    ReadRequest* request = nullptr;
    {
      std::unique_lock<std::mutex> lock(lock_);
      work_.wait(lock, [this] { return waiting_ > 0 || stop_; });
      if (stop_) return;
      request = ring_[first_];
      first_ = (first_ + 1) % kRingSize;
      waiting_--;
    }
    const uint32_t state = read_rest(descriptor_, direct_, *request, 0);
    if (request->submitted_ns != 0) request->done_ns = trace_now();
    // Release: whoever sees the state sees the bytes.
    request->state.store(state, std::memory_order_release);
    request->state.notify_all();
  }
}

std::string ThreadsReader::description() const {
  return std::string(direct_ ? "direct" : "buffered") + ", " + std::to_string(lanes_.size()) + " threads";
}

}  // namespace pi2
