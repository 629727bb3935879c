#include "native/base/threads.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace pi2 {

void run_in_ranges(size_t threads, size_t count, const std::function<void(size_t, size_t)>& work) {
  threads = std::max<size_t>(1, std::min(threads, count));
  const auto bound = [&](size_t i) { return count * i / threads; };
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  for (size_t i = 1; i < threads; i++) others.emplace_back([&, i] { work(bound(i), bound(i + 1)); });
  work(bound(0), bound(1));
  for (std::thread& thread : others) thread.join();
}

}  // namespace pi2
