#include "native/engine/mapped_experts.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "native/base/carver.h"
#include "native/engine/load.h"
#include "native/engine/product.h"

namespace pi2 {

size_t MappedExperts::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t chunk_floats = config.threads * config.batch_size * kNeuronChunk;
  tiles_ = carver.take<float>(3 * chunk_floats);
  factors_ = carver.take<float>(chunk_floats);
  part_sums_ = carver.take<float>(kParts * config.batch_size * kGroup * group_count(config.hidden_size));
  return carver.used();
}

size_t MappedExperts::scratch_bytes(const EngineConfig& config) { return MappedExperts().carve(config, nullptr); }

Status MappedExperts::open(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch,
                           std::unique_ptr<Experts>* result) {
  std::unique_ptr<MappedExperts> experts(new MappedExperts());
  experts->config_ = &config;
  experts->kernels_ = &kernels;
  experts->pool_ = &pool;
  experts->carve(config, scratch);
  Status status = check_neurons(config);
  if (status.is_ok()) status = experts->file_.open(config.neurons_path);
  if (status.is_ok()) status = verify_extents(config.neurons_path, config.extents, true, config.threads);
  if (status.is_ok()) *result = std::move(experts);
  return status;
}

Status MappedExperts::run(const ExpertJob& job) {
  const uint8_t* bundles =
      file_.data() + config_->expert_offsets[job.layer_index * config_->expert_count + job.expert_index];
  const size_t chunks = chunk_total(config_->neuron_count);
  // A chunk is done whole before the next, so that a step passes through the file once.
  pool_->run(kParts, [&](size_t part, size_t thread) {
    const size_t floats = config_->batch_size * job.x.stride();
    std::fill_n(part_sums_ + part * floats, job.tokens * job.x.stride(), 0.0f);
    for (size_t chunk = part; chunk < chunks; chunk += kParts) add_chunk(job, bundles, chunk, part, thread);
  });
  add_parts(job);
  for (uint64_t& fired : fired_) counters_.neurons_fired += std::exchange(fired, 0);
  counters_.neurons_seen += config_->neuron_count * job.tokens;
  counters_.weight_bytes_read +=
      config_->layout.matrices * config_->neuron_count * row_bytes(config_->ffn_encoding, config_->hidden_size);
  return file_.check();
}

/** The neuron's row of a matrix; vectors of the same slot follow, one a unit. Other slots differ in two distances. */
Rows MappedExperts::rows_from(const uint8_t* bundles, size_t matrix, size_t neuron) const {
  const BundleLayout& layout = config_->layout;
  const size_t weights = weight_bytes(config_->ffn_encoding, config_->hidden_size);
  const size_t scales = scale_bytes(config_->ffn_encoding, config_->hidden_size);
  const uint8_t* part1 = bundles + layout.part1_at(neuron);
  const uint8_t* part2 = bundles + layout.part2_at(neuron);
  return {matrix == 0 ? part1 : part2 + (matrix - 1) * weights, part1 + weights + matrix * scales, layout.unit_bytes};
}

/** out[t * kNeuronChunk + j] = row (first + j) . x_t for `count` neurons, slot by slot. */
void MappedExperts::multiply_matrix(const ExpertJob& job, const uint8_t* bundles, size_t matrix, size_t first, size_t count,
                                    size_t thread, float* out) {
  const size_t slots = config_->layout.neurons_per_unit;
  float* products = tiles_ + (3 * thread + 2) * config_->batch_size * kNeuronChunk;
  for (size_t slot = 0; slot < std::min(slots, count); slot++) {
    const size_t rows = (count - slot + slots - 1) / slots;
    multiply(*kernels_, config_->ffn_encoding, rows_from(bundles, matrix, first + slot), rows, job.x, job.tokens, products,
             kNeuronChunk);
    for (size_t t = 0; t < job.tokens; t++) {
      for (size_t r = 0; r < rows; r++) out[t * kNeuronChunk + slot + r * slots] = products[t * kNeuronChunk + r];
    }
  }
}

/** Gates, ups and downs of a chunk, the latter added to the part's sums. */
void MappedExperts::add_chunk(const ExpertJob& job, const uint8_t* bundles, size_t chunk, size_t part, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  const size_t count = std::min(kNeuronChunk, config_->neuron_count - first);
  const Matrix& bias = job.layer.up_bias;
  float* gates = tiles_ + 3 * thread * config_->batch_size * kNeuronChunk;  // (token, neuron of the chunk)
  float* ups = gates + config_->batch_size * kNeuronChunk;
  multiply_matrix(job, bundles, 0, first, count, thread, gates);
  if (config_->gated) {
    multiply_matrix(job, bundles, 1, first, count, thread, ups);
  } else {
    std::fill_n(ups, job.tokens * kNeuronChunk, 1.0f);
  }
  for (size_t t = 0; t < job.tokens; t++) {
    float* values = gates + t * kNeuronChunk;
    for (size_t j = 0; bias.exists() && j < count; j++) values[j] += bias.floats()[first + j];
    activate(*config_, values, ups + t * kNeuronChunk, count, values);
    for (size_t j = 0; j < count; j++) {
      fired_[part] += values[j] != 0.0f;
      if (job.fired.wanted() && values[j] != 0.0f) job.fired.mark(t, first + j);
      values[j] *= job.share(t);
    }
  }
  add_down(job, bundles, first, count, gates, thread, part_sums_ + part * config_->batch_size * job.x.stride());
}

/** sums[t] += values[t * kNeuronChunk + j] * down column of neuron first + j, in order of the neurons. */
void MappedExperts::add_down(const ExpertJob& job, const uint8_t* bundles, size_t first, size_t count, const float* values,
                             size_t thread, float* sums) {
  const size_t down = config_->layout.matrices - 1;
  const size_t groups = job.x.groups();
  if (job.tokens == 1) {
    Column columns[kNeuronChunk];
    for (size_t j = 0; j < count; j++) {
      const Rows column = rows_from(bundles, down, first + j);
      columns[j] = {column.weights, column.scales, values[j]};
    }
    return add_columns(*kernels_, config_->ffn_encoding, columns, count, groups, sums);
  }
  const size_t batch = config_->batch_size;
  float* factors = factors_ + thread * batch * kNeuronChunk;  // (neuron of the chunk, token)
  for (size_t j = 0; j < count; j++) {
    for (size_t t = 0; t < job.tokens; t++) factors[j * batch + t] = values[t * kNeuronChunk + j];
  }
  uint32_t numbers[kNeuronChunk];
  for (uint32_t j = 0; j < kNeuronChunk; j++) numbers[j] = j;
  // Neighbours are at one distance only where a unit holds one.
  const size_t together = config_->layout.neurons_per_unit == 1 ? count : 1;
  for (size_t j = 0; j < count; j += together) {
    const ColumnList list{rows_from(bundles, down, first + j), numbers, together, factors + j * batch, batch};
    for (size_t group = 0; group < groups; group++) {
      add_columns(*kernels_, config_->ffn_encoding, list, group, job.tokens, sums + group * kGroup, job.x.stride());
    }
  }
}

void MappedExperts::add_parts(const ExpertJob& job) {
  const size_t length = job.x.stride();
  pool_->run(job.tokens, [&](size_t t, size_t) {
    float* out = job.out + t * job.out_stride;
    for (size_t part = 0; part < kParts; part++) {
      const float* sums = part_sums_ + (part * config_->batch_size + t) * length;
      for (size_t i = 0; i < length; i++) out[i] += sums[i];
    }
    kernels_->to_natural_order(config_->ffn_encoding, out, length / kGroup);
  });
}

}  // namespace pi2
