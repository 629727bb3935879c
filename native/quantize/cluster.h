#pragma once
/**
 * Weights of a dense unit (docs/FORMAT.md section 7) out of neuron bundles: the very same numbers, in the order that ONNX
 * Runtime's MatMulNBits has them. A matrix of N rows and K columns (a multiple of 32) is N x K/32 blocks of 16 bytes, low
 * nibble first, a weight being (nibble - 8) * scale; and N x K/32 scales, as float.
 */
#include <cstddef>
#include <cstdint>

#include "native/base/status.h"
#include "native/engine/bundle_layout.h"

namespace pi2 {

/** Where the matrices of a cluster begin in its bytes. Without a gate up is the first, and `gate` is not looked at. */
struct ClusterParts {
  struct Matrix {
    size_t weights = 0;
    size_t scales = 0;
  };
  /** gate and up: `neurons` rows of `hidden_size` columns. down: the other way round. */
  Matrix gate, up, down;
  /** Of the cluster, padding included: a multiple of 32. */
  size_t neurons = 0;
  size_t hidden_size = 0;
  /** Of all of it. */
  size_t bytes = 0;

  /** Whether all matrices lie inside `bytes`. */
  Status check(size_t matrices) const;
};

/** Neurons of a cluster, from number `first` of it on (a multiple of 32). */
struct PackRequest {
  /** q4 bundles, from the beginning of a unit; the first neuron is in slot `slot`. */
  const uint8_t* units;
  BundleLayout layout;
  size_t slot;
  size_t neurons;
  /** `neurons`, and zeros behind them: those of the last tile are padded to 32, or further. */
  size_t padded_neurons;
  ClusterParts parts;
  size_t first;
  /** The cluster's bytes. */
  uint8_t* target;
  size_t threads;
};

/**
 * Packs neurons. Down's scales must be those of tiles (`encode_tiles`): an error if a tile's neurons differ. The caller has
 * checked that units and target are large enough.
 */
Status pack_cluster(const PackRequest& request);

}  // namespace pi2
