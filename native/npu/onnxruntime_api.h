#pragma once
/** ONNX Runtime as a library that is loaded when it is asked for: its C interface, by function pointers
 * (onnxruntime_slots.h). */
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "native/base/status.h"

struct OrtEnv;
struct OrtStatus;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtEpDevice;

namespace pi2 {

/** The functions that we call, with the types of the public header. */
struct OnnxruntimeFunctions {
  const char* (*get_error_message)(const OrtStatus*);
  OrtStatus* (*create_env)(int level, const char* log_id, OrtEnv**);
  OrtStatus* (*create_session)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);
  OrtStatus* (*run)(OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
                    size_t input_count, const char* const* output_names, size_t output_count, OrtValue** outputs);
  OrtStatus* (*create_session_options)(OrtSessionOptions**);
  OrtStatus* (*disable_memory_pattern)(OrtSessionOptions*);
  OrtStatus* (*disable_cpu_arena)(OrtSessionOptions*);
  OrtStatus* (*set_graph_optimization_level)(OrtSessionOptions*, int level);
  OrtStatus* (*set_intra_op_threads)(OrtSessionOptions*, int threads);
  OrtStatus* (*set_inter_op_threads)(OrtSessionOptions*, int threads);
  OrtStatus* (*session_get_input_count)(const OrtSession*, size_t*);
  OrtStatus* (*session_get_output_count)(const OrtSession*, size_t*);
  OrtStatus* (*session_get_input_type)(const OrtSession*, size_t, OrtTypeInfo**);
  OrtStatus* (*session_get_output_type)(const OrtSession*, size_t, OrtTypeInfo**);
  OrtStatus* (*session_get_input_name)(const OrtSession*, size_t, OrtAllocator*, char**);
  OrtStatus* (*session_get_output_name)(const OrtSession*, size_t, OrtAllocator*, char**);
  OrtStatus* (*create_tensor)(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t dimensions,
                              int type, OrtValue**);
  OrtStatus* (*get_tensor_info)(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**);
  OrtStatus* (*get_element_type)(const OrtTensorTypeAndShapeInfo*, int*);
  OrtStatus* (*get_dimension_count)(const OrtTensorTypeAndShapeInfo*, size_t*);
  OrtStatus* (*get_dimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
  OrtStatus* (*create_cpu_memory_info)(int allocator, int memory, OrtMemoryInfo**);
  OrtStatus* (*allocator_free)(OrtAllocator*, void*);
  OrtStatus* (*get_default_allocator)(OrtAllocator**);
  OrtStatus* (*add_session_config)(OrtSessionOptions*, const char* key, const char* value);
  OrtStatus* (*add_initializer)(OrtSessionOptions*, const char* name, const OrtValue*);
  OrtStatus* (*add_external_initializers)(OrtSessionOptions*, const char* const* names, const OrtValue* const*, size_t);
  OrtStatus* (*register_provider_library)(OrtEnv*, const char* name, const char* path);
  OrtStatus* (*get_devices)(const OrtEnv*, const OrtEpDevice* const**, size_t*);
  OrtStatus* (*append_provider)(OrtSessionOptions*, OrtEnv*, const OrtEpDevice* const*, size_t devices,
                                const char* const* keys, const char* const* values, size_t options);
  const char* (*get_device_provider)(const OrtEpDevice*);
  void (*release_env)(OrtEnv*);
  void (*release_status)(OrtStatus*);
  void (*release_memory_info)(OrtMemoryInfo*);
  void (*release_session)(OrtSession*);
  void (*release_value)(OrtValue*);
  void (*release_type_info)(OrtTypeInfo*);
  void (*release_session_options)(OrtSessionOptions*);
};

/** Something of ONNX Runtime's that is released by a function of its table. */
template <class T>
using OnnxruntimeOwned = std::unique_ptr<T, void (*)(T*)>;

/** The loaded library and its environment, of which a process needs one. The library stays loaded: it has threads and
 * globals. */
class OnnxruntimeApi {
 public:
  /**
   * Loads `library`, a path or a name that the loader looks for. Refused, in words that name the file and what to do: one
   * that is not there, is no ONNX Runtime, is older than 1.22 or has a first number other than 1.
   */
  static Status open(const std::string& library, std::unique_ptr<OnnxruntimeApi>* out);
  ~OnnxruntimeApi();
  OnnxruntimeApi(const OnnxruntimeApi&) = delete;
  OnnxruntimeApi& operator=(const OnnxruntimeApi&) = delete;

  /** As the library says it: `1.24.3`. */
  const std::string& version() const { return version_; }
  const OnnxruntimeFunctions& functions() const { return functions_; }
  OrtEnv* env() const { return env_; }

  /** A status of ours from one of the library's, which is released; `doing` begins the message: `cannot open FILE`. */
  Status check(OrtStatus* status, const std::string& doing) const;

 private:
  OnnxruntimeApi() = default;

  OnnxruntimeFunctions functions_{};
  std::string version_;
  OrtEnv* env_ = nullptr;
};

}  // namespace pi2
