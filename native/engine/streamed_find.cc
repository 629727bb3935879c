/** StreamedExperts: which neurons of a bank some tokens want. */
#include <cstring>

#include "native/engine/product.h"
#include "native/engine/stream_sizes.h"
#include "native/engine/streamed_experts.h"

namespace pi2 {

void StreamedExperts::find(const ExpertJob& job, Found& found) {
  const TraceSpan span(pool_->trace(), TraceStage::kFind);
  if (job.predictor_x != nullptr) {
    predictor_->begin(job);
    // Several tokens are scored a group at a time.
    const size_t most_groups = job.tokens == 1 ? Predictor::kMostGroups : 1;
    const size_t first_group = job.first_neuron / kGroup;
    const size_t groups = group_count(config_->neuron_count);
    pool_->run((groups - first_group + most_groups - 1) / most_groups, [&](size_t block, size_t thread) {
      const size_t group = first_group + block * most_groups;
      const size_t last = std::min(group + most_groups, groups);
      const float* scores = predictor_->score(job, group, last - group, thread);
      const size_t first = group * kChunksPerGroup;
      for (size_t chunk = std::max(first, job.first_chunk()); chunk < std::min(last * kChunksPerGroup, chunks()); chunk++) {
        found.kinds[chunk] = ChunkKind::kPredicted;
        find_chosen(job, found, chunk, scores + (chunk - first) * kNeuronChunk, thread);
      }
    });
    return;
  }
  pool_->run(chunks() - job.first_chunk(), [&](size_t task, size_t thread) {
    const size_t chunk = job.first_chunk() + task;
    const bool has_gates = is_filled(found.bank) && chunk * kNeuronChunk < cache_.plan(found.bank).resident_gates;
    found.kinds[chunk] = has_gates ? ChunkKind::kGates : ChunkKind::kWhole;
    if (has_gates) {
      find_open(job, found, chunk, thread);
    } else {
      find_all(found, chunk, thread);
    }
  });
}

void StreamedExperts::add_entry(Found& found, size_t neuron, size_t entry, size_t thread) {
  StreamCounters& counters = thread_counters_[thread].stream;
  const bool with_gate = keeps_gates(*config_);
  const uint8_t* gate = cache_.part1(found.bank, neuron);
  // Rows without a gate in memory are of no use: the chunk is read whole.
  const bool is_findable = is_filled(found.bank) && (with_gate || gate != nullptr);
  const uint8_t* kept = is_findable ? cache_.rows(found.bank, neuron) : nullptr;
  found.open[entry] = static_cast<uint32_t>(neuron);
  found.slot[entry] = NeuronCache::kNoSlot;
  found.state[entry] = kept != nullptr ? kResident : kMissing;
  found.part1[entry] = with_gate ? kept : gate;
  found.up[entry] = kept != nullptr && with_gate ? kept + row_bytes_ : kept;
  found.down[entry] = kept == nullptr ? nullptr : found.up[entry] + (config_->gated ? row_bytes_ : 0);
  if (kept == nullptr) {
    counters.misses++;
  } else {
    (neuron < cache_.plan(found.bank).hot_neurons ? counters.hot_hits : counters.cold_hits)++;
  }
}

/** Products of resident gates; the neurons that fire for any token. */
void StreamedExperts::find_open(const ExpertJob& job, Found& found, size_t chunk, size_t thread) {
  const size_t batch = config_->batch_size;
  const Matrix& bias = job.layer.up_bias;
  const size_t first = chunk * kNeuronChunk;
  const size_t count = std::min(kNeuronChunk, config_->neuron_count - first);
  const uint8_t* gate = cache_.part1(found.bank, first);
  float* products = ups_ + thread * batch * kNeuronChunk;  // (token, neuron of the chunk)
  const Rows rows{gate, gate + weight_bytes_, config_->layout.part1_bytes};
  multiply(*kernels_, config_->ffn_encoding, rows, count, job.x, job.tokens, products, kNeuronChunk);
  thread_counters_[thread].rows += count;
  uint32_t open = 0;
  for (size_t j = 0; j < count; j++) {
    float* gates = found.batch_gates + (first + j) * batch;
    bool fires = false;
    for (size_t t = 0; t < job.tokens; t++) {
      gates[t] = products[t * kNeuronChunk + j] + (bias.exists() ? bias.floats()[first + j] : 0.0f);
      fires |= gate_fires(*config_, gates[t]);
    }
    if (!fires) continue;
    const size_t entry = first + open++;
    add_entry(found, first + j, entry, thread);
    found.gates[entry] = gates[0];
    cache_.touch(found.bank, first + j);
  }
  found.open_count[chunk] = open;
}

/** Neurons whose score reaches the threshold of where they are, for any token. */
void StreamedExperts::find_chosen(const ExpertJob& job, Found& found, size_t chunk, const float* scores, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  const size_t count = std::min(kNeuronChunk, config_->neuron_count - first);
  ThreadCounters& counters = thread_counters_[thread];
  // Most neurons reach neither threshold: they are put aside by vectors, without a look at where they are.
  uint8_t likely[kNeuronChunk];
  predictor_->find_likely(job, scores, count, likely);
  uint32_t open = 0;
  for (size_t j = 0; j < count; j++) {
    if (likely[j] == 0) continue;
    const size_t neuron = first + j;
    const bool in_memory = cache_.rows(found.bank, neuron) != nullptr;
    const float threshold = predictor_->threshold(job.layer_index, neuron, in_memory);
    const float lower = predictor_->threshold(job.layer_index, neuron, true);
    const size_t entry = first + open;
    uint64_t* mask = found.masks + entry * mask_words();
    size_t chosen = 0;
    for (size_t t = 0; t < job.tokens; t++) {
      const float score = scores[t * kGroup + j];
      const bool reaches = Predictor::reaches(score, threshold);
      if (t % 64 == 0) mask[t / 64] = 0;
      mask[t / 64] |= uint64_t{reaches} << t % 64;
      chosen += reaches;
      counters.skipped_on_flash += !reaches && Predictor::reaches(score, lower);
    }
    if (chosen == 0) continue;
    counters.chosen += chosen;
    add_entry(found, neuron, entry, thread);
    cache_.touch(found.bank, neuron);
    open++;
  }
  found.open_count[chunk] = open;
}

void StreamedExperts::find_all(Found& found, size_t chunk, size_t thread) {
  const size_t first = chunk * kNeuronChunk;
  const size_t count = std::min(kNeuronChunk, config_->neuron_count - first);
  for (size_t j = 0; j < count; j++) add_entry(found, first + j, first + j, thread);
  found.open_count[chunk] = static_cast<uint32_t>(count);
}

}  // namespace pi2
