#include "native/addon/engine_config.h"

#include <cmath>

#include "native/addon/cache_calls.h"
#include "native/addon/converter_calls.h"
#include "native/addon/onnxruntime_config.h"

namespace pi2 {
namespace {

const double kLargest = 9007199254740991.0;

/** Extents of two files, or of a predictor's own. */
void read_extents(Fields& fields, bool of_predictor, std::vector<ExtentConfig>* extents) {
  each(fields, "extents", [&](Fields& e) {
    const std::string file = e.text("file");
    const bool is_known = of_predictor ? file == "predictor" : file == "resident" || file == "neurons";
    if (!is_known) e.fail(of_predictor ? "file must be predictor" : "file must be resident or neurons");
    extents->push_back(
        {e.text("name"), file == "neurons", e.size("offset"), e.size("bytes"), static_cast<uint32_t>(e.size("crc32"))});
  });
}

void read_tensors(Fields& fields, std::vector<TensorConfig>* tensors) {
  each(fields, "tensors", [&](Fields& e) {
    tensors->push_back(
        {e.text("name"), e.size("offset"), e.size("bytes"), e.encoding("encoding"), e.size("rows"), e.size("columns")});
  });
}

void read_checksums(Fields& request, EngineConfig* config) {
  Fields fields(request.value("checksums"));
  read_extents(fields, false, &config->extents);
  for (const double offset : fields.numbers("offsets")) {
    if (!(offset >= 0 && offset <= kLargest)) fields.fail("offsets must be sizes");
    config->checksum_offsets.push_back(static_cast<size_t>(offset));
  }
  if (!fields.status().is_ok()) request.fail("checksums: " + fields.status().message());
}

void read_predictor(Fields& request, PredictorConfig* predictor) {
  Fields fields(request.value("predictor"));
  predictor->path = fields.text("path");
  if (predictor->path.empty()) fields.fail("path is empty");
  read_extents(fields, true, &predictor->extents);
  read_tensors(fields, &predictor->tensors);
  const std::string input = fields.text("input");
  if (input != "residual" && input != "ffn_norm") fields.fail("input must be residual or ffn_norm");
  predictor->input = input == "residual" ? PredictorInput::kResidual : PredictorInput::kFfnNorm;
  const auto thresholds = [&](const char* name, std::vector<float>* values) {
    for (const double value : fields.numbers(name)) {
      if (std::isnan(value)) fields.fail(std::string(name) + " must be numbers");
      values->push_back(static_cast<float>(value));
    }
  };
  thresholds("memoryThresholds", &predictor->memory_thresholds);
  thresholds("flashThresholds", &predictor->flash_thresholds);
  predictor->flash_from = fields.size_or("flashFrom", SIZE_MAX);
  if (!fields.status().is_ok()) request.fail("predictor: " + fields.status().message());
}

void read_stream(Fields& request, StreamConfig* stream) {
  Fields fields(request.value("stream"));
  stream->banks = read_bank_plans(fields, fields.numbers("residentGates"));
  stream->firing_rates = read_firing_rates(fields);
  stream->staging_bytes = fields.size("stagingBytes");
  stream->lanes = fields.size("lanes");
  const std::string mode = fields.text("mode");
  const std::string backend = fields.text("backend");
  if (mode != "direct" && mode != "buffered") fields.fail("mode must be direct or buffered");
  if (backend != "threads" && backend != "uring") fields.fail("backend must be threads or uring");
  if (stream->lanes == 0 || stream->lanes > 256) fields.fail("lanes must be 1 to 256");
  if (stream->staging_bytes > size_t{1} << 34) fields.fail("stagingBytes is absurd");
  const auto flag = [&](const char* name, bool fallback) { return fields.has(name) ? fields.boolean(name) : fallback; };
  const std::string policy = fields.has("policy") ? fields.text("policy") : "frequency";
  if (policy != "frequency" && policy != "recency") fields.fail("policy must be frequency or recency");
  stream->policy = policy == "recency" ? CachePolicy::kRecency : CachePolicy::kFrequency;
  stream->prefetch_bytes = fields.size_or("prefetchBytes", 0);
  if (stream->prefetch_bytes > size_t{1} << 30) fields.fail("prefetchBytes is absurd");
  if (fields.has("twoPhase")) stream->two_phase = fields.boolean("twoPhase");
  stream->bundles = flag("bundles", true);
  stream->pipeline = flag("pipeline", true);
  if (fields.has("trial")) {
    Fields trial(fields.value("trial"));
    stream->trial = {trial.size_or("failRead", 0), trial.size_or("shortRead", 0), trial.size_or("delayUs", 0)};
    if (!trial.status().is_ok()) fields.fail("trial: " + trial.status().message());
  }
  stream->mode = mode == "direct" ? ReadMode::kDirect : ReadMode::kBuffered;
  stream->backend = backend == "uring" ? ReadBackend::kUring : ReadBackend::kThreads;
  if (!fields.status().is_ok()) request.fail("stream: " + fields.status().message());
}

void read_unit(Fields& request, UnitConfig* unit) {
  Fields fields(request.value("unit"));
  const std::string kind = fields.text("kind");
  if (kind != "host" && kind != "onnxruntime") fields.fail("kind must be host or onnxruntime");
  unit->kind = kind == "onnxruntime" ? UnitKind::kOnnxruntime : UnitKind::kHost;
  if (kind == "onnxruntime") {
    const Status status = read_onnxruntime_config(fields.value("onnxruntime"), &unit->onnxruntime);
    if (!status.is_ok()) fields.fail(status.message());
  }
  unit->threads = fields.size("threads");
  unit->cluster_neurons = fields.size("clusterNeurons");
  unit->most_clusters = fields.size("mostClusters");
  unit->clusters = read_unit_schedule(fields);
  unit->fail_job = fields.size_or("failJob", 0);
  if (!fields.status().is_ok()) request.fail("unit: " + fields.status().message());
}

}  // namespace

UnitConfig::Schedule read_unit_schedule(Fields& fields) {
  UnitConfig::Schedule schedule{};
  const std::vector<double> clusters = fields.numbers("clusters");
  if (clusters.size() != schedule.size()) fields.fail("clusters must have " + std::to_string(schedule.size()) + " entries");
  for (size_t i = 0; i < schedule.size() && fields.status().is_ok(); i++) {
    const bool is_possible = clusters[i] >= 0 && clusters[i] <= kMostClusters;
    if (!is_possible) fields.fail("clusters must be 0 to " + std::to_string(kMostClusters));
    schedule[i] = is_possible ? static_cast<size_t>(clusters[i]) : 0;
  }
  return schedule;
}

EngineConfig read_engine_config(Fields& fields) {
  EngineConfig config{};
  config.resident_path = fields.text("residentPath");
  config.neurons_path = fields.text("neuronsPath");
  read_extents(fields, false, &config.extents);
  read_tensors(fields, &config.tensors);
  for (const double offset : fields.numbers("expertOffsets")) {
    if (!(offset >= 0 && offset <= kLargest)) fields.fail("expertOffsets must be sizes");
    config.expert_offsets.push_back(static_cast<size_t>(offset));
  }
  if (fields.has("orderOffsets")) {
    for (const double offset : fields.numbers("orderOffsets")) {
      if (!(offset >= 0 && offset <= kLargest)) fields.fail("orderOffsets must be sizes");
      config.order_offsets.push_back(static_cast<size_t>(offset));
    }
  }
  const Status layout = read_layout(fields.value("layout"), &config.layout);
  if (!layout.is_ok()) fields.fail(layout.message());
  config.ffn_encoding = fields.encoding("ffnEncoding");
  config.hidden_size = fields.size("hiddenSize");
  config.layer_count = fields.size("layerCount");
  config.head_count = fields.size("headCount");
  config.kv_head_count = fields.size("kvHeadCount");
  config.head_dim = fields.size("headDim");
  config.neuron_count = fields.size("neuronCount");
  config.vocab_size = fields.size("vocabSize");
  const std::string norm = fields.text("normKind");
  if (norm != "layer" && norm != "rms") fields.fail("normKind must be rms or layer");
  config.norm_kind = norm == "layer" ? NormKind::kLayer : NormKind::kRms;
  config.norm_epsilon = static_cast<float>(fields.number("normEpsilon"));
  config.rope_frequencies = fields.floats("ropeFrequencies");
  for (const double window : fields.numbers("windows")) {
    if (!(window >= 0 && window <= 1e9)) fields.fail("windows must be sizes");
    config.windows.push_back(static_cast<size_t>(window));
  }
  config.gated = fields.boolean("gated");
  const std::string activation = fields.text("activation");
  if (activation == "silu") {
    config.activation = ActivationKind::kSilu;
  } else if (activation == "relu") {
    config.activation = ActivationKind::kRelu;
  } else if (activation == "drelu") {
    config.activation = ActivationKind::kDRelu;
  } else if (activation == "fatrelu") {
    config.activation = ActivationKind::kFatRelu;
  } else {
    fields.fail("activation must be silu, relu, drelu or fatrelu");
  }
  config.threshold = static_cast<float>(fields.number("threshold"));
  config.expert_count = fields.size("expertCount");
  config.experts_per_token = fields.size("expertsPerToken");
  config.context_length = fields.size("contextLength");
  config.sequences = fields.size_or("sequences", 1);
  config.threads = fields.size("threads");
  if (fields.has("kernelSet")) config.kernel_set = fields.text("kernelSet");
  config.batch_size = fields.size("batchSize");
  if (fields.has("stream")) {
    read_checksums(fields, &config);
    read_stream(fields, &config.stream);
  }
  if (fields.has("predictor")) read_predictor(fields, &config.predictor);
  if (fields.has("unit")) read_unit(fields, &config.unit);
  config.mapped = fields.has("mapped") && fields.boolean("mapped");
  config.trace_records = fields.size_or("traceRecords", 0);
  return config;
}

}  // namespace pi2
