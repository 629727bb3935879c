#include "native/storage/bandwidth.h"

#include <chrono>
#include <memory>
#include <random>

#include "native/base/memory.h"
#include "native/storage/file.h"
#include "native/storage/reader.h"

namespace pi2 {

Status measure_flash_bandwidth(const std::string& path, const FlashProbe& probe, double* bytes_per_second,
                               std::string* how) {
  File file;
  Status status = file.open(path);
  if (!status.is_ok()) return status;
  const size_t blocks = file.size() / probe.block_bytes;
  if (blocks == 0) return Status::argument(path + " is smaller than one read");
  HugeMemory memory;
  status = memory.allocate(probe.lanes * probe.block_bytes, "the flash test");
  if (!status.is_ok()) return status;
  std::unique_ptr<Reader> reader;
  status = open_reader(path, ReadMode::kDirect, ReadBackend::kUring, probe.lanes, {}, &reader);
  if (!status.is_ok()) return status;
  *how = reader->description();

  std::mt19937_64 random(1);
  size_t next = 0;
  const std::unique_ptr<ReadRequest[]> requests(new ReadRequest[probe.lanes]);
  const auto start_read = [&](size_t lane) {
    ReadRequest& request = requests[lane];
    request.offset = (probe.random ? random() % blocks : next++ % blocks) * probe.block_bytes;
    request.bytes = probe.block_bytes;
    request.buffer = memory.data() + lane * probe.block_bytes;
    request.state.store(ReadRequest::kPending, std::memory_order_relaxed);
    reader->submit(&request, 1);
  };
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  for (size_t lane = 0; lane < probe.lanes; lane++) start_read(lane);
  size_t done = 0;
  bool stopping = false;
  // Lanes in turn: the oldest read is waited for. After the time, or a failure, those under way end; all of them count.
  for (size_t lane = 0, under_way = probe.lanes; under_way > 0; lane = (lane + 1) % probe.lanes) {
    const Status read = reader->wait(requests[lane]);
    if (!read.is_ok()) status = read;
    done++;
    stopping = stopping || !status.is_ok() || elapsed() >= probe.seconds;
    if (stopping) {
      under_way--;
    } else {
      start_read(lane);
    }
  }
  *bytes_per_second = static_cast<double>(done * probe.block_bytes) / elapsed();
  return status;
}

}  // namespace pi2
