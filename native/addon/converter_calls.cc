#include "native/addon/converter_calls.h"

#include <algorithm>
#include <memory>

#include "native/addon/arguments.h"
#include "native/addon/task.h"
#include "native/base/crc32.h"
#include "native/base/threads.h"
#include "native/engine/bundle_layout.h"
#include "native/quantize/cluster.h"

namespace pi2 {
namespace {

/** Whether all vectors of a request, `columns` weights each, lie inside `target_bytes`. */
bool placement_fits(const Placement& p, size_t vectors, Encoding encoding, size_t columns, size_t target_bytes) {
  constexpr size_t kLimit = size_t{1} << 50;
  if (vectors == 0) return true;
  if (p.unit_bytes > kLimit || p.weights_stride > kLimit || p.scales_stride > kLimit || vectors > kLimit / 64 ||
      p.weights_offset > kLimit || p.scales_offset > kLimit || p.per_unit > kLimit) {
    return false;
  }
  const size_t weights = weight_bytes(encoding, columns);
  const size_t scales = scale_bytes(encoding, columns);
  // Addresses grow with the vector number inside a unit and from unit to unit, so the last vector of the last and of the
  // last whole unit reach furthest.
  const size_t last = vectors - 1;
  const size_t furthest[] = {last, last >= p.per_unit ? last / p.per_unit * p.per_unit - 1 : last};
  for (const size_t v : furthest) {
    if (v / p.per_unit > kLimit / (p.unit_bytes + 1)) return false;
    if (p.weights_at(v) + weights > target_bytes) return false;
    if (scales > 0 && p.scales_at(v) + scales > target_bytes) return false;
  }
  return true;
}

Napi::Value bad_number_value(Napi::Env env, const BadNumber& bad) {
  if (!bad.found) return env.Null();
  Napi::Object object = Napi::Object::New(env);
  object.Set("row", Napi::Number::New(env, static_cast<double>(bad.row)));
  object.Set("column", Napi::Number::New(env, static_cast<double>(bad.column)));
  object.Set("value", Napi::Number::New(env, bad.value));
  return object;
}

/** Whether the vectors that columns become are 0 to some n - 1, each once. */
bool is_dense(const uint32_t* order, size_t columns, size_t vectors) {
  std::vector<bool> seen(vectors);
  size_t count = 0;
  for (size_t i = 0; i < columns; i++) {
    if (order[i] == kSkipped) continue;
    if (seen[order[i]]) return false;
    seen[order[i]] = true;
    count++;
  }
  return count == vectors;
}

Napi::Value encode(const Napi::CallbackInfo& info, bool by_columns) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  const Napi::Uint8Array source = fields.bytes("source");
  Napi::Uint8Array target = fields.bytes("target");
  EncodeRequest request{source.Data(),
                        fields.source_type("sourceType"),
                        fields.size("rows"),
                        fields.size("columns"),
                        fields.encoding("encoding"),
                        target.Data(),
                        fields.placement("placement"),
                        fields.size("firstVector"),
                        nullptr,
                        fields.size("threads")};
  const size_t first_element = by_columns ? fields.size("firstElement") : 0;
  const bool tiles = by_columns && fields.boolean("tiles");
  const size_t vectors = by_columns ? request.columns : request.rows;
  const size_t vector_columns = by_columns ? first_element + request.rows : request.columns;
  std::vector<Napi::Object> kept = {source, target};
  size_t vector_end = request.first_vector + vectors;
  if (fields.has("order")) {
    const Napi::Value order = fields.value("order");
    if (!order.IsTypedArray() || order.As<Napi::TypedArray>().TypedArrayType() != napi_uint32_array ||
        order.As<Napi::Uint32Array>().ElementLength() != vectors) {
      fields.fail("order must be a Uint32Array with one entry a vector");
    } else {
      const Napi::Uint32Array array = order.As<Napi::Uint32Array>();
      request.order = array.Data();
      vector_end = 0;
      for (size_t i = 0; i < vectors; i++) {
        if (array[i] != kSkipped) vector_end = std::max(vector_end, array[i] + size_t{1});
      }
      kept.push_back(array);
    }
  }
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());

  constexpr size_t kMostNumbers = size_t{1} << 48;
  const bool source_fits = request.rows > 0 && request.columns > 0 && request.rows < kMostNumbers / request.columns &&
                           request.rows * request.columns * source_type_bytes(request.source_type) <= source.ByteLength();
  if (!source_fits) return Task::refuse(env, Status::argument("source is smaller than rows x columns"));
  if (first_element % kGroup != 0) return Task::refuse(env, Status::argument("firstElement must be a multiple of 256"));
  if (by_columns && request.encoding == Encoding::kF32) {
    return Task::refuse(env, Status::argument("columns are never stored as f32"));
  }
  if (!placement_fits(request.placement, vector_end, request.encoding, vector_columns, target.ByteLength())) {
    return Task::refuse(env, Status::argument("target is smaller than its placement needs"));
  }
  if (tiles && request.encoding != Encoding::kQ4) return Task::refuse(env, Status::argument("tiles are q4"));
  if (tiles && (request.order != nullptr ? vector_end > vectors || !is_dense(request.order, vectors, vector_end)
                                         : request.first_vector % kTileVectors != 0)) {
    return Task::refuse(env, Status::argument("tiles must be whole, and begin at a multiple of 32"));
  }
  auto bad = std::make_shared<BadNumber>();
  return Task::run(
      env, std::move(kept),
      [request, by_columns, tiles, first_element, bad] {
        *bad = tiles        ? encode_tiles(request, first_element)
               : by_columns ? encode_columns(request, first_element)
                            : encode_rows(request);
        return Status::ok();
      },
      [bad](Napi::Env e) { return bad_number_value(e, *bad); });
}

Napi::Value encode_rows_call(const Napi::CallbackInfo& info) { return encode(info, false); }
Napi::Value encode_columns_call(const Napi::CallbackInfo& info) { return encode(info, true); }

Napi::Value decode_rows_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  const Napi::Uint8Array source = fields.bytes("source");
  const size_t rows = fields.size("rows");
  const size_t columns = fields.size("columns");
  const Encoding encoding = fields.encoding("encoding");
  const Placement placement = fields.placement("placement");
  if (fields.status().is_ok() && (rows == 0 || columns == 0 || columns > size_t{1} << 32 ||
                                  !placement_fits(placement, rows, encoding, columns, source.ByteLength()))) {
    fields.fail("source is smaller than its placement needs");
  }
  if (!fields.status().is_ok()) {
    to_error(env, fields.status()).ThrowAsJavaScriptException();
    return env.Undefined();
  }
  Napi::Float32Array result = Napi::Float32Array::New(env, rows * columns);
  for (size_t r = 0; r < rows; r++) {
    decode_vector(source.Data() + placement.weights_at(r), source.Data() + placement.scales_at(r), encoding, columns,
                  result.Data() + r * columns);
  }
  return result;
}

Napi::Value crc32_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() < 2 || !info[0].IsTypedArray() || !info[1].IsNumber()) {
    return Task::refuse(env, Status::argument("crc32 takes a Uint8Array and a number"));
  }
  const Napi::Uint8Array bytes = info[0].As<Napi::Uint8Array>();
  const uint32_t seed = info[1].As<Napi::Number>().Uint32Value();
  const uint8_t* data = bytes.Data();
  const size_t size = bytes.ByteLength();
  auto sum = std::make_shared<uint32_t>(0);
  return Task::run(
      env, {bytes},
      [data, size, seed, sum] {
        *sum = crc32(data, size, seed);
        return Status::ok();
      },
      [sum](Napi::Env e) { return Napi::Number::New(e, *sum); });
}

Napi::Value bundle_checksums_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  const Napi::Uint8Array units = fields.bytes("units");
  const size_t neurons = fields.size("neurons");
  const size_t threads = fields.size("threads");
  BundleLayout layout;
  const Status read = read_layout(fields.value("layout"), &layout);
  if (!read.is_ok()) fields.fail(read.message());
  if (fields.status().is_ok() && (neurons == 0 || neurons > size_t{1} << 32 || layout.bytes(neurons) > units.ByteLength())) {
    fields.fail("units are smaller than the layout needs");
  }
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());
  auto sums = std::make_shared<std::vector<uint32_t>>(2 * neurons);
  const uint8_t* data = units.Data();
  return Task::run(
      env, {units},
      [data, neurons, threads, layout, sums] {
        run_in_ranges(threads, neurons, [&](size_t begin, size_t end) {
          for (size_t j = begin; j < end; j++) {
            (*sums)[2 * j] = crc32(data + layout.part1_at(j), layout.part1_bytes, 0);
            (*sums)[2 * j + 1] = crc32(data + layout.part2_at(j), layout.part2_bytes, 0);
          }
        });
        return Status::ok();
      },
      [sums](Napi::Env e) {
        Napi::Uint32Array array = Napi::Uint32Array::New(e, sums->size());
        std::copy(sums->begin(), sums->end(), array.Data());
        return array;
      });
}

ClusterParts::Matrix read_matrix(Fields* parts, const char* name) {
  Fields fields(parts->value(name));
  const ClusterParts::Matrix matrix{fields.size("weights"), fields.size("scales")};
  if (!fields.status().is_ok()) parts->fail(std::string(name) + ": " + fields.status().message());
  return matrix;
}

Napi::Value pack_cluster_call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Fields fields(info[0]);
  const Napi::Uint8Array units = fields.bytes("units");
  Napi::Uint8Array target = fields.bytes("target");
  PackRequest request{units.Data(),
                      {},
                      fields.size("slot"),
                      fields.size("neurons"),
                      fields.size("paddedNeurons"),
                      {},
                      fields.size("first"),
                      target.Data(),
                      fields.size("threads")};
  Status read = read_layout(fields.value("layout"), &request.layout);
  if (!read.is_ok()) fields.fail(read.message());
  Fields parts(fields.value("parts"));
  if (request.layout.matrices == 3) request.parts.gate = read_matrix(&parts, "gate");
  request.parts.up = read_matrix(&parts, "up");
  request.parts.down = read_matrix(&parts, "down");
  request.parts.neurons = parts.size("neurons");
  request.parts.hidden_size = parts.size("hiddenSize");
  request.parts.bytes = target.ByteLength();
  if (!parts.status().is_ok()) fields.fail(parts.status().message());
  if (!fields.status().is_ok()) return Task::refuse(env, fields.status());

  const Status fits = request.parts.check(request.layout.matrices);
  if (!fits.is_ok()) return Task::refuse(env, fits);
  const size_t first = request.first;
  const size_t padded = request.padded_neurons;
  const size_t weights = weight_bytes(Encoding::kQ4, request.parts.hidden_size);
  const size_t scales = scale_bytes(Encoding::kQ4, request.parts.hidden_size);
  if (first % kBlock != 0 || padded % kBlock != 0 || request.neurons > padded || first > request.parts.neurons ||
      padded > request.parts.neurons - first) {
    return Task::refuse(env, Status::argument("cluster: neurons are outside of it, or not in tiles"));
  }
  if (request.layout.part1_bytes != weights + request.layout.matrices * scales ||
      request.layout.part2_bytes != (request.layout.matrices - 1) * weights ||
      request.slot >= request.layout.neurons_per_unit ||
      request.layout.bytes(request.slot + request.neurons) > units.ByteLength()) {
    return Task::refuse(env, Status::argument("units are smaller than the layout needs, or not q4"));
  }
  return Task::run(
      env, {units, target}, [request] { return pack_cluster(request); }, [](Napi::Env e) { return e.Undefined(); });
}

}  // namespace

Status read_layout(const Napi::Value& value, BundleLayout* layout) {
  Fields fields(value);
  *layout = {fields.size("matrices"),  fields.size("part1Bytes"),  fields.size("part2Bytes"),  fields.size("neuronsPerUnit"),
             fields.size("unitBytes"), fields.size("part1Stride"), fields.size("part2Offset"), fields.size("part2Stride")};
  if (!fields.status().is_ok()) return fields.status();
  return layout->check();
}

void export_converter_calls(Napi::Env env, Napi::Object exports) {
  exports.Set("encodeRows", Napi::Function::New(env, encode_rows_call));
  exports.Set("encodeColumns", Napi::Function::New(env, encode_columns_call));
  exports.Set("decodeRows", Napi::Function::New(env, decode_rows_call));
  exports.Set("packCluster", Napi::Function::New(env, pack_cluster_call));
  exports.Set("crc32", Napi::Function::New(env, crc32_call));
  exports.Set("bundleChecksums", Napi::Function::New(env, bundle_checksums_call));
}

}  // namespace pi2
