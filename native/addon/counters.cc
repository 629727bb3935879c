#include "native/addon/counters.h"

#include <sys/resource.h>

#include "native/engine/streamed_experts.h"

namespace pi2 {

Napi::Object counters_object(Napi::Env env, const Engine& engine) {
  const EngineCounters c = engine.counters();
  Napi::Object object = Napi::Object::New(env);
  const auto set_in = [&](Napi::Object& target, const char* name, uint64_t value) {
    target.Set(name, Napi::Number::New(env, static_cast<double>(value)));
  };
  const auto set = [&](const char* name, uint64_t value) { set_in(object, name, value); };
  set("tokens", c.tokens);
  set("weightBytesRead", c.weight_bytes_read);
  set("kvBytesRead", c.kv_bytes_read);
  set("neuronsFired", c.neurons_fired);
  set("neuronsSeen", c.neurons_seen);
  set("weightBytes", c.weight_bytes);
  set("kvBytes", c.kv_bytes);
  set("scratchBytes", c.scratch_bytes);
  set("unitBytes", c.unit_bytes);
  rusage usage;
  set("majorFaults", getrusage(RUSAGE_SELF, &usage) == 0 ? static_cast<uint64_t>(usage.ru_majflt) : 0);
  if (const Predictor* predictor = engine.predictor()) {
    const PredictorCounters p = predictor->counters();
    Napi::Object guesses = Napi::Object::New(env);
    set_in(guesses, "ns", p.ns);
    set_in(guesses, "weightBytesRead", p.weight_bytes_read);
    set_in(guesses, "scored", p.scored);
    set_in(guesses, "chosen", p.chosen);
    set_in(guesses, "skippedOnFlash", p.skipped_on_flash);
    object.Set("predictor", guesses);
  }
  if (const HybridExperts* hybrid = engine.hybrid()) {
    const UnitCounters u = hybrid->unit_counters();
    Napi::Object unit = Napi::Object::New(env);
    set_in(unit, "jobs", u.jobs);
    set_in(unit, "activations", u.activations);
    set_in(unit, "neurons", u.neurons);
    set_in(unit, "weightBytesRead", u.weight_bytes_read);
    set_in(unit, "jobNs", u.job_ns);
    set_in(unit, "cpuNs", u.cpu_ns);
    set_in(unit, "waitNs", u.wait_ns);
    set_in(unit, "busyNs", u.busy_ns);
    unit.Set("name", Napi::String::New(env, hybrid->unit().name()));
    object.Set("unit", unit);
  }
  if (const StreamedExperts* streamed = engine.streamed()) {
    const StreamCounters& s = streamed->stream_counters();
    Napi::Object stream = Napi::Object::New(env);
    set_in(stream, "hotHits", s.hot_hits);
    set_in(stream, "coldHits", s.cold_hits);
    set_in(stream, "misses", s.misses);
    set_in(stream, "reads", s.reads);
    set_in(stream, "askedBytes", s.asked_bytes);
    set_in(stream, "readBytes", s.read_bytes);
    set_in(stream, "usedBytes", s.used_bytes);
    set_in(stream, "sparedBytes", s.spared_bytes);
    set_in(stream, "gateStallNs", s.gate_stall_ns);
    set_in(stream, "rowStallNs", s.row_stall_ns);
    set_in(stream, "prefetched", s.prefetched);
    set_in(stream, "prefetchUsed", s.prefetch_used);
    stream.Set("twoPhases", Napi::Boolean::New(env, streamed->two_phases()));
    stream.Set("storage", Napi::String::New(env, streamed->storage()));
    object.Set("stream", stream);
  }
  return object;
}

Napi::Object unit_times_object(Napi::Env env, const UnitTimes& times) {
  Napi::Object object = Napi::Object::New(env);
  Napi::Array graphs = Napi::Array::New(env);
  for (uint32_t graph = 0; graph < UnitTimes::kGraphs; graph++) {
    Napi::Array jobs = Napi::Array::New(env);
    for (const double ns : times.unit[graph]) jobs.Set(jobs.Length(), Napi::Number::New(env, ns));
    graphs.Set(graph, jobs);
  }
  object.Set("unit", graphs);
  const auto set = [&](const char* name, const std::array<UnitTimes::Cpu, UnitTimes::kGraphs>& cpu) {
    Napi::Array neurons = Napi::Array::New(env);
    for (const UnitTimes::Cpu& neuron : cpu) {
      Napi::Object one = Napi::Object::New(env);
      one.Set("lookNs", Napi::Number::New(env, neuron.look_ns));
      one.Set("fireNs", Napi::Number::New(env, neuron.fire_ns));
      neurons.Set(neurons.Length(), one);
    }
    object.Set(name, neurons);
  };
  set("alone", times.alone);
  set("beside", times.beside);
  return object;
}

}  // namespace pi2
