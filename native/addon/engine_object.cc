#include "native/addon/engine_object.h"

#include <atomic>
#include <memory>
#include <mutex>

#include "native/addon/counters.h"
#include "native/addon/engine_config.h"
#include "native/addon/task.h"
#include "native/addon/trace_calls.h"
#include "native/engine/engine.h"

namespace pi2 {
namespace {

/**
 * An engine and who may use it. `busy` is set when a step is asked for: it refuses a second one before it could queue and
 * keeps a close from overtaking the first. The lock is for counters, which may be read meanwhile.
 */
struct SharedEngine {
  std::mutex lock;
  std::unique_ptr<Engine> engine;
  std::atomic<bool> busy{false};
};

Status closed() { return Status::argument("the engine is closed"); }
Status busy() { return {StatusCode::kBusy, "the engine is computing a step; wait for it"}; }

class EngineObject : public Napi::ObjectWrap<EngineObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "NativeEngine",
        {InstanceAccessor<&EngineObject::kernel_set>("kernelSet"), InstanceMethod<&EngineObject::step>("step"),
         InstanceMethod<&EngineObject::fork>("fork"), InstanceMethod<&EngineObject::release>("release"),
         InstanceMethod<&EngineObject::counters>("counters"),
         InstanceMethod<&EngineObject::measure_bandwidths>("measureBandwidths"),
         InstanceMethod<&EngineObject::set_unit_schedule>("setUnitSchedule"),
         InstanceMethod<&EngineObject::measure_unit>("measureUnit"),
         InstanceMethod<&EngineObject::drain_trace>("drainTrace"), InstanceMethod<&EngineObject::close>("close")});
  }

  /** Only openEngine constructs it, with the engine as an External. */
  explicit EngineObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    if (info.Length() == 1 && info[0].IsExternal()) {
      shared_ = *info[0].As<Napi::External<std::shared_ptr<SharedEngine>>>().Data();
    } else {
      Napi::TypeError::New(info.Env(), "engines are opened with openEngine").ThrowAsJavaScriptException();
    }
  }

 private:
  Napi::Value kernel_set(const Napi::CallbackInfo& info) {
    return Napi::String::New(info.Env(), closed_ ? "" : shared_->engine->kernel_set());
  }

  Napi::Value step(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    Fields fields(info[0]);
    const Napi::Value tokens_value = fields.value("tokens");
    const Napi::Value logits_value = fields.value("logits");
    std::vector<Run> runs;
    each(fields, "runs", [&](Fields& run) {
      runs.push_back({run.size("sequence"), run.size("position"), run.size("count")});
    });
    const bool all = fields.boolean("all");
    const bool exact = fields.has("exact") && fields.boolean("exact");
    const bool prompt = fields.has("prompt") && fields.boolean("prompt");
    const auto typed = [](const Napi::Value& value, napi_typedarray_type type) {
      return value.IsTypedArray() && value.As<Napi::TypedArray>().TypedArrayType() == type;
    };
    if (!typed(tokens_value, napi_int32_array)) fields.fail("tokens must be an Int32Array");
    if (!typed(logits_value, napi_float32_array)) fields.fail("logits must be a Float32Array");
    for (const char* name : {"fired", "routed"}) {
      if (fields.has(name)) fields.bytes(name);
    }
    for (const char* name : {"inputs", "activations"}) {
      if (fields.has(name) && !typed(fields.value(name), napi_float32_array)) {
        fields.fail(std::string(name) + " must be a Float32Array");
      }
    }
    const std::string input = fields.has("input") ? fields.text("input") : "ffn_norm";
    if (input != "ffn_norm" && input != "residual") fields.fail("input must be ffn_norm or residual");
    if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
    if (closed_) return Task::refuse(env, closed());
    if (shared_->busy.exchange(true)) {
      return Task::refuse(env, busy());
    }
    Napi::Int32Array tokens = tokens_value.As<Napi::Int32Array>();
    Napi::Float32Array logits = logits_value.As<Napi::Float32Array>();
    const int32_t* token_data = tokens.Data();
    float* logit_data = logits.Data();
    const size_t count = tokens.ElementLength();
    const size_t room = logits.ElementLength();
    std::vector<Napi::Object> kept = {tokens, logits};
    FiringRecord record;
    size_t fired_room = 0;
    size_t routed_room = 0;
    const auto bits = [&](const char* name, uint8_t** data, size_t* bytes) {
      if (!fields.has(name)) return;
      Napi::Uint8Array array = fields.bytes(name);
      *data = array.Data();
      *bytes = array.ByteLength();
      kept.push_back(array);
    };
    bits("fired", &record.fired, &fired_room);
    bits("routed", &record.routed, &routed_room);
    size_t input_room = 0;
    size_t activation_room = 0;
    const auto numbers = [&](const char* name, float** data, size_t* room_of) {
      if (!fields.has(name)) return;
      Napi::Float32Array array = fields.value(name).As<Napi::Float32Array>();
      *data = array.Data();
      *room_of = array.ElementLength();
      kept.push_back(array);
    };
    numbers("inputs", &record.inputs, &input_room);
    numbers("activations", &record.activations, &activation_room);
    record.residual_inputs = input == "residual";
    return Task::run(
        env, std::move(kept),
        [shared = shared_, token_data, logit_data, count, room, runs = std::move(runs), all, exact, prompt, record,
         fired_room, routed_room, input_room, activation_room] {
          const std::lock_guard<std::mutex> lock(shared->lock);
          Status status;
          size_t left = count;
          for (const Run& run : runs) left = run.count > left ? SIZE_MAX : left - run.count;
          if (left != 0) {
            status = Status::argument("the runs of a step must name each of its tokens once");
          } else if (room < (all ? count : runs.size()) * shared->engine->vocab_size()) {
            status = Status::argument("logits is too small");
          } else if (record.fired != nullptr && fired_room < count * shared->engine->fired_bytes_per_token()) {
            status = Status::argument("fired is too small");
          } else if (record.routed != nullptr && routed_room < count * shared->engine->routed_bytes_per_token()) {
            status = Status::argument("routed is too small");
          } else if (record.inputs != nullptr && input_room < count * shared->engine->inputs_per_token()) {
            status = Status::argument("inputs is too small");
          } else if (record.activations != nullptr && activation_room < count * shared->engine->activations_per_token()) {
            status = Status::argument("activations is too small");
          } else {
            const StepInput input{token_data, runs.data(), runs.size(), all, exact, prompt};
            status = shared->engine->step(input, logit_data, record);
          }
          shared->busy.store(false);
          shared->busy.notify_all();
          return status;
        },
        [](Napi::Env e) { return e.Undefined(); });
  }

  Napi::Value fork(const Napi::CallbackInfo& info) {
    Fields fields(info[0]);
    const size_t from = fields.size("from");
    const size_t to = fields.size("to");
    const size_t positions = fields.size("positions");
    return between_steps(info.Env(), fields, [&](Engine& engine) { return engine.fork(from, to, positions); });
  }

  Napi::Value release(const Napi::CallbackInfo& info) {
    Fields fields(info[0]);
    const size_t sequence = fields.size("sequence");
    return between_steps(info.Env(), fields, [&](Engine& engine) { return engine.release(sequence); });
  }

  /** Does what takes no time, at once; a failure, or a step that is under way, is thrown. */
  template <class Work>
  Napi::Value between_steps(Napi::Env env, const Fields& fields, const Work& work) {
    if (refuses(env)) return env.Undefined();
    Status status = fields.status();
    if (status.is_ok() && shared_->busy.load()) status = busy();
    if (status.is_ok()) {
      const std::lock_guard<std::mutex> lock(shared_->lock);
      status = work(*shared_->engine);
    }
    if (!status.is_ok()) to_error(env, status).ThrowAsJavaScriptException();
    return env.Undefined();
  }

  Napi::Value counters(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    if (refuses(env)) return env.Undefined();
    const std::lock_guard<std::mutex> lock(shared_->lock);
    return counters_object(env, *shared_->engine);
  }

  Napi::Value measure_bandwidths(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    Fields fields(info[0]);
    const size_t flash_read_bytes = fields.size("flashReadBytes");
    if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
    auto found = std::make_shared<Bandwidths>();
    return between_steps(
        env,
        [flash_read_bytes, found](Engine& engine) {
          *found = engine.measure_bandwidths(flash_read_bytes);
          return Status::ok();
        },
        [found](Napi::Env e) {
          Napi::Object object = Napi::Object::New(e);
          const auto known = [&](double rate) { return rate > 0 ? Napi::Number::New(e, rate) : e.Null(); };
          object.Set("memory", known(found->memory));
          object.Set("flash", known(found->flash));
          return object;
        });
  }

  Napi::Value measure_unit(const Napi::CallbackInfo& info) {
    auto times = std::make_shared<UnitTimes>();
    return between_steps(
        info.Env(), [times](Engine& engine) { return engine.measure_unit(times.get()); },
        [times](Napi::Env e) { return unit_times_object(e, *times); });
  }

  Napi::Value set_unit_schedule(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    Fields fields(info[0]);
    const UnitConfig::Schedule clusters = read_unit_schedule(fields);
    if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
    return between_steps(
        env, [clusters](Engine& engine) { return engine.set_unit_schedule(clusters); },
        [](Napi::Env e) { return e.Undefined(); });
  }

  Napi::Value drain_trace(const Napi::CallbackInfo& info) {
    if (refuses(info.Env())) return info.Env().Undefined();
    const std::lock_guard<std::mutex> lock(shared_->lock);
    return drained_trace(info.Env(), shared_->engine->trace());
  }

  Napi::Value close(const Napi::CallbackInfo& info) {
    closed_ = true;
    return Task::run(
        info.Env(), {},
        [shared = shared_] {
          // Steps asked for earlier; later ones are refused.
          shared->busy.wait(true);
          const std::lock_guard<std::mutex> lock(shared->lock);
          shared->engine.reset();
          return Status::ok();
        },
        [](Napi::Env e) { return e.Undefined(); });
  }

  /** A promise of result(), once work(engine) is done off the JavaScript thread; refused while a step runs. */
  template <class Work, class Result>
  Napi::Value between_steps(Napi::Env env, Work work, Result result) {
    if (closed_) return Task::refuse(env, closed());
    if (shared_->busy.exchange(true)) return Task::refuse(env, busy());
    return Task::run(
        env, {},
        [shared = shared_, work] {
          const std::lock_guard<std::mutex> lock(shared->lock);
          Status status = work(*shared->engine);
          shared->busy.store(false);
          shared->busy.notify_all();
          return status;
        },
        result);
  }

  /** Whether the engine is closed; then that is thrown. */
  bool refuses(Napi::Env env) const {
    if (closed_) to_error(env, closed()).ThrowAsJavaScriptException();
    return closed_;
  }

  std::shared_ptr<SharedEngine> shared_;
  /** The JavaScript thread's alone. */
  bool closed_ = false;
};

Napi::Value open_engine_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  EngineConfig config = read_engine_config(fields);
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
  auto* constructor = env.GetInstanceData<Napi::FunctionReference>();
  auto shared = std::make_shared<SharedEngine>();
  return Task::run(
      env, {}, [shared, config = std::move(config)]() mutable { return Engine::open(std::move(config), &shared->engine); },
      [shared, constructor](Napi::Env e) -> Napi::Value {
        std::shared_ptr<SharedEngine> handle = shared;
        return constructor->New({Napi::External<std::shared_ptr<SharedEngine>>::New(e, &handle)});
      });
}

Napi::Value memory_needed_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  const EngineConfig config = read_engine_config(fields);
  EngineMemory memory;
  Status status = fields.status();
  if (status.is_ok()) status = Engine::memory_needed(config, &memory);
  if (!status.is_ok()) {
    to_error(env, status).ThrowAsJavaScriptException();
    return env.Undefined();
  }
  Napi::Object object = Napi::Object::New(env);
  const auto set = [&](const char* name, size_t bytes) {
    object.Set(name, Napi::Number::New(env, static_cast<double>(bytes)));
  };
  set("weightBytes", memory.weight_bytes);
  set("kvBytes", memory.kv_bytes);
  set("scratchBytes", memory.scratch_bytes);
  set("unitBytes", memory.unit_bytes);
  set("loadBytes", memory.load_bytes);
  return object;
}

}  // namespace

void export_engine_calls(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Napi::FunctionReference(Napi::Persistent(EngineObject::define(env))));
  exports.Set("openEngine", Napi::Function::New(env, open_engine_call));
  exports.Set("memoryNeeded", Napi::Function::New(env, memory_needed_call));
}

}  // namespace pi2
