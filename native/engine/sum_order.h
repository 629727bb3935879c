#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native/engine/config.h"
#include "native/engine/neurons.h"
#include "native/engine/tensor_file.h"

namespace pi2 {

/**
 * In which order down columns are summed up: that of the checkpoint, cut into parts (neurons.h), whatever order neurons lie
 * in on flash. So two heat orders of one checkpoint give the same bits.
 *
 * Neurons that fire are placed by their number in the checkpoint, from any thread and in any order; then each part is read
 * out from its first number to its last.
 */
class SumOrder {
 public:
  /** A neuron that fires: what the output gets of its column, and where its owner finds the column. */
  struct Placed {
    float factor;  // not 0, else nothing is here
    uint32_t where;
  };

  /** Finds heat orders in resident.bin; fails if one is no permutation. Without any, bundles are in checkpoint order. */
  Status bind(const EngineConfig& config, const TensorFile& resident);
  /** `places`: room for the neurons of a bank. */
  void use(Placed* places) { places_ = places; }

  /** Nothing is placed any more. */
  void begin(size_t bank) {
    std::memset(places_, 0, neurons_ * sizeof(Placed));
    numbers_ = orders_.empty() ? nullptr : orders_[bank];
  }
  /** The number in the checkpoint of bundle `neuron` of the bank. */
  size_t number(size_t neuron) const { return numbers_ == nullptr ? neuron : numbers_[neuron]; }
  /** Bundle `neuron` of the bank fires. */
  void place(size_t neuron, float factor, size_t where) const {
    places_[number(neuron)] = {factor, static_cast<uint32_t>(where)};
  }
  /** Calls visit(placed) for what is placed in a part, in order. */
  template <class Visit>
  void for_part(size_t part, const Visit& visit) const {
    for (size_t first = part * kNeuronChunk; first < neurons_; first += kParts * kNeuronChunk) {
      const size_t end = first + kNeuronChunk < neurons_ ? first + kNeuronChunk : neurons_;
      for (size_t number = first; number < end; number++) {
        if (places_[number].factor != 0.0f) visit(places_[number]);
      }
    }
  }

 private:
  size_t neurons_ = 0;
  std::vector<const uint32_t*> orders_;  // (bank): number in the checkpoint of each bundle
  const uint32_t* numbers_ = nullptr;    // of the present bank
  Placed* places_ = nullptr;
};

}  // namespace pi2
