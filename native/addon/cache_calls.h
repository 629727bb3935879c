#pragma once
#include <napi.h>

#include <vector>

#include "native/addon/arguments.h"
#include "native/cache/neuron_cache.h"

namespace pi2 {

/** The plans of banks with so many `resident_gates`, hotNeurons and coldSlots; fails `fields` if they are not sizes. */
std::vector<BankPlan> read_bank_plans(Fields& fields, const std::vector<double>& resident_gates);

/** firingRates of a request, or nothing; fails `fields` if one is no share. */
std::vector<float> read_firing_rates(Fields& fields);

/** replayCache of src/engine/contract.ts. */
void export_cache_calls(Napi::Env env, Napi::Object exports);

}  // namespace pi2
