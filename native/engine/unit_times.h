#pragma once
/** What a dense unit and the CPU take for the same neurons, measured when a model opens with a unit: the hot ratio is chosen
 * by it. */
#include <array>
#include <vector>

#include "native/base/thread_pool.h"
#include "native/engine/predictor.h"
#include "native/npu/host_unit.h"

namespace pi2 {

/** Nanoseconds. */
struct UnitTimes {
  /** Numbers of tokens that have graphs: 1 to kSmallBatches, and a chunk. */
  static constexpr size_t kGraphs = kSmallBatches + 1;
  /** Of one neuron of a job: to find out whether it fires, and what it takes beyond that if it does. */
  struct Cpu {
    double look_ns = 0;
    double fire_ns = 0;
  };

  /** (clusters - 1): of a job; empty where the engine never computes so many tokens together. */
  std::array<std::vector<double>, kGraphs> unit;
  /** With all threads, and with those that are left beside the unit. */
  std::array<Cpu, kGraphs> alone;
  std::array<Cpu, kGraphs> beside;
};

/**
 * Measures all of it on rows that are in memory, in some tens of milliseconds. A few clusters stand for all: the unit takes
 * as much again for each. `predictor` is null where every gate is computed. Before the first step; loads and unloads graphs.
 */
Status measure_unit_times(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool,
                          const std::vector<HotRows>& banks, const std::vector<LayerWeights>& layers, Predictor* predictor,
                          DenseUnit& unit, UnitTimes* times);

}  // namespace pi2
