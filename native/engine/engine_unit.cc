/** Engine: its dense unit. */
#include "native/engine/engine.h"
#include "native/engine/streamed_experts.h"
#include "native/engine/unit_plan.h"
#include "native/npu/faulty_unit.h"
#include "native/npu/host_unit.h"
#include "native/npu/onnxruntime_unit.h"

namespace pi2 {
namespace {

/** The graphs of a schedule that an engine which computes so many tokens together can need. */
std::vector<GraphShape> scheduled_shapes(const UnitConfig::Schedule& clusters, size_t batch_size) {
  std::vector<GraphShape> shapes;
  for (size_t graph = 0; graph < clusters.size(); graph++) {
    const bool is_chunk = graph == kSmallBatches;
    const GraphShape shape{is_chunk ? kChunkTokens : graph + 1, clusters[graph]};
    const bool is_possible = batch_size >= (is_chunk ? kLeastChunk : shape.tokens);
    if (shape.clusters > 0 && is_possible) shapes.push_back(shape);
  }
  return shapes;
}

/** All rows of an expert that is in memory. */
HotRows resident_rows(const ExpertWeights& expert) {
  const Rows up = expert.up.rows_from(0);
  return {expert.gate.exists() ? expert.gate.rows_from(0) : up, up, expert.down.rows_from(0), nullptr};
}

}  // namespace

Status check_unit(const EngineConfig& c) {
  const UnitConfig& unit = c.unit;
  if (!unit.enabled()) return Status::ok();
  if (c.mapped) return Status::argument("a mapped model is computed without a dense unit");
  const bool sizes = unit.cluster_neurons > 0 && unit.cluster_neurons % kNeuronChunk == 0 &&
                     unit.cluster_neurons <= c.neuron_count + kNeuronChunk && unit.most_clusters <= kMostClusters &&
                     unit.threads <= c.threads && (unit.kind != UnitKind::kHost || unit.threads > 0);
  if (!sizes) return Status::argument("the dense unit's clusters or threads do not fit the model");
  for (const size_t clusters : unit.clusters) {
    if (clusters > unit.most_clusters) return Status::argument("a schedule of more clusters than the dense unit has");
  }
  const size_t neurons = cluster_end(unit, unit.most_clusters, c.neuron_count);
  for (const BankPlan& plan : c.stream.banks) {
    if (unit.kind == UnitKind::kHost && plan.hot_neurons < neurons) {
      return Status::argument("the hot region does not hold the dense unit's clusters");
    }
  }
  return Status::ok();
}

size_t unit_bytes_needed(const EngineConfig& config) {
  const UnitConfig& unit = config.unit;
  switch (unit.kind) {
    case UnitKind::kNone: return 0;
    case UnitKind::kHost: return HostUnit::bytes_needed(config);
    case UnitKind::kOnnxruntime: break;
  }
  // Which graphs a schedule will have that is chosen later is not known: at worst all of the most clusters.
  UnitConfig::Schedule clusters = unit.clusters;
  if (clusters == UnitConfig::Schedule{}) clusters.fill(unit.most_clusters);
  return onnxruntime_memory_needed(unit.onnxruntime, scheduled_shapes(clusters, config.batch_size));
}

/** The dense unit, if there is to be one, with all graphs of its schedule. */
Status Engine::open_unit() {
  const UnitConfig& unit = config_.unit;
  if (!unit.enabled()) return Status::ok();
  for (size_t bank = 0; bank < config_.expert_offsets.size(); bank++) {
    const LayerWeights& layer = weights_.layers[bank / config_.expert_count];
    HotRows rows =
        streamed_ != nullptr ? streamed_->hot_rows(bank) : resident_rows(layer.experts[bank % config_.expert_count]);
    rows.bias = layer.up_bias.exists() ? layer.up_bias.floats() : nullptr;
    hot_rows_.push_back(rows);
  }
  Status status = unit.kind == UnitKind::kHost ? HostUnit::open(config_, *kernels_, hot_rows_, &unit_)
                                               : open_onnxruntime_unit(unit.onnxruntime, &unit_);
  if (!status.is_ok()) return status;
  if (unit.fail_job > 0) unit_ = std::make_unique<FaultyUnit>(std::move(unit_), unit.fail_job);
  hybrid_.emplace(config_, *pool_, *experts_, *unit_);
  return set_unit_schedule(unit.clusters);
}

Status Engine::measure_unit(UnitTimes* times) {
  if (!hybrid_) return Status::argument("the engine has no dense unit");
  const size_t neurons = cluster_end(config_.unit, config_.unit.most_clusters, config_.neuron_count);
  for (const BankPlan& plan : config_.stream.banks) {
    if (plan.hot_neurons < neurons) return Status::argument("the hot region does not hold what is to be measured");
  }
  const Status filled = streamed_ != nullptr ? streamed_->fill_all() : Status::ok();
  if (!filled.is_ok()) return filled;
  Predictor* predictor = config_.predictor.enabled() ? &predictor_ : nullptr;
  return measure_unit_times(config_, *kernels_, *pool_, hot_rows_, weights_.layers, predictor, *unit_, times);
}

Status Engine::set_unit_schedule(const UnitConfig::Schedule& clusters) {
  if (!hybrid_) return Status::argument("the engine has no dense unit");
  for (const GraphShape shape : scheduled_shapes(clusters, config_.batch_size)) unit_->load(shape);
  Status status = unit_->finish_loading();
  if (status.is_ok()) hybrid_->set_schedule(clusters);
  return status;
}

}  // namespace pi2
