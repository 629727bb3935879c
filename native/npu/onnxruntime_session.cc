#include "native/npu/onnxruntime_session.h"

#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "native/npu/onnxruntime_slots.h"
#include "native/storage/reader.h"

namespace pi2 {
namespace {

/** Whole pages inside [begin, begin + bytes), which were read once: the packed copy is what is used from now on. */
void give_back(const uint8_t* begin, size_t bytes) {
  const auto first = (reinterpret_cast<uintptr_t>(begin) + kPageBytes - 1) / kPageBytes * kPageBytes;
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPageBytes * kPageBytes;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace

OnnxruntimeShared::~OnnxruntimeShared() {
  if (memory != nullptr) api->functions().release_memory_info(memory);
}

std::string context_file(const std::string& contexts, GraphShape shape, size_t bank) {
  return contexts + "/t" + std::to_string(shape.tokens) + "-c" + std::to_string(shape.clusters) + "-b" +
         std::to_string(bank) + ".onnx";
}

OnnxruntimeSession::OnnxruntimeSession(const OnnxruntimeShared& shared, std::string path)
    : shared_(&shared), path_(std::move(path)), session_(nullptr, shared.api->functions().release_session) {}

Status OnnxruntimeSession::open(const OnnxruntimeShared& shared, const OnnxruntimeGraph& graph, size_t bank,
                                std::unique_ptr<OnnxruntimeSession>* out) {
  const OnnxruntimeFunctions& call = shared.api->functions();
  const std::string& contexts = shared.config.provider.contexts;
  const std::string compiled = contexts.empty() ? "" : context_file(contexts, graph.shape, bank);
  const bool is_compiled = !compiled.empty() && access(compiled.c_str(), R_OK) == 0;
  std::unique_ptr<OnnxruntimeSession> session(new OnnxruntimeSession(shared, is_compiled ? compiled : graph.path));
  const std::string doing = "cannot open " + session->path_;
  const auto check = [&](OrtStatus* status) { return shared.api->check(status, doing); };

  OrtSessionOptions* made = nullptr;
  Status status = check(call.create_session_options(&made));
  const OnnxruntimeOwned<OrtSessionOptions> options(made, call.release_session_options);
  if (status.is_ok()) status = session->set_options(made);
  if (status.is_ok() && !is_compiled) status = session->add_weights(made, graph, bank);
  if (status.is_ok() && !is_compiled && !compiled.empty()) {
    status = check(call.add_session_config(made, "ep.context_enable", "1"));
    if (status.is_ok()) status = check(call.add_session_config(made, "ep.context_file_path", compiled.c_str()));
    if (status.is_ok()) status = check(call.add_session_config(made, "ep.context_embed_mode", "0"));
  }
  OrtSession* opened = nullptr;
  if (status.is_ok()) status = check(call.create_session(shared.api->env(), session->path_.c_str(), made, &opened));
  session->session_.reset(opened);
  give_back(shared.weights.data() + shared.config.bank_offsets[bank], shared.config.bank_bytes);
  if (status.is_ok()) status = session->check_shape(graph.shape);
  // Weights that could not be read were zeros.
  if (status.is_ok()) status = shared.weights.check();
  if (status.is_ok()) *out = std::move(session);
  return status;
}

Status OnnxruntimeSession::set_options(OrtSessionOptions* options) const {
  const OnnxruntimeFunctions& call = shared_->api->functions();
  const OnnxruntimeProvider& provider = shared_->config.provider;
  const auto check = [&](OrtStatus* status) { return shared_->api->check(status, "cannot open " + path_); };
  // One thread, the one that calls: on few cores a second one only waits for the first, and ONNX Runtime's would spin.
  Status status = check(call.set_intra_op_threads(options, 1));
  if (status.is_ok()) status = check(call.set_inter_op_threads(options, 1));
  if (status.is_ok()) {
    status = check(call.set_graph_optimization_level(options, static_cast<int>(OnnxruntimeValue::kOptimizeAll)));
  }
  // Each session would keep an arena of its own; one runs at a time, so what a run takes is given back after it.
  if (status.is_ok()) status = check(call.disable_cpu_arena(options));
  if (status.is_ok()) status = check(call.disable_memory_pattern(options));
  if (status.is_ok()) status = check(call.add_session_config(options, "session.intra_op.allow_spinning", "0"));
  for (const auto& [key, value] : provider.session_options) {
    if (status.is_ok()) status = check(call.add_session_config(options, key.c_str(), value.c_str()));
  }
  if (!status.is_ok() || provider.name.empty()) return status;
  std::vector<const char*> keys;
  std::vector<const char*> values;
  for (const auto& [key, value] : provider.options) {
    keys.push_back(key.c_str());
    values.push_back(value.c_str());
  }
  return check(call.append_provider(options, shared_->api->env(), shared_->devices.data(), shared_->devices.size(),
                                    keys.data(), values.data(), keys.size()));
}

Status OnnxruntimeSession::add_weights(OrtSessionOptions* options, const OnnxruntimeGraph& graph, size_t bank) {
  const OnnxruntimeFunctions& call = shared_->api->functions();
  const bool is_cpu = shared_->config.provider.name.empty();
  std::vector<const char*> names;
  std::vector<const OrtValue*> values;
  for (const OnnxruntimeTensor& tensor : graph.tensors) {
    const std::string doing = "cannot give " + path_ + " its weights " + tensor.name;
    const uint8_t* data = shared_->weights.data() + shared_->config.bank_offsets[bank] + tensor.offset;
    OrtValue* value = nullptr;
    // The mapping is only read: ONNX Runtime takes initializers as constants.
    Status status = shared_->api->check(
        call.create_tensor(shared_->memory, const_cast<uint8_t*>(data), tensor.bytes, tensor.dimensions.data(),
                           tensor.dimensions.size(), tensor.element_type, &value),
        doing);
    if (!status.is_ok()) return status;
    weights_.emplace_back(value, call.release_value);
    names.push_back(tensor.name.c_str());
    values.push_back(value);
    // The CPU provider takes a tensor from where it is; a provider that compiles the graph has to find it in the graph, and
    // that costs a copy of what it does not pack.
    if (is_cpu) status = shared_->api->check(call.add_initializer(options, tensor.name.c_str(), value), doing);
    if (!status.is_ok()) return status;
  }
  if (is_cpu || names.empty()) return Status::ok();
  return shared_->api->check(call.add_external_initializers(options, names.data(), values.data(), names.size()),
                             "cannot give " + path_ + " its weights");
}

Status OnnxruntimeSession::check_shape(GraphShape shape) const {
  const Status status = check_side(true, "x", shape);
  return status.is_ok() ? check_side(false, "y", shape) : status;
}

/** Whether the only input or output is called `name` and is floats (tokens, hidden). */
Status OnnxruntimeSession::check_side(bool is_input, const char* name, GraphShape shape) const {
  const OnnxruntimeFunctions& call = shared_->api->functions();
  const OrtSession* session = session_.get();
  const auto check = [&](OrtStatus* status) { return shared_->api->check(status, "cannot look into " + path_); };
  const auto refuse = [&](const std::string& found) {
    return Status::unit(path_ + ": its " + (is_input ? "input" : "output") + " is " + found + "; expected " + name +
                        ", floats (" + std::to_string(shape.tokens) + ", " + std::to_string(shared_->config.hidden) +
                        "); convert the model again");
  };
  size_t count = 0;
  Status status = check((is_input ? call.session_get_input_count : call.session_get_output_count)(session, &count));
  if (status.is_ok() && count != 1) return refuse(std::to_string(count) + " tensors");
  OrtAllocator* allocator = nullptr;
  if (status.is_ok()) status = check(call.get_default_allocator(&allocator));
  char* found_name = nullptr;
  if (status.is_ok()) {
    status =
        check((is_input ? call.session_get_input_name : call.session_get_output_name)(session, 0, allocator, &found_name));
  }
  if (!status.is_ok()) return status;
  const std::string found = found_name;
  status = check(call.allocator_free(allocator, found_name));
  if (status.is_ok() && found != name) return refuse(found);

  OrtTypeInfo* type = nullptr;
  if (status.is_ok()) {
    status = check((is_input ? call.session_get_input_type : call.session_get_output_type)(session, 0, &type));
  }
  const OnnxruntimeOwned<OrtTypeInfo> owned(type, call.release_type_info);
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  if (status.is_ok()) status = check(call.get_tensor_info(type, &tensor));
  if (status.is_ok() && tensor == nullptr) return refuse("no tensor");
  int element_type = 0;
  size_t dimensions = 0;
  if (status.is_ok()) status = check(call.get_element_type(tensor, &element_type));
  if (status.is_ok()) status = check(call.get_dimension_count(tensor, &dimensions));
  if (!status.is_ok()) return status;
  if (element_type != static_cast<int>(OnnxruntimeValue::kFloat)) {
    return refuse("of element type " + std::to_string(element_type));
  }
  if (dimensions != 2) return refuse("of " + std::to_string(dimensions) + " dimensions");
  int64_t sizes[2] = {};
  status = check(call.get_dimensions(tensor, sizes, 2));
  if (!status.is_ok()) return status;
  if (sizes[0] != static_cast<int64_t>(shape.tokens) || sizes[1] != static_cast<int64_t>(shared_->config.hidden)) {
    return refuse("(" + std::to_string(sizes[0]) + ", " + std::to_string(sizes[1]) + ")");
  }
  return status;
}

Status OnnxruntimeSession::run(const OrtValue* x, OrtValue* y) const {
  const char* const input = "x";
  const char* const output = "y";
  OrtStatus* const status = shared_->api->functions().run(session_.get(), nullptr, &input, &x, 1, &output, 1, &y);
  return status == nullptr ? Status::ok() : shared_->api->check(status, "cannot compute " + path_);
}

}  // namespace pi2
