/**
 * Readers hammered by several waiting threads: every byte must be the file's, whatever the backend, mode and trouble. Built
 * and run by test/43-streamed.ts under sanitizers; the argument is a scratch file to write. Prints "N checks, 0 failed".
 */
#include "native/storage/reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "native/base/memory.h"
#include "native/storage/faulty_reader.h"
#include "native/storage/memory_reader.h"
#include "native/storage/slow_reader.h"

namespace pi2 {
namespace {

constexpr size_t kFilePages = 700;
constexpr size_t kMostReads = 90;
constexpr size_t kMostPages = 9;
constexpr size_t kWaiters = 3;

std::atomic<size_t> checks{0};
std::atomic<size_t> failures{0};

void expect(bool holds, const char* what, const std::string& reader) {
  checks++;
  if (holds) return;
  failures++;
  std::printf("FAILED: %s (%s)\n", what, reader.c_str());
}

uint32_t word_at(size_t offset) { return static_cast<uint32_t>(offset * 2654435761u); }

std::vector<uint32_t> file_words() {
  std::vector<uint32_t> words(kFilePages * kPageBytes / 4);
  for (size_t i = 0; i < words.size(); i++) words[i] = word_at(4 * i);
  return words;
}

bool write_file(const char* path) {
  const std::vector<uint32_t> words = file_words();
  const int file = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
  const bool whole = write(file, words.data(), 4 * words.size()) == static_cast<ssize_t>(4 * words.size());
  return close(file) == 0 && whole;
}

bool right_bytes(const ReadRequest& request) {
  for (size_t i = 0; i < request.bytes; i += 4) {
    uint32_t word;
    std::memcpy(&word, request.buffer + i, 4);
    if (word != word_at(request.offset + i)) return false;
  }
  return true;
}

/** Submits `rounds` times, as the engine does: one thread submits, then several wait for whatever they need first. */
void hammer(Reader& reader, const std::string& name, size_t rounds, size_t failing_read) {
  std::mt19937 random(7);
  const auto below = [&](size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(random); };
  HugeMemory memory;
  if (!memory.allocate(kMostReads * kMostPages * kPageBytes, "buffers").is_ok()) return expect(false, "memory", name);
  std::vector<ReadRequest> requests(kMostReads);
  size_t submitted = 0;
  for (size_t round = 0; round < rounds; round++) {
    const size_t count = below(kMostReads) + 1;
    for (size_t i = 0; i < count; i++) {
      const size_t pages = below(kMostPages) + 1;
      requests[i].offset = below(kFilePages - pages + 1) * kPageBytes;
      requests[i].bytes = pages * kPageBytes;
      requests[i].buffer = memory.data() + i * kMostPages * kPageBytes;
      std::memset(requests[i].buffer, 0, requests[i].bytes);
    }
    reader.submit(requests.data(), count);
    std::vector<std::thread> waiters;
    for (size_t waiter = 0; waiter < kWaiters; waiter++) {
      waiters.emplace_back([&, waiter] {
        for (size_t k = 0; k < count; k++) {
          // Each begins elsewhere, and all meet.
          const size_t i = (k + waiter * count / kWaiters) % count;
          const Status status = reader.wait(requests[i]);
          const bool fails = submitted + i + 1 == failing_read;
          expect(status.is_ok() != fails, "fails if and only if it was to", name);
          if (!fails) expect(right_bytes(requests[i]), "the file's bytes", name);
        }
      });
    }
    for (std::thread& waiter : waiters) waiter.join();
    submitted += count;
  }
}

/** Reads at and over the end of the file say so and leave the reader usable. */
void read_past_end(Reader& reader, const std::string& name) {
  HugeMemory memory;
  if (!memory.allocate(4 * kPageBytes, "buffers").is_ok()) return expect(false, "memory", name);
  ReadRequest request;
  request.offset = (kFilePages - 1) * kPageBytes;
  request.bytes = 4 * kPageBytes;
  request.buffer = memory.data();
  reader.submit(&request, 1);
  const Status status = reader.wait(request);
  expect(status.code() == StatusCode::kIo && status.message().find("the file ends") == 0, "the end is said", name);
  request.bytes = kPageBytes;
  reader.submit(&request, 1);
  expect(reader.wait(request).is_ok() && right_bytes(request), "usable afterwards", name);
}

void run(const char* path) {
  for (const ReadMode mode : {ReadMode::kDirect, ReadMode::kBuffered}) {
    for (const ReadBackend backend : {ReadBackend::kThreads, ReadBackend::kUring}) {
      for (const ReaderTrial trial : {ReaderTrial{}, ReaderTrial{50, 0, 0}, ReaderTrial{0, 33, 20}}) {
        std::unique_ptr<Reader> reader;
        const Status status = open_reader(path, mode, backend, 3, trial, &reader);
        expect(status.is_ok(), "opens", path);
        if (!status.is_ok()) return;
        hammer(*reader, reader->description(), trial.delay_us > 0 ? 8 : 16, trial.fail_read + trial.short_read);
        read_past_end(*reader, reader->description());
      }
    }
  }
}

/** The same promises of a file in memory, by itself and behind the readers that slow it down and let it fail. */
void run_in_memory() {
  const auto memory = [] {
    const std::vector<uint32_t> words = file_words();
    const auto* bytes = reinterpret_cast<const uint8_t*>(words.data());
    return std::make_unique<MemoryReader>(std::vector<uint8_t>(bytes, bytes + 4 * words.size()), "memory");
  };
  hammer(*memory(), "memory", 16, 0);
  read_past_end(*memory(), "memory");
  SlowReader slow(memory(), "memory", 20);
  hammer(slow, "memory, slow", 4, 0);
  read_past_end(slow, "memory, slow");
  FaultyReader failing(memory(), 50, 0);
  hammer(failing, "memory, failing", 16, 50);
  FaultyReader ending(memory(), 0, 33);
  hammer(ending, "memory, ending early", 16, 33);
}

}  // namespace
}  // namespace pi2

int main(int count, char** arguments) {
  if (count != 2 || !pi2::write_file(arguments[1])) {
    std::printf("cannot write the scratch file\n");
    return 1;
  }
  pi2::run(arguments[1]);
  pi2::run_in_memory();
  std::printf("%zu checks, %zu failed\n", pi2::checks.load(), pi2::failures.load());
  return pi2::failures.load() == 0 ? 0 : 1;
}
