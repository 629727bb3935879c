#include "native/npu/onnxruntime_api.h"

#include <dlfcn.h>

#include <cstdio>

#include "native/npu/onnxruntime_slots.h"

namespace pi2 {
namespace {

/** What `OrtGetApiBase` gives: the only symbol that the library is asked for by name. */
struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

/** Whether the table's function at `slot` is there; then `*function` is set to it. */
template <class Function>
bool take(const void* const* table, OnnxruntimeSlot slot, Function** function) {
  *function = reinterpret_cast<Function*>(const_cast<void*>(table[static_cast<size_t>(slot)]));
  return *function != nullptr;
}

bool take_all(const void* const* table, OnnxruntimeFunctions* to) {
  using Slot = OnnxruntimeSlot;
  return take(table, Slot::kGetErrorMessage, &to->get_error_message) && take(table, Slot::kCreateEnv, &to->create_env) &&
         take(table, Slot::kCreateSession, &to->create_session) && take(table, Slot::kRun, &to->run) &&
         take(table, Slot::kCreateSessionOptions, &to->create_session_options) &&
         take(table, Slot::kDisableMemPattern, &to->disable_memory_pattern) &&
         take(table, Slot::kDisableCpuMemArena, &to->disable_cpu_arena) &&
         take(table, Slot::kSetSessionGraphOptimizationLevel, &to->set_graph_optimization_level) &&
         take(table, Slot::kSetIntraOpNumThreads, &to->set_intra_op_threads) &&
         take(table, Slot::kSetInterOpNumThreads, &to->set_inter_op_threads) &&
         take(table, Slot::kSessionGetInputCount, &to->session_get_input_count) &&
         take(table, Slot::kSessionGetOutputCount, &to->session_get_output_count) &&
         take(table, Slot::kSessionGetInputTypeInfo, &to->session_get_input_type) &&
         take(table, Slot::kSessionGetOutputTypeInfo, &to->session_get_output_type) &&
         take(table, Slot::kSessionGetInputName, &to->session_get_input_name) &&
         take(table, Slot::kSessionGetOutputName, &to->session_get_output_name) &&
         take(table, Slot::kCreateTensorWithDataAsOrtValue, &to->create_tensor) &&
         take(table, Slot::kCastTypeInfoToTensorInfo, &to->get_tensor_info) &&
         take(table, Slot::kGetTensorElementType, &to->get_element_type) &&
         take(table, Slot::kGetDimensionsCount, &to->get_dimension_count) &&
         take(table, Slot::kGetDimensions, &to->get_dimensions) &&
         take(table, Slot::kCreateCpuMemoryInfo, &to->create_cpu_memory_info) &&
         take(table, Slot::kAllocatorFree, &to->allocator_free) &&
         take(table, Slot::kGetAllocatorWithDefaultOptions, &to->get_default_allocator) &&
         take(table, Slot::kReleaseEnv, &to->release_env) && take(table, Slot::kReleaseStatus, &to->release_status) &&
         take(table, Slot::kReleaseMemoryInfo, &to->release_memory_info) &&
         take(table, Slot::kReleaseSession, &to->release_session) && take(table, Slot::kReleaseValue, &to->release_value) &&
         take(table, Slot::kReleaseTypeInfo, &to->release_type_info) &&
         take(table, Slot::kReleaseSessionOptions, &to->release_session_options) &&
         take(table, Slot::kAddSessionConfigEntry, &to->add_session_config) &&
         take(table, Slot::kAddInitializer, &to->add_initializer) &&
         take(table, Slot::kAddExternalInitializers, &to->add_external_initializers) &&
         take(table, Slot::kRegisterExecutionProviderLibrary, &to->register_provider_library) &&
         take(table, Slot::kGetEpDevices, &to->get_devices) &&
         take(table, Slot::kSessionOptionsAppendExecutionProviderV2, &to->append_provider) &&
         take(table, Slot::kEpDeviceEpName, &to->get_device_provider);
}

}  // namespace

Status OnnxruntimeApi::open(const std::string& library, std::unique_ptr<OnnxruntimeApi>* out) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* const why = dlerror();
    return Status::unit("cannot load ONNX Runtime: " + std::string(why == nullptr ? library.c_str() : why));
  }
  const auto get_base = reinterpret_cast<const ApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  const ApiBase* const base = get_base == nullptr ? nullptr : get_base();
  if (base == nullptr || base->get_api == nullptr || base->get_version == nullptr) {
    return Status::unit(library + " is no ONNX Runtime: it has no OrtGetApiBase");
  }
  std::unique_ptr<OnnxruntimeApi> api(new OnnxruntimeApi());
  const char* const version = base->get_version();
  api->version_ = version == nullptr ? "" : version;
  unsigned major = 0;
  unsigned minor = 0;
  if (std::sscanf(api->version_.c_str(), "%u.%u", &major, &minor) != 2 || major != 1 || minor < kOnnxruntimeApiVersion) {
    return Status::unit(library + " is ONNX Runtime " + api->version_ + "; 1." + std::to_string(kOnnxruntimeApiVersion) +
                        " or newer, below 2, is needed");
  }
  const void* const* const table = base->get_api(kOnnxruntimeApiVersion);
  if (table == nullptr || !take_all(table, &api->functions_)) {
    return Status::unit(library + " was built without functions that are needed");
  }
  const Status status =
      api->check(api->functions_.create_env(static_cast<int>(OnnxruntimeValue::kLogFatal), "powerinfer2", &api->env_),
                 "cannot start " + library);
  if (status.is_ok()) *out = std::move(api);
  return status;
}

OnnxruntimeApi::~OnnxruntimeApi() {
  if (env_ != nullptr) functions_.release_env(env_);
}

Status OnnxruntimeApi::check(OrtStatus* status, const std::string& doing) const {
  if (status == nullptr) return Status::ok();
  const Status failed = Status::unit(doing + ": " + functions_.get_error_message(status));
  functions_.release_status(status);
  return failed;
}

}  // namespace pi2
