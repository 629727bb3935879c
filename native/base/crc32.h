#pragma once
#include <cstddef>
#include <cstdint>

namespace pi2 {

/** CRC-32 (IEEE 802.3, reflected, as zlib's `crc32`) of `size` bytes, continuing from `seed` (0 at first). */
uint32_t crc32(const uint8_t* bytes, size_t size, uint32_t seed);

}  // namespace pi2
