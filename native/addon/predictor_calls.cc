#include "native/addon/predictor_calls.h"

#include "native/addon/arguments.h"
#include "native/addon/task.h"
#include "native/predictor/train.h"

namespace pi2 {
namespace {

/** Reads typed arrays and keeps them referenced. */
class Arrays {
 public:
  explicit Arrays(Fields& fields) : fields_(fields) {}

  float* floats(const char* name, size_t count) { return read<Napi::Float32Array, float>(name, napi_float32_array, count); }
  uint32_t* words(const char* name, size_t count) {
    return read<Napi::Uint32Array, uint32_t>(name, napi_uint32_array, count);
  }
  /** Elements of an array, 0 if it is none. */
  size_t length(const char* name) {
    const Napi::Value value = fields_.value(name);
    return value.IsTypedArray() ? value.As<Napi::TypedArray>().ElementLength() : 0;
  }
  std::vector<Napi::Object> take() { return std::move(kept_); }

 private:
  template <class Array, class Number>
  Number* read(const char* name, napi_typedarray_type type, size_t count) {
    const Napi::Value value = fields_.value(name);
    if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != type ||
        value.As<Napi::TypedArray>().ElementLength() != count) {
      fields_.fail(std::string(name) + " is not the array of numbers that the shape asks for");
      return nullptr;
    }
    Array array = value.As<Array>();
    kept_.push_back(array);
    return array.Data();
  }

  Fields& fields_;
  std::vector<Napi::Object> kept_;
};

PredictorShape read_shape(Fields& fields) {
  const PredictorShape shape{fields.size("hiddenSize"), fields.size("neuronCount"), fields.size("rank")};
  const auto fits = [](size_t size, size_t most) { return size > 0 && size <= most; };
  if (!fits(shape.hidden_size, 1 << 20) || !fits(shape.neuron_count, 1 << 24) || !fits(shape.rank, 1 << 16)) {
    fields.fail("a size is absurd");
    return {1, 1, 1};
  }
  return shape;
}

size_t read_threads(Fields& fields) {
  const size_t threads = fields.size("threads");
  if (threads == 0 || threads > 1024) fields.fail("threads must be 1 to 1024");
  return threads;
}

Napi::Value train_predictor_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  Arrays arrays(fields);
  TrainRequest request{};
  request.shape = read_shape(fields);
  const size_t tokens = arrays.length("starts") > 0 ? arrays.length("starts") - 1 : 0;
  const size_t entries = arrays.length("neurons");
  const size_t parameters = request.shape.parameter_count();
  request.inputs = arrays.floats("inputs", tokens * request.shape.hidden_size);
  request.starts = arrays.words("starts", tokens + 1);
  request.neurons = arrays.words("neurons", entries);
  request.weights = arrays.floats("weights", entries);
  request.parameters = arrays.floats("parameters", parameters);
  request.moments = arrays.floats("moments", 2 * parameters);
  request.steps_before = fields.size("stepsBefore");
  request.order_count = arrays.length("order");
  request.order = arrays.words("order", request.order_count);
  request.batch_size = fields.size("batchSize");
  request.learning_rate = static_cast<float>(fields.number("learningRate"));
  request.threads = read_threads(fields);
  if (request.batch_size == 0 || request.batch_size > 1 << 14) fields.fail("batchSize must be 1 to 16384");
  if (fields.status().is_ok()) {
    for (size_t t = 0; t < tokens; t++) {
      if (request.starts[t] > request.starts[t + 1]) fields.fail("starts must ascend");
    }
    if (request.starts[tokens] > entries) fields.fail("starts end beyond the entries");
    for (size_t i = 0; i < entries; i++) {
      if (request.neurons[i] >= request.shape.neuron_count) fields.fail("neurons names one that is not there");
    }
    for (size_t i = 0; i < request.order_count; i++) {
      if (request.order[i] >= tokens) fields.fail("order names a token that is not there");
    }
  }
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
  return Task::run(
      env, arrays.take(), [request] { return train_predictor(request); }, [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value score_predictor_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  Arrays arrays(fields);
  const PredictorShape shape = read_shape(fields);
  const size_t tokens = arrays.length("inputs") / shape.hidden_size;
  const float* inputs = arrays.floats("inputs", tokens * shape.hidden_size);
  const float* parameters = arrays.floats("parameters", shape.parameter_count());
  float* scores = arrays.floats("scores", tokens * shape.neuron_count);
  const size_t threads = read_threads(fields);
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
  return Task::run(
      env, arrays.take(), [=] { return score_predictor(shape, parameters, inputs, tokens, threads, scores); },
      [](Napi::Env e) { return e.Undefined(); });
}

}  // namespace

void export_predictor_calls(Napi::Env env, Napi::Object exports) {
  exports.Set("trainPredictor", Napi::Function::New(env, train_predictor_call));
  exports.Set("scorePredictor", Napi::Function::New(env, score_predictor_call));
}

}  // namespace pi2
