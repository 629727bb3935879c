#pragma once
/** What a step computes: tokens of one sequence or of several. */
#include <cstddef>
#include <cstdint>

namespace pi2 {

/** Tokens that follow each other in one sequence: `count` of them, at positions position, position + 1, ... */
struct Run {
  size_t sequence;
  size_t position;
  size_t count;
};

/** What is asked of the engine: tokens of all runs one behind another, each sequence in one run at most. */
struct StepInput {
  const int32_t* tokens;
  const Run* runs;
  size_t run_count;
  bool all = false;     // logits of every token, else of the last of each run
  bool exact = false;   // the predictor has no say
  bool prompt = false;  // the matrix unit may compute these tokens
};

/** Where a token stands. */
struct Place {
  size_t sequence;
  size_t position;
};

/** What a step writes down besides logits; null: nothing. */
struct FiringRecord {
  uint8_t* fired = nullptr;      // bits (token, layer, expert, neuron): fired_bytes_per_token() for each token
  uint8_t* routed = nullptr;     // bits (token, layer, expert): routed_bytes_per_token() for each token
  float* inputs = nullptr;       // (token, layer, hidden): what the FFN gets, normed or as it is in the residual stream
  bool residual_inputs = false;  // which of them
  float* activations = nullptr;  // (token, layer, used expert, neuron), before the routing weight; resident experts only
};

/**
 * What goes through the layers together: a step, or the part of it that fits a batch. A decode step has a token of each live
 * sequence, so its `tokens` is the live batch size.
 */
struct Step {
  size_t tokens;
  const Place* places;  // of each token
  bool exact;
  bool prompt;
  FiringRecord record;  // begins at the first token
};

}  // namespace pi2
