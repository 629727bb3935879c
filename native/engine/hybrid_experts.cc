#include "native/engine/hybrid_experts.h"

#include <algorithm>

namespace pi2 {

/** The graph that computes a part of the job; of no clusters if the unit has no part. */
GraphShape HybridExperts::shape_of(const ExpertJob& job) const {
  return is_used_ ? scheduled_shape(schedule_, job.tokens) : GraphShape{};
}

/** The CPU's part of a job. */
ExpertJob HybridExperts::rest_of(const ExpertJob& job, GraphShape shape) const {
  ExpertJob rest = job;
  rest.first_neuron = shape.clusters == 0 ? 0 : cluster_end(config_->unit, shape.clusters, config_->neuron_count);
  return rest;
}

void HybridExperts::begin(const ExpertJob& job) {
  const ExpertJob rest = rest_of(job, shape_of(job));
  if (rest.first_neuron < config_->neuron_count) cpu_->begin(rest);
}

/** Lets the unit begin with its part of a job. */
Status HybridExperts::start_unit(const ExpertJob& job, GraphShape shape) {
  if (!(unit_->active() == shape)) {
    Status status = unit_->activate(shape);
    if (!status.is_ok()) return status;
    unit_counters_.activations++;
  }
  const size_t hidden = config_->hidden_size;
  float* inputs = unit_->inputs();
  for (size_t t = 0; t < job.tokens; t++) std::copy_n(job.x.token(t), hidden, inputs + t * hidden);
  std::fill_n(inputs + job.tokens * hidden, (shape.tokens - job.tokens) * hidden, 0.0f);
  return unit_->start(job.layer_index * config_->expert_count + job.expert_index, shape.tokens);
}

Status HybridExperts::run(const ExpertJob& job) {
  const GraphShape shape = shape_of(job);
  if (shape.clusters == 0) return cpu_->run(job);
  const uint64_t start = trace_now();
  Status status = cpu_->prepare(job);
  if (status.is_ok()) status = start_unit(job, shape);
  if (!status.is_ok()) return status;
  const size_t threads = pool_->threads();
  const bool takes_turns = config_->unit.threads >= threads;
  if (takes_turns) status = unit_->finish();
  const uint64_t begun = trace_now();
  const ExpertJob rest = rest_of(job, shape);
  Status computed;
  if (status.is_ok() && rest.first_neuron < config_->neuron_count) {
    if (!takes_turns) pool_->limit(threads - config_->unit.threads);
    computed = cpu_->run(rest);
  }
  const uint64_t done = trace_now();
  if (!takes_turns) {
    const TraceSpan span(pool_->trace(), TraceStage::kUnit);
    // Whatever happened, the window must be nobody's when it is filled again.
    status = unit_->finish();
    pool_->limit(threads);
  }
  const uint64_t end = trace_now();
  UnitCounters& counters = unit_counters_;
  counters.jobs++;
  counters.neurons += rest.first_neuron * job.tokens;
  counters.weight_bytes_read +=
      config_->layout.matrices * rest.first_neuron * row_bytes(config_->ffn_encoding, config_->hidden_size);
  counters.job_ns += end - start;
  counters.cpu_ns += done - begun;
  counters.wait_ns += (begun - start) + (end - done);
  if (!status.is_ok()) return status;
  if (computed.is_ok()) add_sums(job);
  return computed;
}

/** Adds what the unit computed to the job's output, with the tokens' routing weights. */
void HybridExperts::add_sums(const ExpertJob& job) const {
  const size_t hidden = config_->hidden_size;
  for (size_t t = 0; t < job.tokens; t++) {
    float* out = job.out + t * job.out_stride;
    const float* sums = unit_->sums() + t * hidden;
    const float share = job.share(t);
    for (size_t i = 0; i < hidden; i++) out[i] += share * sums[i];
  }
}

UnitCounters HybridExperts::unit_counters() const {
  UnitCounters counters = unit_counters_;
  counters.busy_ns = unit_->busy_ns();
  return counters;
}

}  // namespace pi2
