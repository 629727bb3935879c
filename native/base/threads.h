#pragma once
#include <cstddef>
#include <functional>

namespace pi2 {

/**
 * Cuts [0, count) into one contiguous range a thread and runs `work(begin, end)` on each; returns when all are done. For
 * long work (milliseconds and more): threads are made and joined here. The token loop uses ThreadPool instead.
 */
void run_in_ranges(size_t threads, size_t count, const std::function<void(size_t begin, size_t end)>& work);

}  // namespace pi2
