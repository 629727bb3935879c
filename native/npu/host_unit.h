#pragma once
/**
 * A dense unit made of threads of this machine: the kernels of the engine over rows that are in memory anyway, in any
 * encoding, for any kind of FFN. There is nothing to load: a graph is a shape that was asked for.
 */
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "native/base/memory.h"
#include "native/base/thread_pool.h"
#include "native/engine/activations.h"
#include "native/engine/config.h"
#include "native/npu/dense_unit.h"

namespace pi2 {

/** Where the rows of a bank's hottest neurons are, one neuron behind another. */
struct HotRows {
  Rows first;         // gate rows; without a gate, up rows
  Rows up;            // only with a gate
  Rows down;          // down columns
  const float* bias;  // of the first rows, or null
};

class HostUnit : public DenseUnit {
 public:
  /** What `open` allocates. */
  static size_t bytes_needed(const EngineConfig& config);
  /**
   * `banks`: rows of at least the clusters that the configuration allows. Configuration, kernels and rows must outlive the
   * unit.
   */
  static Status open(const EngineConfig& config, const Kernels& kernels, std::vector<HotRows> banks,
                     std::unique_ptr<DenseUnit>* unit);
  ~HostUnit() override;

  std::string name() const override { return "host"; }
  void load(GraphShape shape) override;
  Status finish_loading() override { return std::exchange(load_status_, Status::ok()); }
  void unload(GraphShape shape) override;
  Status activate(GraphShape shape) override;
  GraphShape active() const override { return active_; }
  float* inputs() override { return inputs_; }
  const float* sums() const override { return sums_; }
  Status start(size_t bank, size_t tokens) override;
  Status finish() override;
  size_t bytes() const override { return memory_.bytes(); }
  uint64_t busy_ns() const override { return busy_ns_; }

 private:
  HostUnit(const EngineConfig& config, const Kernels& kernels, std::vector<HotRows> banks, size_t threads);
  /** Lays the buffers below over `memory` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* memory);
  bool is_loaded(GraphShape shape) const;
  void serve();
  void compute(const HotRows& rows, size_t tokens, size_t neurons);
  void activate_chunk(const HotRows& rows, size_t tokens, size_t first, size_t count, size_t thread);
  void sum_one(size_t neurons);
  void sum_batch(const HotRows& rows, size_t tokens, size_t neurons);

  const EngineConfig* config_;
  const Kernels* kernels_;
  std::vector<HotRows> banks_;
  std::vector<GraphShape> loaded_;
  Status load_status_;
  GraphShape active_;
  HugeMemory memory_;
  float* inputs_ = nullptr;      // (token, hidden)
  float* sums_ = nullptr;        // (token, hidden)
  float* tiles_ = nullptr;       // (thread, 2, token, chunk): products of a chunk's rows
  float* factors_ = nullptr;     // (neuron, token): what several tokens take of each column
  Column* columns_ = nullptr;    // (part, neuron of the part): of one token
  uint32_t* numbers_ = nullptr;  // (neuron): 0, 1, …
  float* part_sums_ = nullptr;   // (part, padded hidden): of one token
  float* tile_sums_ = nullptr;   // (thread, token of a tile, group)
  Activations x_;
  ThreadPool pool_;
  // What is to be computed: written before the ticket is released, read after it is acquired.
  size_t bank_ = 0;
  uint64_t busy_ns_ = 0;
  alignas(64) std::atomic<uint32_t> asked_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<bool> stop_{false};
  std::thread leader_;
};

}  // namespace pi2
