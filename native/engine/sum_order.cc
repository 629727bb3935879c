#include "native/engine/sum_order.h"

namespace pi2 {

Status SumOrder::bind(const EngineConfig& config, const TensorFile& resident) {
  neurons_ = config.neuron_count;
  if (config.order_offsets.empty()) return Status::ok();
  if (config.order_offsets.size() != config.expert_offsets.size()) {
    return Status::argument("orderOffsets must have one entry a layer and expert");
  }
  std::vector<bool> seen(neurons_);
  for (const size_t offset : config.order_offsets) {
    const uint8_t* bytes = resident.at(offset, neurons_ * sizeof(uint32_t));
    if (bytes == nullptr || offset % sizeof(uint32_t) != 0) {
      return Status::argument("the extents do not hold the heat orders");
    }
    const auto* numbers = reinterpret_cast<const uint32_t*>(bytes);
    seen.assign(neurons_, false);
    for (size_t i = 0; i < neurons_; i++) {
      if (numbers[i] >= neurons_ || seen[numbers[i]])
        return Status::argument("a heat order does not name every neuron once");
      seen[numbers[i]] = true;
    }
    orders_.push_back(numbers);
  }
  return Status::ok();
}

}  // namespace pi2
