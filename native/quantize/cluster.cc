#include "native/quantize/cluster.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "native/base/threads.h"
#include "native/kernels/encoding.h"
#include "native/kernels/half.h"

namespace pi2 {
namespace {

/** Bytes of a block of 32 weights as MatMulNBits has it. */
constexpr size_t kPackedBlockBytes = kBlock / 2;
/** Two weights of value 0. */
constexpr uint8_t kTwoZeros = 0x88;

/** The nibbles of block `block` of an encoded vector, in natural order. */
void unpack_block(const uint8_t* weights, size_t block, uint8_t* out) {
  const uint8_t* group = weights + block / kGroupBlocks * kQ4GroupBytes + block % kGroupBlocks * 4;
  for (size_t e = 0; e < kBlock; e += 4) {
    const uint8_t* bytes = group + q4_byte(0, e);
    const int shift = q4_is_high(e) ? 4 : 0;
    for (size_t j = 0; j < 4; j++) out[e + j] = bytes[j] >> shift & 15;
  }
}

uint16_t half_at(const uint8_t* scales, size_t block) {
  uint16_t half;
  std::memcpy(&half, scales + 2 * block, 2);
  return half;
}

void store_scale(uint8_t* scales, size_t index, uint16_t half) {
  const float scale = half_to_float_scalar(half);
  std::memcpy(scales + 4 * index, &scale, 4);
}

/** A row of gate or up: `blocks` blocks of one neuron. */
void pack_row(const uint8_t* weights, const uint8_t* scales, size_t blocks, size_t row, const ClusterParts::Matrix& matrix,
              uint8_t* target) {
  uint8_t* out = target + matrix.weights + row * blocks * kPackedBlockBytes;
  for (size_t block = 0; block < blocks; block++) {
    uint8_t nibbles[kBlock];
    unpack_block(weights, block, nibbles);
    for (size_t i = 0; i < kPackedBlockBytes; i++) *out++ = static_cast<uint8_t>(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
    store_scale(target + matrix.scales, row * blocks + block, half_at(scales, block));
  }
}

/** The parts of one neuron's bundle. */
struct Bundle {
  const uint8_t* first;
  const uint8_t* scales;
  const uint8_t* rest;
};

class Packer {
 public:
  explicit Packer(const PackRequest& request)
      : r_(request),
        blocks_(request.parts.hidden_size / kBlock),
        weight_bytes_(weight_bytes(Encoding::kQ4, request.parts.hidden_size)),
        scale_bytes_(scale_bytes(Encoding::kQ4, request.parts.hidden_size)) {}

  /** Neurons from `first` of the request on, 32 at most; false if their Down has not one scale for all. */
  bool pack_tile(size_t first) const {
    const size_t count = first < r_.neurons ? std::min(kBlock, r_.neurons - first) : 0;
    for (size_t i = 0; i < count; i++) {
      const Bundle bundle = bundle_of(first + i);
      const size_t row = r_.first + first + i;
      const bool gated = r_.layout.matrices == 3;
      pack_row(bundle.first, bundle.scales, blocks_, row, gated ? r_.parts.gate : r_.parts.up, r_.target);
      if (gated) pack_row(bundle.rest, bundle.scales + scale_bytes_, blocks_, row, r_.parts.up, r_.target);
    }
    for (size_t i = count; i < kBlock; i++) pad_row(r_.first + first + i);
    return pack_down(first, count);
  }

 private:
  Bundle bundle_of(size_t i) const {
    const uint8_t* part1 = r_.units + r_.layout.part1_at(r_.slot + i);
    return {part1, part1 + weight_bytes_, r_.units + r_.layout.part2_at(r_.slot + i)};
  }

  /** A neuron that is none: weights of zero, whose scales the caller has left at zero. */
  void pad_row(size_t row) const {
    const size_t bytes = blocks_ * kPackedBlockBytes;
    if (r_.layout.matrices == 3) std::memset(r_.target + r_.parts.gate.weights + row * bytes, kTwoZeros, bytes);
    std::memset(r_.target + r_.parts.up.weights + row * bytes, kTwoZeros, bytes);
  }

  /** A tile's columns of Down: block (first + r_.first) / 32 of each of its rows. */
  bool pack_down(size_t first, size_t count) const {
    const size_t matrix = r_.layout.matrices - 1;
    const size_t neuron_blocks = r_.parts.neurons / kBlock;
    const size_t tile = (r_.first + first) / kBlock;
    for (size_t block = 0; block < blocks_; block++) {
      uint8_t nibbles[kBlock][kBlock];  // [neuron][hidden]
      std::memset(nibbles, 8, sizeof nibbles);
      uint16_t half = 0;
      for (size_t i = 0; i < count; i++) {
        const Bundle bundle = bundle_of(first + i);
        const uint16_t own = half_at(bundle.scales + matrix * scale_bytes_, block);
        if (i > 0 && own != half) return false;
        half = own;
        unpack_block(bundle.rest + (matrix - 1) * weight_bytes_, block, nibbles[i]);
      }
      for (size_t e = 0; e < kBlock; e++) {
        const size_t at = (block * kBlock + e) * neuron_blocks + tile;
        uint8_t* out = r_.target + r_.parts.down.weights + at * kPackedBlockBytes;
        for (size_t i = 0; i < kPackedBlockBytes; i++) {
          out[i] = static_cast<uint8_t>(nibbles[2 * i][e] | nibbles[2 * i + 1][e] << 4);
        }
        store_scale(r_.target + r_.parts.down.scales, at, half);
      }
    }
    return true;
  }

  const PackRequest& r_;
  const size_t blocks_;
  const size_t weight_bytes_;
  const size_t scale_bytes_;
};

}  // namespace

Status ClusterParts::check(size_t matrices) const {
  constexpr size_t kLimit = size_t{1} << 40;
  if (neurons == 0 || neurons % kBlock != 0 || hidden_size == 0 || hidden_size % kBlock != 0 ||
      neurons > kLimit / hidden_size) {
    return Status::argument("cluster: neurons and hidden size must be multiples of 32");
  }
  const size_t block_count = neurons * (hidden_size / kBlock);
  const Matrix unused{};
  for (const Matrix& matrix : {matrices == 3 ? gate : unused, up, down}) {
    if (matrix.weights > kLimit || matrix.scales > kLimit || matrix.weights + kPackedBlockBytes * block_count > bytes ||
        matrix.scales + 4 * block_count > bytes) {
      return Status::argument("cluster: a matrix reaches past its end");
    }
  }
  return Status::ok();
}

Status pack_cluster(const PackRequest& request) {
  const Packer packer(request);
  std::atomic<size_t> wrong{SIZE_MAX};
  run_in_ranges(request.threads, request.padded_neurons / kBlock, [&](size_t begin, size_t end) {
    for (size_t tile = begin; tile < end; tile++) {
      if (!packer.pack_tile(tile * kBlock)) wrong = tile;
    }
  });
  if (wrong == SIZE_MAX) return Status::ok();
  return Status::argument("Down is not in tiles: neurons from " + std::to_string(request.first + wrong * kBlock) +
                          " of the cluster on have different scales");
}

}  // namespace pi2
