#include "native/addon/onnxruntime_config.h"

#include <cmath>

namespace pi2 {
namespace {

template <class Integer>
std::vector<Integer> whole_numbers(Fields& fields, const char* name) {
  std::vector<Integer> result;
  for (const double number : fields.numbers(name)) {
    if (!(number >= 0 && number <= 9007199254740991.0) || number != std::floor(number)) {
      fields.fail(std::string(name) + " must hold whole numbers");
      return {};
    }
    result.push_back(static_cast<Integer>(number));
  }
  return result;
}

/** The elements of an array of objects, each read by `read`; the first failure is the array's. */
template <class Element, class Read>
std::vector<Element> objects(Fields& fields, const char* name, const Read& read) {
  std::vector<Element> result;
  const Napi::Value value = fields.value(name);
  if (!value.IsArray()) {
    fields.fail(std::string(name) + " must be an array");
    return result;
  }
  const Napi::Array array = value.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length() && fields.status().is_ok(); i++) {
    Fields element(array.Get(i));
    result.push_back(read(element));
    if (!element.status().is_ok()) fields.fail(std::string(name) + ": " + element.status().message());
  }
  return result;
}

std::vector<std::pair<std::string, std::string>> texts(Fields& fields, const char* name) {
  std::vector<std::pair<std::string, std::string>> result;
  const Napi::Value value = fields.value(name);
  if (!value.IsObject()) {
    fields.fail(std::string(name) + " must be an object");
    return result;
  }
  Fields values(value);
  const Napi::Array keys = value.As<Napi::Object>().GetPropertyNames();
  for (uint32_t i = 0; i < keys.Length(); i++) {
    const std::string key = keys.Get(i).ToString().Utf8Value();
    result.emplace_back(key, values.text(key.c_str()));
  }
  if (!values.status().is_ok()) fields.fail(std::string(name) + ": " + values.status().message());
  return result;
}

OnnxruntimeTensor read_tensor(Fields& fields) {
  OnnxruntimeTensor tensor;
  tensor.name = fields.text("name");
  tensor.element_type = static_cast<int>(fields.size("elementType") & 0xff);
  tensor.dimensions = whole_numbers<int64_t>(fields, "dimensions");
  tensor.offset = fields.size("offset");
  tensor.bytes = fields.size("bytes");
  return tensor;
}

OnnxruntimeGraph read_graph(Fields& fields) {
  OnnxruntimeGraph graph;
  graph.shape = {fields.size("tokens"), fields.size("clusters")};
  graph.path = fields.text("path");
  graph.tensors = objects<OnnxruntimeTensor>(fields, "tensors", read_tensor);
  return graph;
}

OnnxruntimeProvider read_provider(Fields& fields) {
  OnnxruntimeProvider provider;
  provider.name = fields.text("name");
  provider.library = fields.text("library");
  provider.options = texts(fields, "options");
  provider.session_options = texts(fields, "sessionOptions");
  provider.contexts = fields.text("contexts");
  return provider;
}

}  // namespace

Status read_onnxruntime_config(const Napi::Value& request, OnnxruntimeConfig* config) {
  Fields fields(request);
  config->library = fields.text("library");
  config->graphs = objects<OnnxruntimeGraph>(fields, "graphs", read_graph);
  config->weights = fields.text("weights");
  config->bank_offsets = whole_numbers<uint64_t>(fields, "bankOffsets");
  config->bank_bytes = fields.size("bankBytes");
  config->hidden = fields.size("hiddenSize");
  Fields provider(fields.value("provider"));
  config->provider = read_provider(provider);
  if (!provider.status().is_ok()) fields.fail("provider: " + provider.status().message());
  return fields.status();
}

}  // namespace pi2
