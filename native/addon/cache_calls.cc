#include "native/addon/cache_calls.h"

#include <memory>

#include "native/addon/task.h"
#include "native/cache/replay.h"

namespace pi2 {
namespace {

constexpr size_t kMostBanks = size_t{1} << 20;
constexpr size_t kMostNeurons = size_t{1} << 24;

Napi::Value replay_cache_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  NeuronTrace trace;
  trace.tokens = fields.size("tokens");
  trace.layers = fields.size("layerCount");
  trace.experts = fields.size("expertCount");
  trace.neurons = fields.size("neuronCount");
  const Napi::Uint8Array fired = fields.bytes("fired");
  const Napi::Uint8Array routed = fields.bytes("routed");
  trace.fired = fired.Data();
  trace.routed = routed.Data();
  const size_t count_from = fields.size("countFrom");
  const std::vector<double> gates(fields.numbers("hotNeurons").size(), static_cast<double>(trace.neurons));
  const std::vector<BankPlan> plans = read_bank_plans(fields, gates);
  const std::vector<float> rates = read_firing_rates(fields);
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());

  const bool possible = trace.layers > 0 && trace.experts > 0 && trace.neurons > 0 && trace.layers <= kMostBanks &&
                        trace.experts <= kMostBanks / trace.layers && trace.neurons <= kMostNeurons;
  if (!possible || plans.size() != trace.banks() || (!rates.empty() && rates.size() != plans.size() * trace.neurons)) {
    return Task::refuse(env, Status::argument("plans and rates do not fit the shape of the trace"));
  }
  if (trace.tokens > fired.ByteLength() / trace.fired_bytes_per_token() ||
      trace.tokens > routed.ByteLength() / trace.routed_bytes_per_token()) {
    return Task::refuse(env, Status::argument("the trace is shorter than its tokens"));
  }
  for (const BankPlan& plan : plans) {
    if (plan.hot_neurons > trace.neurons || plan.cold_slots > trace.neurons) {
      return Task::refuse(env, Status::argument("a bank's plan does not fit the trace"));
    }
  }
  auto counters = std::make_shared<ReplayCounters>();
  return Task::run(
      env, {fired, routed},
      [trace, plans, rates, count_from, counters] { return replay(trace, plans, rates, count_from, counters.get()); },
      [counters](Napi::Env e) {
        Napi::Object object = Napi::Object::New(e);
        object.Set("hotHits", Napi::Number::New(e, static_cast<double>(counters->hot_hits)));
        object.Set("coldHits", Napi::Number::New(e, static_cast<double>(counters->cold_hits)));
        object.Set("misses", Napi::Number::New(e, static_cast<double>(counters->misses)));
        return object;
      });
}

}  // namespace

std::vector<BankPlan> read_bank_plans(Fields& fields, const std::vector<double>& resident_gates) {
  const std::vector<double> hot = fields.numbers("hotNeurons");
  const std::vector<double> cold = fields.numbers("coldSlots");
  std::vector<BankPlan> plans;
  const auto size = [&](double value) {
    if (!(value >= 0 && value <= 1e9)) fields.fail("residentGates, hotNeurons and coldSlots must be sizes");
    return value >= 0 && value <= 1e9 ? static_cast<size_t>(value) : 0;
  };
  if (resident_gates.empty() || resident_gates.size() != hot.size() || resident_gates.size() != cold.size()) {
    fields.fail("residentGates, hotNeurons and coldSlots must have one entry a layer and expert");
    return plans;
  }
  for (size_t i = 0; i < hot.size(); i++) plans.push_back({size(resident_gates[i]), size(hot[i]), size(cold[i])});
  return plans;
}

std::vector<float> read_firing_rates(Fields& fields) {
  if (!fields.has("firingRates")) return {};
  std::vector<float> rates = fields.floats("firingRates");
  for (const float rate : rates) {
    if (!(rate >= 0.0f && rate <= 1.0f)) fields.fail("firingRates must be shares");
  }
  return rates;
}

void export_cache_calls(Napi::Env env, Napi::Object exports) {
  exports.Set("replayCache", Napi::Function::New(env, replay_cache_call));
}

}  // namespace pi2
