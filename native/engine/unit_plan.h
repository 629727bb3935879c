#pragma once
/** Whether a configuration's dense unit fits its model, and what it takes. */
#include "native/base/status.h"
#include "native/engine/config.h"

namespace pi2 {

/** Whether clusters, threads and schedule fit the model, and the hot region holds what the unit computes. */
Status check_unit(const EngineConfig& config);

/** Bytes that the unit will take, at most. */
size_t unit_bytes_needed(const EngineConfig& config);

}  // namespace pi2
