#pragma once
/**
 * Reading of JavaScript objects for the addon. TypeScript has validated them (src/engine/contract.ts); what could touch
 * memory is checked again here, and a lie ends in a rejected promise, never in a wild read.
 */
#include <napi.h>

#include <cstdint>
#include <string>
#include <vector>

#include "native/base/status.h"
#include "native/kernels/encoding.h"
#include "native/quantize/encode.h"

namespace pi2 {

/** The `code` of a rejected promise. */
const char* code_name(StatusCode code);

/** An Error with `code` for a failed status. */
Napi::Error to_error(Napi::Env env, const Status& status);

/**
 * Reads fields of one request object. The first missing or ill-typed field makes `status()` fail and every later read return
 * a zero, so that a reader checks once, at the end.
 */
class Fields {
 public:
  explicit Fields(const Napi::Value& value);

  size_t size(const char* name);
  size_t size_or(const char* name, size_t fallback);
  double number(const char* name);
  bool boolean(const char* name);
  std::string text(const char* name);
  bool has(const char* name) const;
  std::vector<double> numbers(const char* name);
  /** A copy of a Float32Array. */
  std::vector<float> floats(const char* name);
  /** A view of JavaScript's memory: keep the object referenced while it is used. */
  Napi::Uint8Array bytes(const char* name);
  Napi::Value value(const char* name);
  Encoding encoding(const char* name);
  SourceType source_type(const char* name);
  Placement placement(const char* name);

  void fail(const std::string& message);
  const Status& status() const { return status_; }

 private:
  Napi::Object object_;
  Status status_;
};

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

}  // namespace pi2
