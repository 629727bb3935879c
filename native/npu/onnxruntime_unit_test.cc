/**
 * Opens a unit and puts it through its life: for test/46-onnxruntime.ts, which has written graphs, weights and inputs, and
 * for the sanitizers. Argument: a file with one field of OnnxruntimeConfig a line, name and values separated by spaces
 * (paths are the rest of the line), and what to do:
 *
 *     run X Y      loads every graph, asynchronously; runs each for each bank with the floats of file X as inputs; writes
 * the sums, one after the other, to file Y. Prints what was computed open         opens the unit and loads every graph.
 * Prints its name memory       as open, and prints the bytes that the process has more of than before, and those that were
 * promised time RUNS    microseconds a run of each graph, of `activate`, and of an empty start and finish
 *
 * What fails is printed as FAILED: and ends it.
 */
#include "native/npu/onnxruntime_unit.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <thread>

namespace pi2 {
namespace {

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

void require_ok(const Status& status) { require(status.is_ok(), status.message()); }

/** A refusal is expected; its words are printed, so that the test can compare them. */
void require_refused(const Status& status) {
  require(!status.is_ok(), "something was not refused");
  std::printf("refused: %s\n", status.message().c_str());
}

std::string rest_of(std::istream& in) {
  std::string text;
  std::getline(in >> std::ws, text);
  return text;
}

void read_field(const std::string& name, std::istream& in, OnnxruntimeConfig* c) {
  const std::map<std::string, std::string*> texts = {{"library", &c->library},
                                                     {"weights", &c->weights},
                                                     {"provider", &c->provider.name},
                                                     {"providerLibrary", &c->provider.library},
                                                     {"contexts", &c->provider.contexts}};
  if (texts.count(name) == 1) {
    *texts.at(name) = rest_of(in);
  } else if (name == "graph") {
    OnnxruntimeGraph graph;
    in >> graph.shape.tokens >> graph.shape.clusters;
    graph.path = rest_of(in);
    c->graphs.push_back(graph);
  } else if (name == "tensor") {
    OnnxruntimeTensor tensor;
    in >> tensor.name >> tensor.element_type >> tensor.offset >> tensor.bytes;
    tensor.dimensions.assign(std::istream_iterator<int64_t>(in), {});
    require(!c->graphs.empty(), "a graph before its tensors");
    c->graphs.back().tensors.push_back(tensor);
  } else if (name == "bankOffsets") {
    c->bank_offsets.assign(std::istream_iterator<uint64_t>(in), {});
  } else if (name == "bankBytes") {
    in >> c->bank_bytes;
  } else if (name == "hidden") {
    in >> c->hidden;
  } else if (name == "option" || name == "sessionOption") {
    std::string key;
    in >> key;
    (name == "option" ? c->provider.options : c->provider.session_options).emplace_back(key, rest_of(in));
  } else {
    require(false, "no field " + name);
  }
}

OnnxruntimeConfig read_config(const char* path) {
  OnnxruntimeConfig config;
  std::ifstream file(path);
  require(file.good(), "a configuration in " + std::string(path));
  for (std::string line; std::getline(file, line);) {
    std::istringstream in(line);
    std::string name;
    in >> name;
    read_field(name, in, &config);
  }
  return config;
}

std::unique_ptr<DenseUnit> open(const OnnxruntimeConfig& config) {
  std::unique_ptr<DenseUnit> unit;
  require_ok(open_onnxruntime_unit(config, &unit));
  return unit;
}

std::unique_ptr<DenseUnit> load_all(const OnnxruntimeConfig& config) {
  auto unit = open(config);
  for (const OnnxruntimeGraph& graph : config.graphs) unit->load(graph.shape);
  require_ok(unit->finish_loading());
  return unit;
}

/** One run: x into the window, sums out of it. */
void compute(DenseUnit& unit, const OnnxruntimeConfig& config, const std::vector<float>& x, size_t bank,
             std::vector<float>* y) {
  const size_t count = unit.active().tokens * config.hidden;
  std::copy_n(x.begin(), count, unit.inputs());
  require_ok(unit.start(bank, unit.active().tokens));
  require_ok(unit.finish());
  y->assign(unit.sums(), unit.sums() + count);
}

std::vector<float> read_floats(const char* path) {
  std::vector<float> values;
  std::ifstream in(path, std::ios::binary);
  for (float value = 0; in.read(reinterpret_cast<char*>(&value), sizeof value);) values.push_back(value);
  return values;
}

/** Runs every graph for each bank; they are loaded. */
void compute_all(DenseUnit& unit, const OnnxruntimeConfig& config, const std::vector<float>& x, const char* y_path) {
  std::ofstream out(y_path, std::ios::binary);
  std::vector<float> y;
  size_t computed = 0;
  for (const OnnxruntimeGraph& graph : config.graphs) {
    require_ok(unit.activate(graph.shape));
    for (size_t bank = 0; bank < config.bank_offsets.size(); bank++, computed++) {
      compute(unit, config, x, bank, &y);
      out.write(reinterpret_cast<const char*>(y.data()), static_cast<std::streamsize>(y.size() * sizeof(float)));
    }
  }
  std::printf("%s: %zu sums\n", unit.name().c_str(), computed);
}

void live(const OnnxruntimeConfig& config, const char* x_path, const char* y_path) {
  const std::vector<float> x = read_floats(x_path);
  const auto unit = open(config);
  const GraphShape first = config.graphs.front().shape;
  require_refused(unit->activate(first));
  require_refused(unit->start(0, first.tokens));

  unit->load(first);
  require_ok(unit->finish_loading());
  require_ok(unit->activate(first));
  require(unit->active() == first, "the first graph is active");
  std::vector<float> before;
  std::vector<float> y;
  compute(*unit, config, x, 0, &before);
  require_refused(unit->start(0, first.tokens + 1));
  require_refused(unit->start(config.bank_offsets.size(), first.tokens));
  // The others are loaded while the first computes; it must not notice.
  for (const OnnxruntimeGraph& graph : config.graphs) unit->load(graph.shape);
  for (size_t i = 0; i < 50; i++) {
    compute(*unit, config, x, 0, &y);
    require(y == before, "the same sums while others are loaded");
  }
  require_ok(unit->finish_loading());
  compute_all(*unit, config, x, y_path);

  const GraphShape last = config.graphs.back().shape;
  const size_t bytes = unit->bytes();
  unit->unload(last);
  require(unit->bytes() == bytes, "the active graph stays");
  unit->unload(first);
  require(unit->bytes() < bytes, "an unloaded graph gives its memory back");
  require_refused(unit->activate(first));
  require(unit->active() == last, "a refused shape leaves the one before");
  // Loaded again, and unloaded on the way: before it has begun or in the middle.
  unit->load(first);
  unit->unload(first);
  unit->load(first);
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  unit->unload(first);
  require_refused(unit->activate(first));
  unit->load({first.tokens, 99});
  require_refused(unit->finish_loading());
  require_ok(unit->finish_loading());
  require(unit->busy_ns() > 0, "the unit knows how long it computed");
}

/** Anonymous memory and pages of files of this process. */
size_t resident_bytes() {
  std::ifstream status("/proc/self/status");
  size_t kilobytes = 0;
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) kilobytes = std::strtoul(line.c_str() + 6, nullptr, 10);
  }
  return kilobytes * 1024;
}

void measure_memory(const OnnxruntimeConfig& config) {
  const size_t before = resident_bytes();
  const auto unit = load_all(config);
  const size_t loaded = resident_bytes() - before;
  for (const OnnxruntimeGraph& graph : config.graphs) {
    require_ok(unit->activate(graph.shape));
    for (size_t bank = 0; bank < config.bank_offsets.size(); bank++) {
      require_ok(unit->start(bank, graph.shape.tokens));
      require_ok(unit->finish());
    }
  }
  std::printf("%zu loaded %zu used %zu promised\n", loaded, resident_bytes() - before, unit->bytes());
  for (const OnnxruntimeGraph& graph : config.graphs) {
    if (!(graph.shape == unit->active())) unit->unload(graph.shape);
  }
  std::printf("%zu with one graph, %zu promised\n", resident_bytes() - before, unit->bytes());
}

void measure_time(const OnnxruntimeConfig& config, size_t runs) {
  using Clock = std::chrono::steady_clock;
  const auto microseconds = [](Clock::duration took, size_t count) {
    return std::chrono::duration<double, std::micro>(took).count() / static_cast<double>(count);
  };
  const auto begun = Clock::now();
  const auto unit = load_all(config);
  const size_t banks = config.bank_offsets.size();
  std::printf("load %.0f us a session\n", microseconds(Clock::now() - begun, banks * config.graphs.size()));
  for (const OnnxruntimeGraph& graph : config.graphs) {
    auto start = Clock::now();
    for (size_t i = 0; i < runs; i++) require_ok(unit->activate(graph.shape));
    const double activating = microseconds(Clock::now() - start, runs);
    Clock::duration best = Clock::duration::max();
    const uint64_t busy = unit->busy_ns();
    Clock::duration all{};
    for (size_t i = 0; i < runs; i++) {
      start = Clock::now();
      for (size_t bank = 0; bank < banks; bank++) {
        require_ok(unit->start(bank, graph.shape.tokens));
        require_ok(unit->finish());
      }
      all += Clock::now() - start;
      best = std::min(best, Clock::now() - start);
    }
    const double around = microseconds(all, runs * banks) -
                          static_cast<double>(unit->busy_ns() - busy) / 1e3 / static_cast<double>(runs * banks);
    std::printf("t%zu-c%zu: run %.1f us, best %.1f us, handing over %.2f us, activate %.3f us\n", graph.shape.tokens,
                graph.shape.clusters, microseconds(all, runs * banks), microseconds(best, banks), around, activating);
  }
}

int main(int count, char** arguments) {
  require(count >= 3, "a configuration and what to do");
  const OnnxruntimeConfig config = read_config(arguments[1]);
  const std::string what = arguments[2];
  if (what == "live" && count == 5) {
    live(config, arguments[3], arguments[4]);
  } else if (what == "run" && count == 5) {
    compute_all(*load_all(config), config, read_floats(arguments[3]), arguments[4]);
  } else if (what == "open") {
    std::printf("%s\n", load_all(config)->name().c_str());
  } else if (what == "memory") {
    measure_memory(config);
  } else if (what == "time" && count == 4) {
    measure_time(config, std::strtoul(arguments[3], nullptr, 10));
  } else {
    require(false, "no such thing to do: " + what);
  }
  return 0;
}

}  // namespace
}  // namespace pi2

int main(int count, char** arguments) { return pi2::main(count, arguments); }
