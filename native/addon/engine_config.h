#pragma once
#include "native/addon/arguments.h"
#include "native/engine/config.h"

namespace pi2 {

/** Reads an EngineRequest; whether it is one, `fields.status()` says. */
EngineConfig read_engine_config(Fields& fields);

/** Reads `clusters` of a UnitRequest. */
UnitConfig::Schedule read_unit_schedule(Fields& fields);

}  // namespace pi2
