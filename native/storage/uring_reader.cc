#include "native/storage/uring_reader.h"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "native/base/pause.h"
#include "native/base/trace.h"

namespace pi2 {
namespace {

/** Most reads under way at once. */
constexpr uint32_t kEntries = 256;
/** A wait looks this often, some 200 us, before it sleeps with the lock held: flash answers sooner. */
constexpr int kLooks = 1000;
/** Pauses between two looks. */
constexpr int kPauses = 8;

/** The kernel shares these words with us: what it writes is read with acquire, what we write is written with release. */
uint32_t load_acquire(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
void store_release(uint32_t* word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

}  // namespace

std::unique_ptr<UringReader> UringReader::create(int descriptor, std::string path, bool direct) {
  std::unique_ptr<UringReader> reader(new UringReader(descriptor, std::move(path), direct));
  if (reader->set_up()) return reader;
  return nullptr;
}

bool UringReader::set_up() {
  io_uring_params params;
  std::memset(&params, 0, sizeof params);
  ring_ = static_cast<int>(syscall(__NR_io_uring_setup, kEntries, &params));
  // Reads without vectors came in the same kernel as the second feature.
  constexpr uint32_t kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS;
  if (ring_ < 0 || (params.features & kNeeded) != kNeeded) return false;
  entries_ = params.sq_entries;
  rings_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                                  params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
  submissions_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
  rings_ = mmap(nullptr, rings_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, IORING_OFF_SQ_RING);
  void* entries =
      mmap(nullptr, submissions_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, IORING_OFF_SQES);
  if (rings_ == MAP_FAILED) rings_ = nullptr;
  submissions_ = entries == MAP_FAILED ? nullptr : static_cast<io_uring_sqe*>(entries);
  if (rings_ == nullptr || submissions_ == nullptr) return false;
  auto* base = static_cast<uint8_t*>(rings_);
  const auto word = [&](uint32_t offset) { return reinterpret_cast<uint32_t*>(base + offset); };
  sq_tail_ = word(params.sq_off.tail);
  sq_array_ = word(params.sq_off.array);
  sq_mask_ = *word(params.sq_off.ring_mask);
  cq_head_ = word(params.cq_off.head);
  cq_tail_ = word(params.cq_off.tail);
  cq_mask_ = *word(params.cq_off.ring_mask);
  completions_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
  return true;
}

UringReader::~UringReader() {
  {
    const std::lock_guard<std::mutex> lock(lock_);
    while (ring_ >= 0 && in_flight_ > 0) {
      if (reap() == 0) enter(0, true);
    }
  }
  if (rings_ != nullptr) munmap(rings_, rings_bytes_);
  if (submissions_ != nullptr) munmap(submissions_, submissions_bytes_);
  if (ring_ >= 0) close(ring_);
  close(descriptor_);
}

void UringReader::enter(uint32_t submitted, bool sleep) {
  while (true) {
    const long result =
        syscall(__NR_io_uring_enter, ring_, submitted, sleep ? 1u : 0u, sleep ? IORING_ENTER_GETEVENTS : 0u, nullptr, 0);
    if (result >= 0) {
      // The kernel may take some entries only; what is left would wait for ever.
      submitted -= std::min(submitted, static_cast<uint32_t>(result));
      if (submitted == 0) return;
    } else if (errno == EAGAIN || errno == EBUSY) {
      reap();
    } else if (errno != EINTR) {
      return;
    }
  }
}

uint64_t UringReader::submit(ReadRequest* requests, size_t count) {
  uint64_t waited_ns = 0;
  for (size_t done = 0; done < count;) {
    const std::lock_guard<std::mutex> lock(lock_);
    if (in_flight_ == entries_) {
      const uint64_t start = trace_now();
      while (in_flight_ == entries_) {
        if (reap() == 0) enter(0, true);
      }
      waited_ns += trace_now() - start;
    }
    uint32_t tail = *sq_tail_;
    uint32_t added = 0;
    for (; done < count && in_flight_ < entries_; done++, added++, in_flight_++, tail++) {
      ReadRequest& request = requests[done];
      request.state.store(ReadRequest::kPending, std::memory_order_relaxed);
      io_uring_sqe& entry = submissions_[tail & sq_mask_];
      std::memset(&entry, 0, sizeof entry);
      entry.opcode = IORING_OP_READ;
      entry.fd = descriptor_;
      entry.off = request.offset;
      entry.addr = reinterpret_cast<uint64_t>(request.buffer);
      entry.len = static_cast<uint32_t>(request.bytes);
      entry.user_data = reinterpret_cast<uint64_t>(&request);
      sq_array_[tail & sq_mask_] = tail & sq_mask_;
    }
    store_release(sq_tail_, tail);
    enter(added, false);
  }
  return waited_ns;
}

size_t UringReader::reap() {
  uint32_t head = *cq_head_;
  const uint32_t tail = load_acquire(cq_tail_);
  const size_t count = tail - head;
  for (; head != tail; head++) {
    const io_uring_cqe& completion = completions_[head & cq_mask_];
    finish(*reinterpret_cast<ReadRequest*>(completion.user_data), completion.res);
    in_flight_--;
  }
  store_release(cq_head_, head);
  return count;
}

void UringReader::finish(ReadRequest& request, int32_t result) {
  const uint32_t state = result < 0 ? ReadRequest::kFailed + static_cast<uint32_t>(-result)
                                    : read_rest(descriptor_, direct_, request, static_cast<size_t>(result));
  if (request.submitted_ns != 0) request.done_ns = trace_now();
  request.state.store(state, std::memory_order_release);
}

void UringReader::poll() {
  if (!lock_.try_lock()) return;
  reap();
  lock_.unlock();
}

Status UringReader::wait(ReadRequest& request) {
  for (int look = 0; look < kLooks; look++) {
    if (request.state.load(std::memory_order_acquire) != ReadRequest::kPending) break;
    poll();
    for (int i = 0; i < kPauses; i++) pause_cpu();
  }
  while (request.state.load(std::memory_order_acquire) == ReadRequest::kPending) {
    const std::lock_guard<std::mutex> lock(lock_);
    if (request.state.load(std::memory_order_acquire) != ReadRequest::kPending) break;
    if (reap() == 0) enter(0, true);
  }
  if (request.state.load(std::memory_order_acquire) == ReadRequest::kDone) return Status::ok();
  return read_failure(request, path_);
}

std::string UringReader::description() const { return std::string(direct_ ? "direct" : "buffered") + ", io_uring"; }

}  // namespace pi2
