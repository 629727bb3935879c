#include "native/npu/onnxruntime_unit.h"

#include <stdlib.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "native/base/memory.h"
#include "native/base/pause.h"
#include "native/npu/onnxruntime_session.h"
#include "native/npu/onnxruntime_slots.h"

namespace pi2 {
namespace {

// Measured with ONNX Runtime 1.24.3 on x64; docs/DENSE_UNIT.md has the figures.
/** The library: its code as far as it is used, and its tables. */
constexpr size_t kLibraryBytes = size_t{32} << 20;
/** What a session takes beside weights: graph, kernels, plan. */
constexpr size_t kSessionBytes = size_t{512} << 10;
/** Packed weights over those in the file: a block of 32 has 16 bytes of weights, 4 of scale, and 4 of sum are added. */
constexpr double kPackedShare = 1.2;
/** The same of a provider that gets its weights in the graph: scales are copied, and the heap is left with gaps. */
constexpr double kCopiedShare = 1.5;

/** About 50 us of pauses, as those of ThreadPool: between two layers there is attention. */
constexpr int kSpins = 2000;

std::string describe(GraphShape shape) {
  return std::to_string(shape.tokens) + " tokens and " + std::to_string(shape.clusters) + " clusters";
}

/** Every bank's session of one shape. */
struct LoadedShape {
  explicit LoadedShape(const OnnxruntimeGraph& made_for) : graph(&made_for) {}

  const OnnxruntimeGraph* graph;
  std::vector<std::unique_ptr<OnnxruntimeSession>> sessions;  // by bank
  OrtValue* x = nullptr;                                      // the window's first tokens
  OrtValue* y = nullptr;
  bool is_loaded = false;
  bool is_cancelled = false;
};

size_t session_bytes(const OnnxruntimeConfig& config, const OnnxruntimeGraph& graph) {
  uint64_t bytes = 0;
  for (const OnnxruntimeTensor& tensor : graph.tensors) bytes += tensor.bytes;
  const double share = config.provider.name.empty() ? kPackedShare : kCopiedShare;
  return static_cast<size_t>(static_cast<double>(bytes) * share) + kSessionBytes;
}

size_t most_tokens(const OnnxruntimeConfig& config) {
  size_t tokens = 0;
  for (const OnnxruntimeGraph& graph : config.graphs) tokens = std::max(tokens, graph.shape.tokens);
  return tokens;
}

const OnnxruntimeGraph* find_graph(const OnnxruntimeConfig& config, GraphShape shape) {
  const auto found = std::find_if(config.graphs.begin(), config.graphs.end(),
                                  [&](const OnnxruntimeGraph& graph) { return graph.shape == shape; });
  return found == config.graphs.end() ? nullptr : &*found;
}

class OnnxruntimeUnit : public DenseUnit {
 public:
  explicit OnnxruntimeUnit(std::unique_ptr<OnnxruntimeShared> shared) : shared_(std::move(shared)) {}
  ~OnnxruntimeUnit() override;

  /** Allocates the window and starts the threads. */
  Status start_threads();

  std::string name() const override {
    const std::string& provider = shared_->config.provider.name;
    return "onnxruntime " + shared_->api->version() + ", " + (provider.empty() ? "cpu" : provider);
  }
  void load(GraphShape shape) override;
  Status finish_loading() override;
  void unload(GraphShape shape) override;
  Status activate(GraphShape shape) override;
  GraphShape active() const override { return active_ == nullptr ? GraphShape{} : active_->graph->shape; }
  float* inputs() override { return window_.as<float>(); }
  const float* sums() const override { return window_.as<float>() + window_.bytes() / sizeof(float) / 2; }
  Status start(size_t bank, size_t tokens) override;
  Status finish() override;
  size_t bytes() const override;
  uint64_t busy_ns() const override { return busy_ns_; }

 private:
  using Shapes = std::vector<std::unique_ptr<LoadedShape>>;

  Shapes::iterator find(GraphShape shape);
  Status load_sessions(LoadedShape* shape);
  Status bind_window(LoadedShape* shape);
  void release(LoadedShape* shape);
  uint32_t wait_for_job(uint32_t seen) const;
  void run_sessions();
  void run_loads();

  const std::unique_ptr<OnnxruntimeShared> shared_;
  HugeMemory window_;  // inputs (token, hidden), sums (token, hidden)

  // Loading: everything here is the mutex's. A shape that is loaded changes no more until it is unloaded, and only the
  // caller unloads, so `active_` and its sessions are used without the mutex.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Shapes shapes_;
  std::deque<LoadedShape*> waiting_;
  LoadedShape* loading_ = nullptr;
  Status load_status_;
  bool is_closing_ = false;
  std::thread loader_;

  // Running: written before `asked_` is released, read after it is acquired; the result goes back the same way by `done_`.
  LoadedShape* active_ = nullptr;
  size_t bank_ = 0;
  Status run_status_;
  uint64_t busy_ns_ = 0;
  bool is_stopping_ = false;
  alignas(64) std::atomic<uint32_t> asked_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  std::thread runner_;
};

OnnxruntimeUnit::~OnnxruntimeUnit() {
  if (runner_.joinable()) {
    (void)finish();
    is_stopping_ = true;
    asked_.fetch_add(1, std::memory_order_release);
    asked_.notify_one();
    runner_.join();
  }
  if (loader_.joinable()) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
      for (const auto& shape : shapes_) shape->is_cancelled = true;
    }
    changed_.notify_all();
    loader_.join();
  }
  for (const auto& shape : shapes_) release(shape.get());
}

Status OnnxruntimeUnit::start_threads() {
  const size_t bytes = 2 * most_tokens(shared_->config) * shared_->config.hidden * sizeof(float);
  Status status = window_.allocate(bytes, "the dense unit's window");
  if (!status.is_ok()) return status;
  runner_ = std::thread([this] { run_sessions(); });
  loader_ = std::thread([this] { run_loads(); });
  return status;
}

OnnxruntimeUnit::Shapes::iterator OnnxruntimeUnit::find(GraphShape shape) {
  return std::find_if(shapes_.begin(), shapes_.end(), [&](const auto& one) { return one->graph->shape == shape; });
}

void OnnxruntimeUnit::load(GraphShape shape) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (find(shape) != shapes_.end()) return;
    const OnnxruntimeGraph* const graph = find_graph(shared_->config, shape);
    if (graph == nullptr) {
      if (load_status_.is_ok()) load_status_ = Status::argument("the model has no graph of " + describe(shape));
      return;
    }
    shapes_.push_back(std::make_unique<LoadedShape>(*graph));
    waiting_.push_back(shapes_.back().get());
  }
  changed_.notify_all();
}

Status OnnxruntimeUnit::finish_loading() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return waiting_.empty() && loading_ == nullptr; });
  // What failed may be tried again.
  std::erase_if(shapes_, [&](const auto& shape) {
    if (!shape->is_loaded) release(shape.get());
    return !shape->is_loaded;
  });
  return std::exchange(load_status_, Status::ok());
}

void OnnxruntimeUnit::unload(GraphShape shape) {
  std::unique_ptr<LoadedShape> gone;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = find(shape);
    if (found == shapes_.end() || found->get() == active_) return;
    LoadedShape* const one = found->get();
    one->is_cancelled = true;
    std::erase(waiting_, one);
    changed_.wait(lock, [&] { return loading_ != one; });
    const auto still = find(shape);
    gone = std::move(*still);
    shapes_.erase(still);
  }
  release(gone.get());
}

Status OnnxruntimeUnit::activate(GraphShape shape) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = find(shape);
  if (found == shapes_.end() || !(*found)->is_loaded) {
    return Status::argument("the dense unit has no loaded graph of " + describe(shape));
  }
  active_ = found->get();
  return Status::ok();
}

Status OnnxruntimeUnit::start(size_t bank, size_t tokens) {
  if (active_ == nullptr || tokens != active_->graph->shape.tokens) {
    return Status::argument("the dense unit was given " + std::to_string(tokens) + " tokens for a graph of " +
                            describe(active()));
  }
  if (bank >= active_->sessions.size()) return Status::argument("the dense unit has no bank " + std::to_string(bank));
  bank_ = bank;
  asked_.fetch_add(1, std::memory_order_release);
  asked_.notify_one();
  return Status::ok();
}

Status OnnxruntimeUnit::finish() {
  const uint32_t asked = asked_.load(std::memory_order_relaxed);
  // As ThreadPool waits for its workers: the engine goes on at once, and a sleeper takes 100 us to wake up.
  for (int spin = 0; done_.load(std::memory_order_acquire) != asked; spin++) {
    if (spin < kSpins) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
  return std::exchange(run_status_, Status::ok());
}

/** Spins, then sleeps, until `asked_` is not `seen`; returns it. */
uint32_t OnnxruntimeUnit::wait_for_job(uint32_t seen) const {
  uint32_t asked = asked_.load(std::memory_order_acquire);
  for (int spin = 0; asked == seen && spin < kSpins; spin++) {
    pause_cpu();
    asked = asked_.load(std::memory_order_acquire);
  }
  while (asked == seen) {
    asked_.wait(seen, std::memory_order_acquire);
    asked = asked_.load(std::memory_order_acquire);
  }
  return asked;
}

/** The life of the thread that computes. */
void OnnxruntimeUnit::run_sessions() {
  for (uint32_t seen = 0;;) {
    seen = wait_for_job(seen);
    if (is_stopping_) return;
    const auto start = std::chrono::steady_clock::now();
    run_status_ = active_->sessions[bank_]->run(active_->x, active_->y);
    // Scales may be read where they lie in the file.
    if (run_status_.is_ok()) run_status_ = shared_->weights.check();
    const auto took = std::chrono::steady_clock::now() - start;
    busy_ns_ += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(took).count());
    done_.store(seen, std::memory_order_release);
  }
}

/** The life of the thread that loads. */
void OnnxruntimeUnit::run_loads() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return is_closing_ || !waiting_.empty(); });
    if (is_closing_) return;
    loading_ = waiting_.front();
    waiting_.pop_front();
    lock.unlock();
    const Status status = load_sessions(loading_);
    lock.lock();
    loading_->is_loaded = status.is_ok() && !loading_->is_cancelled;
    if (load_status_.is_ok() && !loading_->is_cancelled) load_status_ = status;
    loading_ = nullptr;
    changed_.notify_all();
  }
}

Status OnnxruntimeUnit::load_sessions(LoadedShape* shape) {
  Status status = bind_window(shape);
  const size_t banks = shared_->config.bank_offsets.size();
  std::vector<std::unique_ptr<OnnxruntimeSession>> sessions(banks);
  for (size_t bank = 0; bank < banks && status.is_ok(); bank++) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (shape->is_cancelled) return status;
    }
    status = OnnxruntimeSession::open(*shared_, *shape->graph, bank, &sessions[bank]);
  }
  if (status.is_ok()) shape->sessions = std::move(sessions);
  return status;
}

/** x and y of a graph are the first tokens of the window, whatever the bank: they are bound once. */
Status OnnxruntimeUnit::bind_window(LoadedShape* shape) {
  const OnnxruntimeFunctions& call = shared_->api->functions();
  const size_t tokens = shape->graph->shape.tokens;
  const size_t bytes = tokens * shared_->config.hidden * sizeof(float);
  const int64_t sizes[2] = {static_cast<int64_t>(tokens), static_cast<int64_t>(shared_->config.hidden)};
  const int type = static_cast<int>(OnnxruntimeValue::kFloat);
  float* const sums = inputs() + window_.bytes() / sizeof(float) / 2;
  const std::string doing = "cannot bind the dense unit's window";
  const Status status =
      shared_->api->check(call.create_tensor(shared_->memory, inputs(), bytes, sizes, 2, type, &shape->x), doing);
  if (!status.is_ok()) return status;
  return shared_->api->check(call.create_tensor(shared_->memory, sums, bytes, sizes, 2, type, &shape->y), doing);
}

void OnnxruntimeUnit::release(LoadedShape* shape) {
  if (shape->sessions.empty() && shape->x == nullptr) return;
  shape->sessions.clear();
#if defined(__GLIBC__)
  // Packed weights lie between other allocations: the C library keeps what is free among them unless it is asked.
  malloc_trim(0);
#endif
  const OnnxruntimeFunctions& call = shared_->api->functions();
  if (shape->x != nullptr) call.release_value(shape->x);
  if (shape->y != nullptr) call.release_value(shape->y);
  shape->x = nullptr;
  shape->y = nullptr;
}

size_t OnnxruntimeUnit::bytes() const {
  std::vector<GraphShape> shapes;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& shape : shapes_) shapes.push_back(shape->graph->shape);
  return onnxruntime_memory_needed(shared_->config, shapes);
}

/** Whether every byte that the configuration speaks of is there. */
Status check_config(const OnnxruntimeConfig& config, size_t weights_bytes) {
  if (config.hidden == 0 || config.graphs.empty() || config.bank_offsets.empty()) {
    return Status::argument("the dense unit is given no graphs, no banks or no hidden size");
  }
  for (const uint64_t offset : config.bank_offsets) {
    if (offset > weights_bytes || config.bank_bytes > weights_bytes - offset) {
      return Status::io(config.weights + " has " + std::to_string(weights_bytes) + " bytes; a bank of " +
                        std::to_string(config.bank_bytes) + " begins at " + std::to_string(offset) + ": it is cut off");
    }
  }
  for (const OnnxruntimeGraph& graph : config.graphs) {
    if (graph.shape.tokens == 0 || graph.shape.clusters == 0)
      return Status::argument(graph.path + " is for no tokens or clusters");
    for (const OnnxruntimeTensor& tensor : graph.tensors) {
      if (tensor.offset > config.bank_bytes || tensor.bytes > config.bank_bytes - tensor.offset) {
        return Status::argument(graph.path + ": weights " + tensor.name + " are outside of a bank");
      }
    }
  }
  return Status::ok();
}

/** Registers the provider's plug-in and finds its devices. */
Status find_devices(OnnxruntimeShared* shared) {
  const OnnxruntimeProvider& provider = shared->config.provider;
  if (provider.name.empty()) return Status::ok();
  const OnnxruntimeFunctions& call = shared->api->functions();
  Status status;
  if (!provider.library.empty()) {
    status = shared->api->check(
        call.register_provider_library(shared->api->env(), provider.name.c_str(), provider.library.c_str()),
        "cannot load the provider " + provider.name + " from " + provider.library);
  }
  const OrtEpDevice* const* devices = nullptr;
  size_t count = 0;
  if (status.is_ok())
    status = shared->api->check(call.get_devices(shared->api->env(), &devices, &count), "cannot list devices");
  if (!status.is_ok()) return status;
  for (size_t i = 0; i < count; i++) {
    if (provider.name == call.get_device_provider(devices[i])) shared->devices.push_back(devices[i]);
  }
  if (!shared->devices.empty()) return status;
  return Status::unit("the provider " + provider.name + " finds no device here" +
                      (provider.library.empty() ? std::string() : "; it was loaded from " + provider.library));
}

}  // namespace

Status open_onnxruntime_unit(const OnnxruntimeConfig& config, std::unique_ptr<DenseUnit>* unit) {
  auto shared = std::make_unique<OnnxruntimeShared>();
  shared->config = config;
  Status status = shared->weights.open(config.weights);
  if (status.is_ok()) status = check_config(config, shared->weights.size());
  if (status.is_ok()) status = OnnxruntimeApi::open(config.library, &shared->api);
  if (!status.is_ok()) return status;
  status = shared->api->check(
      shared->api->functions().create_cpu_memory_info(static_cast<int>(OnnxruntimeValue::kDeviceAllocator),
                                                      static_cast<int>(OnnxruntimeValue::kDefaultMemory), &shared->memory),
      "cannot start the dense unit");
  if (status.is_ok()) status = find_devices(shared.get());
  if (!status.is_ok()) return status;
  auto opened = std::make_unique<OnnxruntimeUnit>(std::move(shared));
  status = opened->start_threads();
  if (status.is_ok()) *unit = std::move(opened);
  return status;
}

size_t onnxruntime_memory_needed(const OnnxruntimeConfig& config, const std::vector<GraphShape>& shapes) {
  // While a session is opened, the pages of its bank are in memory too.
  size_t bytes = kLibraryBytes + 2 * most_tokens(config) * config.hidden * sizeof(float) + config.bank_bytes;
  for (const GraphShape shape : shapes) {
    const OnnxruntimeGraph* const graph = find_graph(config, shape);
    if (graph != nullptr) bytes += config.bank_offsets.size() * session_bytes(config, *graph);
  }
  return bytes;
}

}  // namespace pi2
