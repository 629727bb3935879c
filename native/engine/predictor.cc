#include "native/engine/predictor.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "native/base/carver.h"
#include "native/engine/product.h"
#include "native/kernels/half.h"

namespace pi2 {
namespace {

using Clock = std::chrono::steady_clock;

/** Hidden units that one thread takes at a time: ranks are small, and every thread should get some. */
constexpr size_t kUnitChunk = 32;

/** Of the units of a token that are not 0, a rough guess uses this share. */
constexpr double kRoughShare = 0.75;
/** The size of a column is estimated from one group in so many. */
constexpr size_t kSizeSteps = 8;

uint64_t ns_since(Clock::time_point start) {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count());
}

/** Hidden units of the largest predictor, by the shapes that are asked for; `load` checks them. */
size_t most_rank(const EngineConfig& config) {
  size_t rank = 0;
  for (const TensorConfig& tensor : config.predictor.tensors) {
    if (tensor.name.ends_with(".fc1")) rank = std::max(rank, tensor.rows / config.expert_count);
  }
  return rank;
}

/** Root of the sum of squares of the scales of every kSizeSteps-th group of a vector; of its numbers, where it has no
 * scales. */
float estimate_size(const Matrix& matrix, size_t row) {
  const Rows rows = matrix.rows_from(row);
  const bool is_scaled = scale_bytes(matrix.encoding, kGroup) > 0;
  const size_t count = is_scaled ? kGroupBlocks : kGroup;
  const auto* halves = reinterpret_cast<const uint16_t*>(is_scaled ? rows.scales : rows.weights);
  float sum = 0;
  for (size_t group = 0; group < group_count(matrix.columns); group += kSizeSteps) {
    for (size_t i = 0; i < count; i++) {
      const float number = half_to_float_scalar(halves[group * count + i]);
      sum += number * number;
    }
  }
  return std::sqrt(sum);
}

}  // namespace

size_t Predictor::bytes_needed(const EngineConfig& config) {
  size_t units = 0;
  for (const TensorConfig& tensor : config.predictor.tensors) units += tensor.name.ends_with(".fc2") ? tensor.rows : 0;
  return TensorFile::bytes_needed(config.predictor.extents) + units * sizeof(float);
}

size_t Predictor::carve(const EngineConfig& config, uint8_t* scratch) {
  Carver carver(scratch);
  const size_t rank = most_rank(config);
  hidden_ = carver.take<float>(config.batch_size * rank);
  factors_ = carver.take<float>(rank * config.batch_size);
  units_ = carver.take<uint32_t>(rank);
  const size_t few = std::min(config.batch_size, kFewTokens);
  columns_ = carver.take<Column>(few * rank);
  scores_room_ = std::max(config.batch_size, few * kMostGroups) * kGroup;
  scores_ = carver.take<float>(config.threads * scores_room_);
  times_ = carver.take<ThreadTime>(config.threads);
  return carver.used();
}

size_t Predictor::scratch_bytes(const EngineConfig& config) {
  return config.predictor.enabled() ? Predictor().carve(config, nullptr) : 0;
}

Status Predictor::load(const EngineConfig& config) {
  const PredictorConfig& predictor = config.predictor;
  if (predictor.memory_thresholds.size() != config.layer_count || predictor.flash_thresholds.size() != config.layer_count) {
    return Status::argument("memoryThresholds and flashThresholds must have one entry a layer");
  }
  Status status = file_.load(predictor.path, predictor.extents, predictor.tensors, config.threads, "predictors");
  if (!status.is_ok()) return status;
  TensorTaker taker(file_);
  for (size_t i = 0; i < config.layer_count; i++) {
    const std::string prefix = "layers." + std::to_string(i) + ".predictor.";
    const Matrix* fc1 = file_.find(prefix + "fc1");
    if (fc1 == nullptr || fc1->rows == 0 || fc1->rows % config.expert_count != 0) {
      return Status::argument(prefix + "fc1: missing, or not of the same rank for every expert");
    }
    Layer layer;
    layer.rank = fc1->rows / config.expert_count;
    taker.take(prefix + "fc1", fc1->rows, config.hidden_size, true, false, &layer.fc1);
    taker.take(prefix + "fc2", fc1->rows, config.neuron_count, true, false, &layer.fc2);
    taker.take(prefix + "bias", config.expert_count, config.neuron_count, true, true, &layer.bias);
    layer.first_size = sizes_.size();
    layers_.push_back(layer);
    sizes_.resize(sizes_.size() + fc1->rows);
  }
  if (!taker.status().is_ok()) return taker.status();
  for (const Layer& layer : layers_) {
    for (size_t unit = 0; unit < layer.fc2.rows; unit++) sizes_[layer.first_size + unit] = estimate_size(layer.fc2, unit);
  }
  return Status::ok();
}

void Predictor::bind(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch) {
  config_ = &config;
  kernels_ = &kernels;
  pool_ = &pool;
  carve(config, scratch);
}

void Predictor::begin(const ExpertJob& job, bool rough) {
  const TraceSpan span(pool_->trace(), TraceStage::kPredict);
  const auto start = Clock::now();
  const Layer& layer = layers_[job.layer_index];
  const size_t rank = layer.rank;
  const size_t first = job.expert_index * rank;
  const size_t batch = config_->batch_size;
  pool_->run((rank + kUnitChunk - 1) / kUnitChunk, [&](size_t chunk, size_t) {
    const size_t unit = chunk * kUnitChunk;
    multiply_rows(*kernels_, layer.fc1, first + unit, std::min(kUnitChunk, rank - unit), *job.predictor_x, job.tokens,
                  hidden_ + unit, rank);
  });
  active_ = 0;
  column_counts_.fill(0);
  for (size_t unit = 0; unit < rank; unit++) {
    bool active = false;
    for (size_t t = 0; t < job.tokens; t++) {
      const float value = hidden_[t * rank + unit];
      // Negated, so that what is not a number goes on.
      const bool is_on = !(value <= 0);
      active |= is_on;
      if (job.tokens > kFewTokens) {
        factors_[unit * batch + t] = is_on ? value : 0.0f;
      } else if (is_on) {
        const Rows column = layer.fc2.rows_from(first + unit);
        columns_[t * rank + column_counts_[t]++] = {column.weights, column.scales, value};
      }
    }
    if (active) units_[active_++] = static_cast<uint32_t>(unit);
  }
  if (rough && job.tokens == 1) keep_strongest(layer, first);
  counters_.weight_bytes_read += rank * layer.fc1.row_bytes() + active_ * layer.fc2.row_bytes();
  counters_.ns += ns_since(start) * pool_->threads();
}

/** Of one token's columns those with the largest part in scores, in their order. */
void Predictor::keep_strongest(const Layer& layer, size_t first) {
  const auto kept = static_cast<size_t>(std::ceil(kRoughShare * static_cast<double>(active_)));
  if (kept == active_) return;
  const float* sizes = sizes_.data() + layer.first_size + first;
  // What is not a number counts as large, and compares.
  const auto strength = [&](size_t unit) {
    constexpr float kLarge = std::numeric_limits<float>::max();
    const float value = hidden_[unit] * sizes[unit];
    return value < kLarge ? value : kLarge;
  };
  size_t count = 0;
  for (size_t unit = 0; unit < layer.rank; unit++) {
    if (!(hidden_[unit] <= 0)) factors_[count++] = strength(unit);
  }
  std::nth_element(factors_, factors_ + kept - 1, factors_ + count, std::greater<float>());
  const float least = factors_[kept - 1];
  count = active_ = 0;
  for (size_t unit = 0; unit < layer.rank; unit++) {
    if (hidden_[unit] <= 0) continue;
    const Column column = columns_[count++];
    if (strength(unit) >= least) columns_[active_++] = column;
  }
  column_counts_[0] = active_;
}

const float* Predictor::score(const ExpertJob& job, size_t first, size_t count, size_t thread) {
  const TraceSpan span(pool_->trace(), TraceStage::kPredict);
  const auto start = Clock::now();
  const Layer& layer = layers_[job.layer_index];
  const size_t batch = config_->batch_size;
  const size_t room = count * kGroup;
  float* scores = scores_ + thread * scores_room_;
  std::memset(scores, 0, job.tokens * room * sizeof(float));
  if (job.tokens <= kFewTokens) {
    for (size_t t = 0; t < job.tokens; t++) {
      const Column* columns = columns_ + t * layer.rank;
      add_columns_of_groups(*kernels_, layer.fc2.encoding, columns, column_counts_[t], first, count, scores + t * room);
    }
  } else {
    const ColumnList list{layer.fc2.rows_from(job.expert_index * layer.rank), units_, active_, factors_, batch};
    add_columns(*kernels_, layer.fc2.encoding, list, first, job.tokens, scores, kGroup);
  }
  const size_t neuron = first * kGroup;
  const size_t neurons = std::min(room, config_->neuron_count - neuron);
  const float* bias = layer.bias.floats() + job.expert_index * config_->neuron_count + neuron;
  for (size_t t = 0; t < job.tokens; t++) {
    float* of_token = scores + t * room;
    kernels_->to_natural_order(layer.fc2.encoding, of_token, count);
    for (size_t j = 0; j < neurons; j++) of_token[j] += bias[j];
  }
  times_[thread].ns += ns_since(start);
  return scores;
}

void Predictor::find_likely(const ExpertJob& job, const float* scores, size_t count, uint8_t* likely) const {
  const PredictorConfig& predictor = config_->predictor;
  const float least = std::min(predictor.memory_thresholds[job.layer_index], predictor.flash_thresholds[job.layer_index]);
  std::memset(likely, 0, count);
  for (size_t t = 0; t < job.tokens; t++) {
    for (size_t j = 0; j < count; j++) likely[j] |= static_cast<uint8_t>(reaches(scores[t * kGroup + j], least));
  }
}

void Predictor::count(size_t scored, size_t chosen, size_t skipped_on_flash) {
  counters_.scored += scored;
  counters_.chosen += chosen;
  counters_.skipped_on_flash += skipped_on_flash;
}

PredictorCounters Predictor::counters() const {
  PredictorCounters counters = counters_;
  for (size_t thread = 0; thread < config_->threads; thread++) counters.ns += times_[thread].ns;
  return counters;
}

}  // namespace pi2
