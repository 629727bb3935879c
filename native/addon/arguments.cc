#include "native/addon/arguments.h"

#include <cmath>

namespace pi2 {

const char* code_name(StatusCode code) {
  switch (code) {
    case StatusCode::kOk: return "OK";
    case StatusCode::kArgument: return "NATIVE_ARGUMENT";
    case StatusCode::kIo: return "NATIVE_IO";
    case StatusCode::kChecksum: return "NATIVE_CHECKSUM";
    case StatusCode::kMemory: return "NATIVE_MEMORY";
    case StatusCode::kCpu: return "NATIVE_CPU";
    case StatusCode::kBusy: return "NATIVE_BUSY";
    case StatusCode::kUnit: return "NATIVE_UNIT";
  }
  return "NATIVE_ARGUMENT";
}

Napi::Error to_error(Napi::Env env, const Status& status) {
  Napi::Error error = Napi::Error::New(env, status.message());
  error.Set("code", Napi::String::New(env, code_name(status.code())));
  return error;
}

Fields::Fields(const Napi::Value& value) {
  if (value.IsObject()) {
    object_ = value.As<Napi::Object>();
  } else {
    object_ = Napi::Object::New(value.Env());
    fail("expected an object");
  }
}

void Fields::fail(const std::string& message) {
  if (status_.is_ok()) status_ = Status::argument(message);
}

Napi::Value Fields::value(const char* name) { return object_.Get(name); }

bool Fields::has(const char* name) const { return !object_.Get(name).IsUndefined(); }

double Fields::number(const char* name) {
  const Napi::Value v = object_.Get(name);
  if (!v.IsNumber()) {
    fail(std::string(name) + " must be a number");
    return 0;
  }
  return v.As<Napi::Number>().DoubleValue();
}

size_t Fields::size(const char* name) {
  const double v = number(name);
  if (!(v >= 0 && v <= 9007199254740991.0) || v != std::floor(v)) {
    fail(std::string(name) + " must be a whole number, at least 0");
    return 0;
  }
  return static_cast<size_t>(v);
}

size_t Fields::size_or(const char* name, size_t fallback) { return has(name) ? size(name) : fallback; }

bool Fields::boolean(const char* name) {
  const Napi::Value v = object_.Get(name);
  if (!v.IsBoolean()) fail(std::string(name) + " must be true or false");
  return v.IsBoolean() && v.As<Napi::Boolean>().Value();
}

std::string Fields::text(const char* name) {
  const Napi::Value v = object_.Get(name);
  if (!v.IsString()) {
    fail(std::string(name) + " must be text");
    return "";
  }
  return v.As<Napi::String>().Utf8Value();
}

std::vector<double> Fields::numbers(const char* name) {
  const Napi::Value v = object_.Get(name);
  std::vector<double> result;
  if (!v.IsArray()) {
    fail(std::string(name) + " must be an array");
    return result;
  }
  const Napi::Array array = v.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); i++) {
    const Napi::Value element = array.Get(i);
    if (!element.IsNumber()) {
      fail(std::string(name) + " must hold numbers");
      return result;
    }
    result.push_back(element.As<Napi::Number>().DoubleValue());
  }
  return result;
}

std::vector<float> Fields::floats(const char* name) {
  const Napi::Value v = object_.Get(name);
  if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array) {
    fail(std::string(name) + " must be a Float32Array");
    return {};
  }
  Napi::Float32Array array = v.As<Napi::Float32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

Napi::Uint8Array Fields::bytes(const char* name) {
  const Napi::Value v = object_.Get(name);
  if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    fail(std::string(name) + " must be a Uint8Array");
    return Napi::Uint8Array::New(object_.Env(), 0);
  }
  return v.As<Napi::Uint8Array>();
}

Encoding Fields::encoding(const char* name) {
  const std::string v = text(name);
  if (v == "f32") return Encoding::kF32;
  if (v == "f16") return Encoding::kF16;
  if (v == "q8") return Encoding::kQ8;
  if (v == "q4") return Encoding::kQ4;
  fail(std::string(name) + " must be f32, f16, q8 or q4");
  return Encoding::kF32;
}

SourceType Fields::source_type(const char* name) {
  const std::string v = text(name);
  if (v == "F32") return SourceType::kF32;
  if (v == "F16") return SourceType::kF16;
  if (v == "BF16") return SourceType::kBf16;
  fail(std::string(name) + " must be F32, F16 or BF16");
  return SourceType::kF32;
}

Placement Fields::placement(const char* name) {
  Fields fields(object_.Get(name));
  const Placement placement{fields.size("perUnit"),       fields.size("unitBytes"),    fields.size("weightsOffset"),
                            fields.size("weightsStride"), fields.size("scalesOffset"), fields.size("scalesStride")};
  if (!fields.status().is_ok()) fail(std::string(name) + ": " + fields.status().message());
  if (placement.per_unit == 0) fail(std::string(name) + ": perUnit must be at least 1");
  return placement;
}

}  // namespace pi2
