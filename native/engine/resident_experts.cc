#include "native/engine/resident_experts.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "native/base/carver.h"
#include "native/engine/product.h"
#include "native/kernels/dispatch.h"

namespace pi2 {

namespace {

/** Of a neuron that adds nothing. */
constexpr float kNoFactor = 0.0f;

}  // namespace

size_t ResidentExperts::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t batch = config.batch_size;
  tile_factors_ =
      carver.take<uint16_t>(find_tiles(config.kernel_set) == nullptr ? 0 : factors_length(config.neuron_count, batch));
  column_of_ = carver.take<const uint8_t*>(find_tiles(config.kernel_set) == nullptr ? 0 : config.neuron_count);
  factors_ = carver.take<float>(config.neuron_count * batch);
  tiles_ = carver.take<float>(config.threads * 2 * batch * kListRoom);
  columns_ = carver.take<Column>(kParts * part_room(config.neuron_count));
  order_.use(carver.take<SumOrder::Placed>(config.neuron_count));
  neurons_ = carver.take<uint32_t>(kParts * part_room(config.neuron_count));
  fired_ = carver.take<uint32_t>(chunk_total(config.neuron_count));
  chosen_ = carver.take<uint32_t>(chunk_total(config.neuron_count));
  masks_ = carver.take<uint8_t>(kParts * part_room(config.neuron_count));
  list_counts_ = carver.take<ListCounts>(chunk_total(config.neuron_count));
  part_sums_ = carver.take<float>(kParts * std::min(batch, kFewTokens) * kGroup * group_count(config.hidden_size));
  tile_sums_ = carver.take<float>(config.threads * kTokenTile * kGroup);
  return carver.used();
}

size_t ResidentExperts::scratch_bytes(const EngineConfig& config) { return ResidentExperts().carve(config, nullptr); }

ResidentExperts::ResidentExperts(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, Predictor* predictor,
                                 const SumOrder& order, uint8_t* scratch)
    : config_(&config), kernels_(&kernels), pool_(&pool), predictor_(predictor), order_(order) {
  carve(config, scratch);
}

size_t ResidentExperts::chunks() const { return chunk_total(config_->neuron_count); }

size_t ResidentExperts::part_size() const { return part_room(config_->neuron_count); }

Status ResidentExperts::run(const ExpertJob& job) {
  const size_t neurons = config_->neuron_count - job.first_neuron;
  counters_.neurons_seen += neurons * job.tokens;
  order_.begin(job.layer_index * config_->expert_count + job.expert_index);
  if (job.predictor_x != nullptr) predictor_->begin(job);
  if (job.is_single()) {
    run_one(job);
  } else if (is_few(job)) {
    run_few(job);
  } else {
    run_batch(job);
  }
  if (job.predictor_x != nullptr) {
    size_t chosen = 0;
    for (size_t chunk = job.first_chunk(); chunk < chunks(); chunk++) chosen += chosen_[chunk];
    predictor_->count(neurons * job.tokens, chosen, 0);
  }
  return Status::ok();
}

/** Calls work(chunk, thread, scores) for every chunk of the job; the scores of token t begin at scores + t * kGroup, null if
 * exact. */
template <class Work>
void ResidentExperts::for_chunks(const ExpertJob& job, const Work& work) {
  const TraceSpan span(pool_->trace(), TraceStage::kFind);
  if (job.predictor_x == nullptr) {
    pool_->run(chunks() - job.first_chunk(),
               [&](size_t chunk, size_t thread) { work(job.first_chunk() + chunk, thread, nullptr); });
    return;
  }
  const size_t first_group = job.first_neuron / kGroup;
  pool_->run(group_count(config_->neuron_count) - first_group, [&](size_t task, size_t thread) {
    const size_t group = first_group + task;
    const float* scores = predictor_->score(job, group, 1, thread);
    const size_t end = std::min((group + 1) * kChunksPerGroup, chunks());
    for (size_t chunk = std::max(group * kChunksPerGroup, job.first_chunk()); chunk < end; chunk++) {
      work(chunk, thread, scores + chunk % kChunksPerGroup * kNeuronChunk);
    }
  });
}

void ResidentExperts::run_batch(const ExpertJob& job) {
  const ExpertWeights& expert = job.layer.experts[job.expert_index];
  const LayerWeights& layer = job.layer;
  const Activations& x = job.x;
  const size_t tokens = job.tokens;
  const size_t neurons = config_->neuron_count;
  const size_t batch = config_->batch_size;
  const Matrix& first_matrix = expert.gate.exists() ? expert.gate : expert.up;
  const bool on_tiles = takes_tiles(expert.down.encoding, x);
  if (on_tiles) leave_out(job);
  for_chunks(job, [&](size_t chunk, size_t thread, const float* scores) {
    const size_t first = chunk * kNeuronChunk;
    const size_t count = std::min(kNeuronChunk, neurons - first);
    uint32_t chosen = 0;
    float* gates = tiles_ + thread * 2 * batch * kListRoom;  // (token, neuron of the chunk)
    float* ups = gates + batch * kNeuronChunk;
    multiply_rows(*kernels_, first_matrix, first, count, x, tokens, gates, kNeuronChunk);
    if (expert.gate.exists()) {
      multiply_rows(*kernels_, expert.up, first, count, x, tokens, ups, kNeuronChunk);
    } else {
      std::fill_n(ups, tokens * kNeuronChunk, 1.0f);
    }
    uint32_t fired = 0;
    for (size_t t = 0; t < tokens; t++) {
      float* values = gates + t * kNeuronChunk;
      if (layer.up_bias.exists()) {
        for (size_t j = 0; j < count; j++) values[j] += layer.up_bias.floats()[first + j];
      }
      activate(*config_, values, ups + t * kNeuronChunk, count, values);
      for (size_t j = 0; scores != nullptr && j < count; j++) {
        const float threshold = predictor_->threshold(job.layer_index, first + j, true);
        const bool is_chosen = Predictor::reaches(scores[t * kGroup + j], threshold);
        if (!is_chosen) values[j] = 0.0f;
        chosen += is_chosen;
      }
      for (size_t j = 0; j < count; j++) fired += values[j] != 0.0f;
      for (size_t j = 0; job.fired.wanted() && j < count; j++) {
        if (values[j] != 0.0f) job.fired.mark(t, first + j);
      }
      for (size_t j = 0; job.fired.activations != nullptr && j < count; j++) job.fired.put(t, first + j, values[j]);
      for (size_t j = 0; job.shares != nullptr && j < count; j++) values[j] *= job.shares[t];
    }
    fired_[chunk] = fired;
    chosen_[chunk] = chosen;
    for (size_t j = 0; on_tiles && j < count; j++) {
      const size_t number = order_.number(first + j);
      const bool used = kernels_->tiles->put_factors(gates + j, kNeuronChunk, tokens, number, tile_factors_);
      column_of_[number] = used ? expert.down.rows_from(first + j).weights : nullptr;
    }
    for (size_t j = 0; !on_tiles && j < count; j++) {
      float* factors = factors_ + (first + j) * batch;
      for (size_t t = 0; t < tokens; t++) factors[t] = gates[t * kNeuronChunk + j];
    }
  });
  const TraceSpan span(pool_->trace(), TraceStage::kSum);
  for (size_t chunk = job.first_chunk(); chunk < chunks(); chunk++) counters_.neurons_fired += fired_[chunk];
  counters_.weight_bytes_read += config_->layout.matrices * (neurons - job.first_neuron) * expert.down.row_bytes();
  if (on_tiles) {
    for (size_t i = neurons; i % kFactorChunk != 0; i++) {
      kernels_->tiles->put_factors(&kNoFactor, 0, tokens, i, tile_factors_);
    }
    const TileColumns columns{column_of_, weight_bytes(expert.down.encoding, config_->hidden_size), neurons};
    pool_->run(group_count(config_->hidden_size), [&](size_t group, size_t) {
      sum_columns(*kernels_, expert.down.encoding, columns, tile_factors_, group, tokens, job.out + group * kGroup,
                  job.out_stride);
    });
    return;
  }
  // Which neurons each part adds: those that fired for any token.
  for (size_t chunk = job.first_chunk(); chunk < chunks(); chunk++) {
    if (fired_[chunk] == 0) continue;
    const size_t end = std::min((chunk + 1) * kNeuronChunk, neurons);
    for (size_t i = chunk * kNeuronChunk; i < end; i++) {
      const float* factors = factors_ + i * batch;
      bool used = false;
      for (size_t t = 0; t < tokens && !used; t++) used = factors[t] != 0.0f;
      if (used) order_.place(i, 1.0f, i);
    }
  }
  size_t part_counts[kParts] = {};
  for (size_t part = 0; part < kParts; part++) {
    uint32_t* of_part = neurons_ + part * part_size();
    order_.for_part(part, [&](const SumOrder::Placed& placed) { of_part[part_counts[part]++] = placed.where; });
  }
  const size_t groups = group_count(config_->hidden_size);
  const size_t tiles = (tokens + kTokenTile - 1) / kTokenTile;
  pool_->run(groups * tiles, [&](size_t task, size_t thread) {
    const size_t group = task / tiles;
    const size_t first = task % tiles * kTokenTile;
    const size_t count = std::min(kTokenTile, tokens - first);
    float* sums = tile_sums_ + thread * kTokenTile * kGroup;  // (token of the tile, output of the group)
    for (size_t part = 0; part < kParts; part++) {
      std::memset(sums, 0, count * kGroup * sizeof(float));
      const ColumnList list{expert.down.rows_from(0), neurons_ + part * part_size(), part_counts[part], factors_ + first,
                            batch};
      add_columns(*kernels_, expert.down.encoding, list, group, count, sums, kGroup);
      for (size_t t = 0; t < count; t++) {
        float* y = job.out + (first + t) * job.out_stride + group * kGroup;
        for (size_t i = 0; i < kGroup; i++) y[i] += sums[t * kGroup + i];
      }
    }
    for (size_t t = 0; t < count; t++) {
      kernels_->to_natural_order(expert.down.encoding, job.out + (first + t) * job.out_stride + group * kGroup, 1);
    }
  });
}

/** For the matrix unit: neurons before the job's first have no column and the factor 0. */
void ResidentExperts::leave_out(const ExpertJob& job) {
  pool_->run(job.first_chunk(), [&](size_t chunk, size_t) {
    for (size_t i = chunk * kNeuronChunk; i < (chunk + 1) * kNeuronChunk; i++) {
      const size_t number = order_.number(i);
      kernels_->tiles->put_factors(&kNoFactor, 0, job.tokens, number, tile_factors_);
      column_of_[number] = nullptr;
    }
  });
}

/** One token: writes the neurons that the predictor chooses into neurons_, in ascending order, and returns how many. */
size_t ResidentExperts::choose(const ExpertJob& job) {
  constexpr size_t kBlockChunks = Predictor::kMostGroups * kChunksPerGroup;
  const size_t first_group = job.first_neuron / kGroup;
  const size_t groups = group_count(config_->neuron_count);
  pool_->run((groups - first_group + Predictor::kMostGroups - 1) / Predictor::kMostGroups, [&](size_t block, size_t thread) {
    const size_t group = first_group + block * Predictor::kMostGroups;
    const float* scores = predictor_->score(job, group, std::min(Predictor::kMostGroups, groups - group), thread);
    const size_t begin = group * kChunksPerGroup;
    const size_t end = std::min(begin + kBlockChunks, chunks());
    for (size_t chunk = begin; chunk < end; chunk++, scores += kNeuronChunk) {
      if (chunk < job.first_chunk()) continue;
      const size_t first = chunk * kNeuronChunk;
      const size_t count = std::min(kNeuronChunk, config_->neuron_count - first);
      uint32_t* list = neurons_ + first;
      size_t chosen = 0;
      for (size_t j = 0; j < count; j++) {
        list[chosen] = static_cast<uint32_t>(first + j);
        chosen += Predictor::reaches(scores[j], predictor_->threshold(job.layer_index, first + j, true));
      }
      chosen_[chunk] = static_cast<uint32_t>(chosen);
    }
  });
  size_t total = 0;
  for (size_t chunk = job.first_chunk(); chunk < chunks(); chunk++) {
    std::memmove(neurons_ + total, neurons_ + chunk * kNeuronChunk, chosen_[chunk] * sizeof(uint32_t));
    total += chosen_[chunk];
  }
  return total;
}

/**
 * Places the neurons of a chunk that fire, and returns how many. The chunk is neurons [first, first + count), or those that
 * `chosen` names, up to kListRoom.
 */
size_t ResidentExperts::find_fired(const ExpertJob& job, size_t first, size_t count, const uint32_t* chosen) {
  const ExpertWeights& expert = job.layer.experts[job.expert_index];
  const LayerWeights& layer = job.layer;
  const Activations& x = job.x;
  const Matrix& first_matrix = expert.gate.exists() ? expert.gate : expert.up;
  float gates[kListRoom];
  float ups[kListRoom];
  uint32_t open[kListRoom];  // neurons of the chunk whose gate fires
  size_t open_count = 0;
  // Products of the listed neurons; of all in a row as one matrix, which gives the same bits faster.
  const auto multiply_some = [&](const Matrix& matrix, const uint32_t* list, size_t length, float* y) {
    if (chosen == nullptr && length == count) return multiply_rows(*kernels_, matrix, first, count, x, 1, y, 0);
    const uint8_t* rows[kListRoom];
    for (size_t k = 0; k < length; k++) rows[k] = matrix.rows_from(list[k]).weights;
    multiply_list(*kernels_, matrix.encoding, rows, length, x, y);
  };
  multiply_some(first_matrix, chosen, count, gates);
  for (size_t k = 0; k < count; k++) {
    const size_t neuron = chosen == nullptr ? first + k : chosen[k];
    if (layer.up_bias.exists()) gates[k] += layer.up_bias.floats()[neuron];
    if (!gate_fires(*config_, gates[k])) continue;
    gates[open_count] = gates[k];
    open[open_count++] = static_cast<uint32_t>(neuron);
  }
  if (expert.gate.exists()) {
    multiply_some(expert.up, open, open_count, ups);
  } else {
    for (size_t k = 0; k < open_count; k++) ups[k] = 1.0f;
  }
  activate(*config_, gates, ups, open_count, gates);
  size_t fired = 0;
  for (size_t k = 0; k < open_count; k++) {
    if (gates[k] == 0.0f) continue;
    order_.place(open[k], job.share(0) * gates[k], open[k]);
    fired++;
    if (job.fired.wanted()) job.fired.mark(0, open[k]);
    if (job.fired.activations != nullptr) job.fired.put(0, open[k], gates[k]);
  }
  return fired;
}

/** Sums the fired neurons of a part into part_sums_. */
void ResidentExperts::add_part(const ExpertWeights& expert, size_t part) {
  Column* columns = columns_ + part * part_size();
  size_t count = 0;
  order_.for_part(part, [&](const SumOrder::Placed& placed) {
    const Rows down = expert.down.rows_from(placed.where);
    columns[count++] = {down.weights, down.scales, placed.factor};
  });
  const size_t groups = group_count(config_->hidden_size);
  float* sums = part_sums_ + part * groups * kGroup;
  std::memset(sums, 0, groups * kGroup * sizeof(float));
  add_columns(*kernels_, expert.down.encoding, columns, count, groups, sums);
}

/** Where a list of neurons_ begins, of `count` in all; lists of chosen ones keep those that share a byte of fired bits. */
size_t ResidentExperts::list_start(size_t list, size_t count, bool chosen) const {
  size_t start = std::min(list * kNeuronChunk, count);
  while (chosen && start > 0 && start < count && neurons_[start] / 8 == neurons_[start - 1] / 8) start--;
  return start;
}

void ResidentExperts::run_one(const ExpertJob& job) {
  const ExpertWeights& expert = job.layer.experts[job.expert_index];
  // Chosen neurons are cut into long lists, whatever chunk they are of: a list begins without prefetched rows.
  const uint32_t* chosen = job.predictor_x == nullptr ? nullptr : neurons_;
  const size_t count = chosen == nullptr ? config_->neuron_count - job.first_neuron : choose(job);
  const size_t lists = chunk_total(count);
  pool_->run(lists, [&](size_t chunk, size_t) {
    const size_t first = list_start(chunk, count, chosen != nullptr);
    const size_t listed = list_start(chunk + 1, count, chosen != nullptr) - first;
    const size_t fired = chosen == nullptr ? find_fired(job, job.first_neuron + first, listed, nullptr)
                                           : find_fired(job, 0, listed, chosen + first);
    fired_[chunk] = static_cast<uint32_t>(fired);
  });
  const TraceSpan span(pool_->trace(), TraceStage::kSum);
  pool_->run(kParts, [&](size_t part, size_t) { add_part(expert, part); });
  const size_t groups = group_count(config_->hidden_size);
  pool_->run(groups, [&](size_t group, size_t) {
    float* y = job.out + group * kGroup;
    for (size_t part = 0; part < kParts; part++) {
      const float* sums = part_sums_ + (part * groups + group) * kGroup;
      for (size_t i = 0; i < kGroup; i++) y[i] += sums[i];
    }
    kernels_->to_natural_order(expert.down.encoding, y, 1);
  });

  size_t fired = 0;
  for (size_t chunk = 0; chunk < lists; chunk++) fired += fired_[chunk];
  counters_.neurons_fired += fired;
  counters_.weight_bytes_read += (count + (config_->layout.matrices - 1) * fired) * expert.down.row_bytes();
}

}  // namespace pi2
