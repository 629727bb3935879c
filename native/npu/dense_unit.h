#pragma once
/**
 * A dense unit computes the hottest neurons of a bank for a few tokens at once, all of them, whether they fire or not
 * (paper sections 1.3 and 1.4): an NPU, or threads of the host. It runs static graphs: the shape of everything is fixed
 * when a graph is made. docs/DENSE_UNIT.md has the whole story.
 *
 * A unit may live in another process, behind shared memory: what goes in and out goes through the window, graphs are named
 * by their shape, and no pointer crosses.
 *
 * Threads: one caller at a time. Between `start` and `finish` the unit computes on threads of its own.
 */
#include <cstddef>
#include <cstdint>
#include <string>

#include "native/base/status.h"

namespace pi2 {

/** What a graph is made for: so many tokens, and the first `clusters` clusters of a bank's heat order. */
struct GraphShape {
  size_t tokens = 0;
  size_t clusters = 0;

  friend bool operator==(const GraphShape&, const GraphShape&) = default;
};

class DenseUnit {
 public:
  virtual ~DenseUnit() = default;

  /** For people: `host`, or `onnxruntime 1.24.3, cpu`. */
  virtual std::string name() const = 0;

  /**
   * Begins to load this shape's graphs, one for each bank, and returns; the unit's threads go on with it. A shape that is
   * loaded or on its way is left alone.
   */
  virtual void load(GraphShape shape) = 0;
  /** Waits until everything that was begun is loaded. The first failure, in words. */
  virtual Status finish_loading() = 0;
  /** Gives the memory of this shape's graphs back. Not the active one. */
  virtual void unload(GraphShape shape) = 0;
  /**
   * Makes a loaded shape the one that `start` runs; between a `finish` and the next `start`. Never waits: a shape that is
   * not loaded is refused, and the one before stays active.
   */
  virtual Status activate(GraphShape shape) = 0;
  virtual GraphShape active() const = 0;

  /** The memory window: inputs (token, hidden), to be filled before `start`, and sums (token, hidden), there after `finish`.
   */
  virtual float* inputs() = 0;
  virtual const float* sums() const = 0;

  /**
   * Begins sums[t] = FFN of the active shape's clusters of bank `bank` for inputs[t], for exactly `tokens` tokens, before
   * any routing weight and bias of Down. Tokens that are not the active shape's are refused: a graph of the wrong shape is
   * never run.
   */
  virtual Status start(size_t bank, size_t tokens) = 0;
  /** Waits for what `start` began. */
  virtual Status finish() = 0;

  /** Bytes that the unit holds beside the engine's own. */
  virtual size_t bytes() const = 0;
  /** Time that it computed since it was opened; 0 where that is not known. Between `finish` and `start`. */
  virtual uint64_t busy_ns() const { return 0; }
};

}  // namespace pi2
