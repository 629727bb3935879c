#pragma once
#include <cstddef>

#include "native/base/status.h"

namespace pi2 {

/** Where the parts of a neuron bundle lie in `neurons.bin`; docs/FORMAT.md section 4. Bytes. */
struct BundleLayout {
  size_t matrices = 0;
  size_t part1_bytes = 0;
  size_t part2_bytes = 0;
  size_t neurons_per_unit = 0;
  size_t unit_bytes = 0;
  size_t part1_stride = 0;
  size_t part2_offset = 0;
  size_t part2_stride = 0;

  /** From the first byte of an expert's bundles. */
  size_t part1_at(size_t neuron) const {
    return neuron / neurons_per_unit * unit_bytes + neuron % neurons_per_unit * part1_stride;
  }
  size_t part2_at(size_t neuron) const {
    return neuron / neurons_per_unit * unit_bytes + part2_offset + neuron % neurons_per_unit * part2_stride;
  }
  /** Bytes of an expert's bundles: whole units. */
  size_t bytes(size_t neurons) const { return (neurons + neurons_per_unit - 1) / neurons_per_unit * unit_bytes; }

  /** Whether both parts of every slot lie inside a unit, and no product of sizes can overflow. */
  Status check() const {
    constexpr size_t kLimit = size_t{1} << 31;
    const size_t fields[] = {part1_bytes,  part2_bytes,  neurons_per_unit, unit_bytes,
                             part1_stride, part2_offset, part2_stride};
    for (const size_t field : fields) {
      if (field == 0 || field > kLimit) return Status::argument("bundle layout: a size is zero or absurd");
    }
    if (matrices != 2 && matrices != 3) return Status::argument("bundle layout: matrices must be 2 or 3");
    if (neurons_per_unit > unit_bytes) return Status::argument("bundle layout: more neurons in a unit than bytes");
    if (part1_stride < part1_bytes || part2_stride < part2_bytes) {
      return Status::argument("bundle layout: the parts of neighbours overlap");
    }
    const size_t last = neurons_per_unit - 1;
    if (part1_stride > unit_bytes || part2_stride > unit_bytes || last * part1_stride + part1_bytes > unit_bytes ||
        part2_offset + last * part2_stride + part2_bytes > unit_bytes) {
      return Status::argument("bundle layout: a part reaches past its unit");
    }
    return Status::ok();
  }
};

}  // namespace pi2
