#include "native/addon/trace_calls.h"

namespace pi2 {
namespace {

Napi::Value trace_stages_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array names = Napi::Array::New(env);
  for (uint32_t i = 0; i < static_cast<uint32_t>(TraceStage::kStageCount); i++) {
    names.Set(i, Napi::String::New(env, trace_stage_name(static_cast<TraceStage>(i))));
  }
  return names;
}

}  // namespace

Napi::Value drained_trace(Napi::Env env, Trace* trace) {
  Napi::ArrayBuffer records = Napi::ArrayBuffer::New(env, trace == nullptr ? 0 : trace->size() * sizeof(TraceRecord));
  Napi::Object object = Napi::Object::New(env);
  object.Set("records", records);
  object.Set("dropped", Napi::Number::New(env, trace == nullptr ? 0 : static_cast<double>(trace->dropped())));
  if (trace != nullptr) trace->drain(static_cast<TraceRecord*>(records.Data()));
  return object;
}

void export_trace_calls(Napi::Env env, Napi::Object exports) {
  exports.Set("traceStages", Napi::Function::New(env, trace_stages_call));
}

}  // namespace pi2
