#include "native/addon/engine_object.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>

#include "native/addon/cache_calls.h"
#include "native/addon/converter_calls.h"
#include "native/addon/counters.h"
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

const double kLargest = 9007199254740991.0;

/** Calls read(element) for each object of an array. */
template <class Read>
void each(Fields& fields, const char* name, const Read& read) {
  const Napi::Value value = fields.value(name);
  if (!value.IsArray()) return fields.fail(std::string(name) + " must be an array");
  const Napi::Array array = value.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); i++) {
    Fields element(array.Get(i));
    read(element);
    if (!element.status().is_ok()) return fields.fail(std::string(name) + ": " + element.status().message());
  }
}

class EngineObject : public Napi::ObjectWrap<EngineObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "NativeEngine",
        {InstanceAccessor<&EngineObject::kernel_set>("kernelSet"), InstanceMethod<&EngineObject::step>("step"),
         InstanceMethod<&EngineObject::fork>("fork"), InstanceMethod<&EngineObject::release>("release"),
         InstanceMethod<&EngineObject::counters>("counters"),
         InstanceMethod<&EngineObject::measure_bandwidths>("measureBandwidths"),
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
    if (closed_) return Task::refuse(env, closed());
    if (shared_->busy.exchange(true)) return Task::refuse(env, busy());
    auto found = std::make_shared<Bandwidths>();
    return Task::run(
        env, {},
        [shared = shared_, flash_read_bytes, found] {
          const std::lock_guard<std::mutex> lock(shared->lock);
          *found = shared->engine->measure_bandwidths(flash_read_bytes);
          shared->busy.store(false);
          shared->busy.notify_all();
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

  /** Whether the engine is closed; then that is thrown. */
  bool refuses(Napi::Env env) const {
    if (closed_) to_error(env, closed()).ThrowAsJavaScriptException();
    return closed_;
  }

  std::shared_ptr<SharedEngine> shared_;
  /** The JavaScript thread's alone. */
  bool closed_ = false;
};

/** Extents of two files, or of a predictor's own. */
void read_extents(Fields& fields, bool of_predictor, std::vector<ExtentConfig>* extents) {
  each(fields, "extents", [&](Fields& e) {
    const std::string file = e.text("file");
    const bool is_known = of_predictor ? file == "predictor" : file == "resident" || file == "neurons";
    if (!is_known) e.fail(of_predictor ? "file must be predictor" : "file must be resident or neurons");
    extents->push_back(
        {e.text("name"), file == "neurons", e.size("offset"), e.size("bytes"), static_cast<uint32_t>(e.size("crc32"))});
  });
}

void read_tensors(Fields& fields, std::vector<TensorConfig>* tensors) {
  each(fields, "tensors", [&](Fields& e) {
    tensors->push_back(
        {e.text("name"), e.size("offset"), e.size("bytes"), e.encoding("encoding"), e.size("rows"), e.size("columns")});
  });
}

void read_predictor(Fields& request, PredictorConfig* predictor) {
  Fields fields(request.value("predictor"));
  predictor->path = fields.text("path");
  if (predictor->path.empty()) fields.fail("path is empty");
  read_extents(fields, true, &predictor->extents);
  read_tensors(fields, &predictor->tensors);
  const std::string input = fields.text("input");
  if (input != "residual" && input != "ffn_norm") fields.fail("input must be residual or ffn_norm");
  predictor->input = input == "residual" ? PredictorInput::kResidual : PredictorInput::kFfnNorm;
  const auto thresholds = [&](const char* name, std::vector<float>* values) {
    for (const double value : fields.numbers(name)) {
      if (std::isnan(value)) fields.fail(std::string(name) + " must be numbers");
      values->push_back(static_cast<float>(value));
    }
  };
  thresholds("memoryThresholds", &predictor->memory_thresholds);
  thresholds("flashThresholds", &predictor->flash_thresholds);
  predictor->flash_from = fields.size_or("flashFrom", SIZE_MAX);
  if (!fields.status().is_ok()) request.fail("predictor: " + fields.status().message());
}

void read_stream(Fields& request, StreamConfig* stream) {
  Fields fields(request.value("stream"));
  stream->banks = read_bank_plans(fields, fields.numbers("residentGates"));
  stream->firing_rates = read_firing_rates(fields);
  stream->staging_bytes = fields.size("stagingBytes");
  stream->lanes = fields.size("lanes");
  const std::string mode = fields.text("mode");
  const std::string backend = fields.text("backend");
  if (mode != "direct" && mode != "buffered") fields.fail("mode must be direct or buffered");
  if (backend != "threads" && backend != "uring") fields.fail("backend must be threads or uring");
  if (stream->lanes == 0 || stream->lanes > 256) fields.fail("lanes must be 1 to 256");
  if (stream->staging_bytes > size_t{1} << 34) fields.fail("stagingBytes is absurd");
  const auto flag = [&](const char* name, bool fallback) { return fields.has(name) ? fields.boolean(name) : fallback; };
  const std::string policy = fields.has("policy") ? fields.text("policy") : "frequency";
  if (policy != "frequency" && policy != "recency") fields.fail("policy must be frequency or recency");
  stream->policy = policy == "recency" ? CachePolicy::kRecency : CachePolicy::kFrequency;
  stream->prefetch_bytes = fields.size_or("prefetchBytes", 0);
  if (stream->prefetch_bytes > size_t{1} << 30) fields.fail("prefetchBytes is absurd");
  if (fields.has("twoPhase")) stream->two_phase = fields.boolean("twoPhase");
  stream->bundles = flag("bundles", true);
  stream->pipeline = flag("pipeline", true);
  if (fields.has("checksumOffsets")) {
    for (const double offset : fields.numbers("checksumOffsets")) {
      if (!(offset >= 0 && offset <= kLargest)) fields.fail("checksumOffsets must be sizes");
      stream->checksum_offsets.push_back(static_cast<size_t>(offset));
    }
  }
  if (fields.has("trial")) {
    Fields trial(fields.value("trial"));
    stream->trial = {trial.size_or("failRead", 0), trial.size_or("shortRead", 0), trial.size_or("delayUs", 0)};
    if (!trial.status().is_ok()) fields.fail("trial: " + trial.status().message());
  }
  stream->mode = mode == "direct" ? ReadMode::kDirect : ReadMode::kBuffered;
  stream->backend = backend == "uring" ? ReadBackend::kUring : ReadBackend::kThreads;
  if (!fields.status().is_ok()) request.fail("stream: " + fields.status().message());
}

EngineConfig read_config(Fields& fields) {
  EngineConfig config{};
  config.resident_path = fields.text("residentPath");
  config.neurons_path = fields.text("neuronsPath");
  read_extents(fields, false, &config.extents);
  read_tensors(fields, &config.tensors);
  for (const double offset : fields.numbers("expertOffsets")) {
    if (!(offset >= 0 && offset <= kLargest)) fields.fail("expertOffsets must be sizes");
    config.expert_offsets.push_back(static_cast<size_t>(offset));
  }
  if (fields.has("orderOffsets")) {
    for (const double offset : fields.numbers("orderOffsets")) {
      if (!(offset >= 0 && offset <= kLargest)) fields.fail("orderOffsets must be sizes");
      config.order_offsets.push_back(static_cast<size_t>(offset));
    }
  }
  const Status layout = read_layout(fields.value("layout"), &config.layout);
  if (!layout.is_ok()) fields.fail(layout.message());
  config.ffn_encoding = fields.encoding("ffnEncoding");
  config.hidden_size = fields.size("hiddenSize");
  config.layer_count = fields.size("layerCount");
  config.head_count = fields.size("headCount");
  config.kv_head_count = fields.size("kvHeadCount");
  config.head_dim = fields.size("headDim");
  config.neuron_count = fields.size("neuronCount");
  config.vocab_size = fields.size("vocabSize");
  const std::string norm = fields.text("normKind");
  if (norm != "layer" && norm != "rms") fields.fail("normKind must be rms or layer");
  config.norm_kind = norm == "layer" ? NormKind::kLayer : NormKind::kRms;
  config.norm_epsilon = static_cast<float>(fields.number("normEpsilon"));
  config.rope_frequencies = fields.floats("ropeFrequencies");
  for (const double window : fields.numbers("windows")) {
    if (!(window >= 0 && window <= 1e9)) fields.fail("windows must be sizes");
    config.windows.push_back(static_cast<size_t>(window));
  }
  config.gated = fields.boolean("gated");
  const std::string activation = fields.text("activation");
  if (activation == "silu") {
    config.activation = ActivationKind::kSilu;
  } else if (activation == "relu") {
    config.activation = ActivationKind::kRelu;
  } else if (activation == "drelu") {
    config.activation = ActivationKind::kDRelu;
  } else if (activation == "fatrelu") {
    config.activation = ActivationKind::kFatRelu;
  } else {
    fields.fail("activation must be silu, relu, drelu or fatrelu");
  }
  config.threshold = static_cast<float>(fields.number("threshold"));
  config.expert_count = fields.size("expertCount");
  config.experts_per_token = fields.size("expertsPerToken");
  config.context_length = fields.size("contextLength");
  config.sequences = fields.size_or("sequences", 1);
  config.threads = fields.size("threads");
  if (fields.has("kernelSet")) config.kernel_set = fields.text("kernelSet");
  config.batch_size = fields.size("batchSize");
  if (fields.has("stream")) read_stream(fields, &config.stream);
  if (fields.has("predictor")) read_predictor(fields, &config.predictor);
  config.mapped = fields.has("mapped") && fields.boolean("mapped");
  config.trace_records = fields.size_or("traceRecords", 0);
  return config;
}

Napi::Value open_engine_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  EngineConfig config = read_config(fields);
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
  const EngineConfig config = read_config(fields);
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
