#pragma once
#include <cstdint>
#include <string>

#include "native/base/status.h"

namespace pi2 {

/** What the page cache has of a file. */
struct PageCacheShare {
  /** Whole pages, so up to a page more than the file. */
  uint64_t bytes = 0;
  /** False where the kernel does not tell: it does for files that the process owns or may write. */
  bool is_known = false;
};

/** Asks the kernel how much of a file is in its page cache; the question brings nothing in. Fails with io. */
Status page_cache_share(const std::string& path, PageCacheShare* share);

}  // namespace pi2
