#pragma once
/** One graph with one bank's weights, ready to run. */
#include <memory>
#include <string>
#include <vector>

#include "native/npu/onnxruntime_api.h"
#include "native/npu/onnxruntime_config.h"
#include "native/storage/mapped_file.h"

namespace pi2 {

/** What all sessions of a unit share: the library, the weights, and the provider's devices. */
struct OnnxruntimeShared {
  std::unique_ptr<OnnxruntimeApi> api;
  OnnxruntimeConfig config;
  MappedFile weights;
  OrtMemoryInfo* memory = nullptr;
  /** Of the provider that the configuration names; none for the CPU provider. */
  std::vector<const OrtEpDevice*> devices;

  OnnxruntimeShared() = default;
  ~OnnxruntimeShared();
  OnnxruntimeShared(const OnnxruntimeShared&) = delete;
  OnnxruntimeShared& operator=(const OnnxruntimeShared&) = delete;
};

class OnnxruntimeSession {
 public:
  /**
   * Opens `graph` with the weights of bank `bank`, which are packed by the provider; their pages are given back. Refuses a
   * graph whose input and output are not x and y, floats (tokens, hidden). `shared` must outlive the session.
   */
  static Status open(const OnnxruntimeShared& shared, const OnnxruntimeGraph& graph, size_t bank,
                     std::unique_ptr<OnnxruntimeSession>* out);

  /** y = graph(x), on the calling thread. */
  Status run(const OrtValue* x, OrtValue* y) const;

 private:
  OnnxruntimeSession(const OnnxruntimeShared& shared, std::string path);
  Status set_options(OrtSessionOptions* options) const;
  Status add_weights(OrtSessionOptions* options, const OnnxruntimeGraph& graph, size_t bank);
  Status check_shape(GraphShape shape) const;
  Status check_side(bool is_input, const char* name, GraphShape shape) const;

  const OnnxruntimeShared* shared_;
  std::string path_;
  /** Weights as the session refers to them: they must live as long. */
  std::vector<OnnxruntimeOwned<OrtValue>> weights_;
  OnnxruntimeOwned<OrtSession> session_;
};

/** The compiled form of a graph and bank in `contexts`. */
std::string context_file(const std::string& contexts, GraphShape shape, size_t bank);

}  // namespace pi2
