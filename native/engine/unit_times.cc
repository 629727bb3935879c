#include "native/engine/unit_times.h"

#include <algorithm>
#include <chrono>

#include "native/base/carver.h"
#include "native/engine/neurons.h"
#include "native/engine/product.h"

namespace pi2 {
namespace {

/** Clusters that are measured: one, and so many where there are. */
constexpr size_t kMeasured = 3;
/** Each thing is done so often; the first time wakes threads up, the fastest of the others counts. */
constexpr size_t kTrials = 3;

constexpr size_t tokens_of(size_t graph) { return graph < kSmallBatches ? graph + 1 : kChunkTokens; }

/** The fastest of some trials, without the first. Nanoseconds. */
template <class Work>
double fastest(const Work& work) {
  double best = 0;
  for (size_t trial = 0; trial < kTrials; trial++) {
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    if (trial == 1 || (trial > 1 && took.count() < best)) best = took.count();
  }
  return best;
}

class Measurement {
 public:
  Measurement(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, const std::vector<HotRows>& banks,
              const std::vector<LayerWeights>& layers, Predictor* predictor, DenseUnit& unit)
      : config_(config),
        kernels_(kernels),
        pool_(pool),
        banks_(banks),
        layers_(layers),
        predictor_(predictor),
        unit_(unit),
        clusters_(std::min(config.unit.most_clusters, kMeasured)),
        neurons_(cluster_end(config.unit, clusters_, config.neuron_count)) {}

  Status run(UnitTimes* times) {
    const bool has_chunks = config_.batch_size >= kLeastChunk;
    Status status = memory_.allocate(carve(nullptr), "measuring of the dense unit");
    if (!status.is_ok()) return status;
    carve(memory_.data());
    fill_inputs();
    for (size_t graph = 0; graph < UnitTimes::kGraphs && status.is_ok(); graph++) {
      const size_t tokens = tokens_of(graph);
      const bool is_possible = graph < kSmallBatches ? tokens <= config_.batch_size : has_chunks;
      if (!is_possible) continue;
      status = measure_unit(tokens, &times->unit[graph]);
      times->alone[graph] = measure_cpu(tokens, pool_.threads());
      const size_t left = pool_.threads() - std::min(pool_.threads(), config_.unit.threads);
      times->beside[graph] = left == pool_.threads() || left == 0 ? times->alone[graph] : measure_cpu(tokens, left);
    }
    pool_.limit(pool_.threads());
    return status;
  }

 private:
  size_t carve(uint8_t* memory) {
    Carver carver(memory);
    const size_t hidden = config_.hidden_size;
    const size_t groups = group_count(hidden);
    float* values = carver.take<float>(Activations::float_bytes(hidden, kChunkTokens) / sizeof(float));
    x_ = Activations(values, carver.take<uint8_t>(Activations::form_bytes(kernels_.tiles, hidden, kChunkTokens)), hidden);
    products_ = carver.take<float>(pool_.threads() * kChunkTokens * kNeuronChunk);
    factors_ = carver.take<float>(neurons_ * kSmallBatches);
    numbers_ = carver.take<uint32_t>(neurons_);
    columns_ = carver.take<Column>(neurons_);
    sums_ = carver.take<float>(std::max(kParts, kSmallBatches) * groups * kGroup);
    return carver.used();
  }

  /** Numbers around 0, as norms give them, always the same. */
  void fill_inputs() {
    uint64_t state = 1;
    for (size_t t = 0; t < kChunkTokens; t++) {
      for (size_t i = 0; i < config_.hidden_size; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x_.token(t)[i] = static_cast<float>(static_cast<int32_t>(state >> 32)) / static_cast<float>(1u << 31);
      }
    }
    for (size_t i = 0; i < neurons_; i++) numbers_[i] = static_cast<uint32_t>(i);
    std::fill_n(factors_, neurons_ * kSmallBatches, 1.0f);
  }

  size_t next_bank() { return bank_ = (bank_ + 1) % banks_.size(); }

  /** Each number of clusters up to the most; those between and beyond the two that are measured lie on a line. */
  Status measure_unit(size_t tokens, std::vector<double>* times) {
    double one = 0;
    double some = 0;
    Status status = measure_graph({tokens, 1}, &one);
    const size_t most = tokens == kChunkTokens ? 1 : clusters_;
    if (status.is_ok() && most > 1) status = measure_graph({tokens, most}, &some);
    const double step = most > 1 ? std::max(0.0, (some - one) / static_cast<double>(most - 1)) : one;
    for (size_t c = 0; c < config_.unit.most_clusters; c++) times->push_back(one + static_cast<double>(c) * step);
    return status;
  }

  Status measure_graph(GraphShape shape, double* ns) {
    const GraphShape before = unit_.active();
    unit_.load(shape);
    Status status = unit_.finish_loading();
    if (status.is_ok()) status = unit_.activate(shape);
    if (!status.is_ok()) return status;
    if (before.clusters > 0) unit_.unload(before);
    for (size_t t = 0; t < shape.tokens; t++) {
      std::copy_n(x_.token(t), config_.hidden_size, unit_.inputs() + t * config_.hidden_size);
    }
    *ns = fastest([&] {
      Status trial = unit_.start(next_bank(), shape.tokens);
      if (trial.is_ok()) trial = unit_.finish();
      if (!trial.is_ok()) status = trial;
    });
    return status;
  }

  UnitTimes::Cpu measure_cpu(size_t tokens, size_t threads) {
    const bool is_chunk = tokens == kChunkTokens;
    pool_.limit(threads);
    x_.prepare(kernels_, pool_, tokens, is_chunk);
    const auto neurons = static_cast<double>(neurons_);
    const double rows = fastest([&] { multiply_all(banks_[next_bank()], tokens); }) / neurons;
    const auto matrices = static_cast<double>(config_.layout.matrices);
    // Of so many tokens nearly every neuron fires for one, and products of columns are like those of rows.
    if (is_chunk) return {matrices * rows, 0};
    const double columns = fastest([&] { add_all(banks_[next_bank()], tokens); }) / neurons;
    if (predictor_ == nullptr) return {rows, (matrices - 2) * rows + columns};
    const double score = fastest([&] { score_all(tokens); }) / static_cast<double>(config_.neuron_count);
    return {score, (matrices - 1) * rows + columns};
  }

  void multiply_all(const HotRows& bank, size_t tokens) {
    pool_.run(chunk_total(neurons_), [&](size_t chunk, size_t thread) {
      const size_t first = chunk * kNeuronChunk;
      const Rows rows{bank.first.weights + first * bank.first.stride, bank.first.scales + first * bank.first.stride,
                      bank.first.stride};
      multiply(kernels_, config_.ffn_encoding, rows, std::min(kNeuronChunk, neurons_ - first), x_, tokens,
               products_ + thread * kChunkTokens * kNeuronChunk, kNeuronChunk);
    });
  }

  void add_all(const HotRows& bank, size_t tokens) {
    const size_t groups = group_count(config_.hidden_size);
    std::fill_n(sums_, std::max(kParts, kSmallBatches) * groups * kGroup, 0.0f);
    if (tokens > 1) {
      const ColumnList list{bank.down, numbers_, neurons_, factors_, kSmallBatches};
      return pool_.run(groups, [&](size_t group, size_t) {
        add_columns(kernels_, config_.ffn_encoding, list, group, tokens, sums_ + group * kGroup, groups * kGroup);
      });
    }
    for (size_t i = 0; i < neurons_; i++) {
      columns_[i] = {bank.down.weights + i * bank.down.stride, bank.down.scales + i * bank.down.stride, 1.0f};
    }
    pool_.run(kParts, [&](size_t part, size_t) {
      const size_t begin = part * neurons_ / kParts;
      const size_t end = (part + 1) * neurons_ / kParts;
      add_columns(kernels_, config_.ffn_encoding, columns_ + begin, end - begin, groups, sums_ + part * groups * kGroup);
    });
  }

  void score_all(size_t tokens) {
    const size_t bank = next_bank();
    const size_t layer = bank / config_.expert_count;
    const ExpertJob job{layer, bank % config_.expert_count, layers_[layer], x_, &x_, tokens, nullptr, nullptr, 0, {}, 0};
    predictor_->begin(job);
    const size_t together = tokens <= kFewTokens ? Predictor::kMostGroups : 1;
    const size_t groups = group_count(config_.neuron_count);
    pool_.run((groups + together - 1) / together, [&](size_t block, size_t thread) {
      const size_t group = block * together;
      predictor_->score(job, group, std::min(together, groups - group), thread);
    });
  }

  const EngineConfig& config_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const std::vector<HotRows>& banks_;
  const std::vector<LayerWeights>& layers_;
  Predictor* predictor_;
  DenseUnit& unit_;
  const size_t clusters_;
  const size_t neurons_;
  size_t bank_ = 0;
  HugeMemory memory_;
  Activations x_;
  float* products_ = nullptr;    // (thread, token, neuron of a chunk)
  float* factors_ = nullptr;     // (neuron, kSmallBatches)
  uint32_t* numbers_ = nullptr;  // (neuron): 0, 1, …
  Column* columns_ = nullptr;    // (neuron)
  float* sums_ = nullptr;        // (part or token, padded hidden)
};

}  // namespace

Status measure_unit_times(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool,
                          const std::vector<HotRows>& banks, const std::vector<LayerWeights>& layers, Predictor* predictor,
                          DenseUnit& unit, UnitTimes* times) {
  if (config.unit.most_clusters == 0) return Status::ok();
  return Measurement(config, kernels, pool, banks, layers, predictor, unit).run(times);
}

}  // namespace pi2
