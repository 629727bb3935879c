/**
 * ResidentExperts: a few tokens at once, as decoding several sequences has them. What no token wants is not read: with a
 * predictor the gates that it chooses for none, and up rows whose gate fires for none. What several want is read from memory
 * for the first and found in the core's cache by the others. Each token gets the bits that it gets alone.
 */
#include <bit>
#include <cstring>

#include "native/engine/product.h"
#include "native/engine/resident_experts.h"

namespace pi2 {

namespace {

/** Of the rows of a list, those that tokens want are multiplied token by token up to this share; else all, by tiles. */
constexpr size_t kSparseShare = 2;  // one in so many
/** Down columns that one token adds before the next adds the same ones: they stay in the core's cache. */
constexpr size_t kColumnLot = 64;

}  // namespace

/** Whether this is a job of few tokens that leave some rows out. */
bool ResidentExperts::is_few(const ExpertJob& job) const {
  const bool skips = job.predictor_x != nullptr || config_->activation != ActivationKind::kSilu;
  return job.tokens <= kFewTokens && !job.x.is_packed() && skips;
}

/**
 * Writes the neurons that the predictor chooses for any token into neurons_, ascending, and for whom into masks_. Returns
 * how many there are.
 */
size_t ResidentExperts::choose_for_any(const ExpertJob& job) {
  const size_t groups = group_count(config_->neuron_count);
  const size_t first_group = job.first_neuron / kGroup;
  std::memset(fired_, 0, chunks() * sizeof(uint32_t));
  pool_->run((groups - first_group + Predictor::kMostGroups - 1) / Predictor::kMostGroups, [&](size_t block, size_t thread) {
    const size_t group = first_group + block * Predictor::kMostGroups;
    const size_t together = std::min(Predictor::kMostGroups, groups - group);
    const float* scores = predictor_->score(job, group, together, thread);
    const size_t end = std::min((group + together) * kChunksPerGroup, chunks());
    for (size_t chunk = group * kChunksPerGroup; chunk < end; chunk++, scores += kNeuronChunk) {
      if (chunk < job.first_chunk()) continue;
      const size_t first = chunk * kNeuronChunk;
      const size_t count = std::min(kNeuronChunk, config_->neuron_count - first);
      uint8_t wanted[kNeuronChunk] = {};
      for (size_t t = 0; t < job.tokens; t++) {
        for (size_t j = 0; j < count; j++) {
          const float threshold = predictor_->threshold(job.layer_index, first + j, true);
          const bool reaches = Predictor::reaches(scores[t * together * kGroup + j], threshold);
          wanted[j] = static_cast<uint8_t>(wanted[j] | reaches << t);
        }
      }
      uint32_t chosen = 0;
      uint32_t length = 0;
      for (size_t j = 0; j < count; j++) {
        neurons_[first + length] = static_cast<uint32_t>(first + j);
        masks_[first + length] = wanted[j];
        length += wanted[j] != 0;
        chosen += static_cast<uint32_t>(std::popcount(wanted[j]));
      }
      chosen_[chunk] = chosen;
      fired_[chunk] = length;
    }
  });
  size_t total = 0;
  for (size_t chunk = job.first_chunk(); chunk < chunks(); chunk++) {
    std::memmove(neurons_ + total, neurons_ + chunk * kNeuronChunk, fired_[chunk] * sizeof(uint32_t));
    std::memmove(masks_ + total, masks_ + chunk * kNeuronChunk, fired_[chunk]);
    total += fired_[chunk];
  }
  return total;
}

/** Places the neurons of a list that fire for any token, with their factors. `masks` null: all neurons are everybody's. */
void ResidentExperts::find_fired_for_any(const ExpertJob& job, const uint32_t* neurons, const uint8_t* masks, size_t count,
                                         ListCounts* counts, size_t thread) {
  const ExpertWeights& expert = job.layer.experts[job.expert_index];
  const Matrix& bias = job.layer.up_bias;
  const Matrix& first_matrix = expert.gate.exists() ? expert.gate : expert.up;
  const size_t batch = config_->batch_size;
  float* gates = tiles_ + thread * 2 * batch * kListRoom;  // (token, neuron of the list)
  float* ups = gates + batch * kListRoom;
  uint8_t open[kListRoom] = {};  // tokens that each neuron's gate fires for
  // Products with the rows that each token wants, of all tokens at once where that is about all of a row of neurons.
  const auto multiply_wanted = [&](const Matrix& matrix, const uint8_t* wanted, float* y) {
    size_t rows_read = 0;
    for (size_t k = 0; k < count; k++) rows_read += wanted == nullptr || wanted[k] != 0;
    counts->rows += rows_read;
    if (masks == nullptr && rows_read * kSparseShare > count) {
      return multiply_rows(*kernels_, matrix, neurons[0], count, job.x, job.tokens, y, kListRoom);
    }
    for (size_t t = 0; t < job.tokens; t++) {
      const uint8_t* rows[kListRoom];
      float products[kListRoom];
      size_t length = 0;
      for (size_t k = 0; k < count; k++) {
        if (wanted[k] >> t & 1) rows[length++] = matrix.rows_from(neurons[k]).weights;
      }
      multiply_list(*kernels_, matrix.encoding, rows, length, job.x.of_token(t), products);
      length = 0;
      for (size_t k = 0; k < count; k++) {
        if (wanted[k] >> t & 1) y[t * kListRoom + k] = products[length++];
      }
    }
  };
  multiply_wanted(first_matrix, masks, gates);
  for (size_t t = 0; t < job.tokens; t++) {
    for (size_t k = 0; k < count; k++) {
      float& gate = gates[t * kListRoom + k];
      if (masks != nullptr && (masks[k] >> t & 1) == 0) continue;
      if (bias.exists()) gate += bias.floats()[neurons[k]];
      open[k] = static_cast<uint8_t>(open[k] | gate_fires(*config_, gate) << t);
    }
  }
  if (expert.gate.exists()) {
    multiply_wanted(expert.up, open, ups);
  } else {
    std::fill_n(ups, job.tokens * kListRoom, 1.0f);
  }
  for (size_t k = 0; k < count; k++) {
    if (open[k] == 0) continue;
    const size_t neuron = neurons[k];
    float values[kFewTokens];
    float of_ups[kFewTokens];
    for (size_t t = 0; t < job.tokens; t++) {
      const bool is_open = (open[k] >> t & 1) != 0;
      values[t] = is_open ? gates[t * kListRoom + k] : 0.0f;
      of_ups[t] = is_open ? ups[t * kListRoom + k] : 0.0f;
    }
    activate(*config_, values, of_ups, job.tokens, values);
    uint32_t fired = 0;
    for (size_t t = 0; t < job.tokens; t++) {
      if (job.fired.activations != nullptr) job.fired.put(t, neuron, values[t]);
      factors_[neuron * batch + t] = job.share(t) * values[t];
      if (values[t] == 0.0f) continue;
      fired++;
      if (job.fired.wanted()) job.fired.mark(t, neuron);
    }
    if (fired == 0) continue;
    counts->fired += fired;
    counts->rows++;
    order_.place(neuron, 1.0f, neuron);
  }
}

/** Sums the fired neurons of a part into part_sums_, whole columns at a time. */
void ResidentExperts::add_part_for_any(const ExpertJob& job, size_t part) {
  const ExpertWeights& expert = job.layer.experts[job.expert_index];
  const size_t groups = group_count(config_->hidden_size);
  float* sums = part_sums_ + part * few_room() * groups * kGroup;
  std::memset(sums, 0, job.tokens * groups * kGroup * sizeof(float));
  uint32_t lot[kColumnLot];
  size_t length = 0;
  const auto add_lot = [&] {
    for (size_t t = 0; t < job.tokens; t++) {
      Column columns[kColumnLot];
      size_t count = 0;
      for (size_t k = 0; k < length; k++) {
        const float factor = factors_[lot[k] * config_->batch_size + t];
        if (factor == 0.0f) continue;
        const Rows down = expert.down.rows_from(lot[k]);
        columns[count++] = {down.weights, down.scales, factor};
      }
      add_columns(*kernels_, expert.down.encoding, columns, count, groups, sums + t * groups * kGroup);
    }
    length = 0;
  };
  order_.for_part(part, [&](const SumOrder::Placed& placed) {
    lot[length++] = placed.where;
    if (length == kColumnLot) add_lot();
  });
  add_lot();
}

void ResidentExperts::run_few(const ExpertJob& job) {
  const ExpertWeights& expert = job.layer.experts[job.expert_index];
  const bool predicted = job.predictor_x != nullptr;
  const size_t count = predicted ? choose_for_any(job) : config_->neuron_count - job.first_neuron;
  if (!predicted) {
    for (size_t j = 0; j < count; j++) neurons_[j] = static_cast<uint32_t>(job.first_neuron + j);
  }
  const size_t lists = chunk_total(count);
  {
    const TraceSpan span(pool_->trace(), TraceStage::kFind);
    pool_->run(lists, [&](size_t list, size_t thread) {
      const size_t first = list_start(list, count, predicted);
      list_counts_[list] = {};
      find_fired_for_any(job, neurons_ + first, predicted ? masks_ + first : nullptr,
                         list_start(list + 1, count, predicted) - first, &list_counts_[list], thread);
    });
  }
  const TraceSpan span(pool_->trace(), TraceStage::kSum);
  pool_->run(kParts, [&](size_t part, size_t) { add_part_for_any(job, part); });
  const size_t groups = group_count(config_->hidden_size);
  pool_->run(groups * job.tokens, [&](size_t task, size_t) {
    const size_t t = task % job.tokens;
    const size_t group = task / job.tokens;
    float* y = job.out + t * job.out_stride + group * kGroup;
    for (size_t part = 0; part < kParts; part++) {
      const float* sums = part_sums_ + ((part * few_room() + t) * groups + group) * kGroup;
      for (size_t i = 0; i < kGroup; i++) y[i] += sums[i];
    }
    kernels_->to_natural_order(expert.down.encoding, y, 1);
  });
  for (size_t list = 0; list < lists; list++) {
    counters_.neurons_fired += list_counts_[list].fired;
    counters_.weight_bytes_read += list_counts_[list].rows * expert.down.row_bytes();
  }
}

}  // namespace pi2
