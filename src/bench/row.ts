import os from 'node:os';
import { peakMemoryBytes } from '../base/memory.js';
import type { Bandwidths } from '../engine/contract.js';
import type { Engine } from '../engine/engine.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { partSizes } from '../format/sizes.js';
import { readBuild } from '../report/build.js';
import { type RooflineReport, rooflineReport } from '../report/roofline.js';
import { deviation, mean, summarize } from '../report/statistics.js';
import { type StreamReport, streamReport } from '../report/stream-report.js';
import { type UnitReport, unitReport } from '../report/unit-report.js';
import { type BenchTest, joinCounters, type Sample } from './runner.js';

/** A result as JSON has it: llama-bench's fields, with its names and units, then those of `run --json`. */
export interface BenchRow extends StreamReport, RooflineReport, UnitReport {
  build_commit: string;
  build_version: string;
  cpu_info: string;
  gpu_info: string;
  backends: string;
  model_filename: string;
  model_type: string;
  /** Bytes on flash, and weights, predictor included. */
  model_size: number;
  model_n_params: number;
  /** Tokens of a prompt that are computed together. */
  n_batch: number;
  n_threads: number;
  n_prompt: number;
  n_gen: number;
  n_depth: number;
  /** Sequences decoded together; all tokens of all of them are counted. As llama-batched-bench calls it. */
  n_pl: number;
  /** When the test began, UTC. */
  test_time: string;
  avg_ns: number;
  stddev_ns: number;
  avg_ts: number;
  stddev_ts: number;
  samples_ns: number[];
  samples_ts: number[];
  kernel_set: string;
  engine: string;
  ablated: readonly string[];
  /** Whether neurons are chosen by a predictor while decoding. */
  predicted: boolean;
  /** `--memory` as it was given. */
  memory: string | null;
  memory_budget_bytes: number;
  /** Of this test, loading included; null where the kernel cannot be told to count anew. */
  peak_memory_bytes: number | null;
  load_mode: string;
  storage: string;
  load_ms: number;
  /** Bytes of the neuron cache, all regions; null when every neuron is in memory. */
  cache_bytes: number | null;
  rows_resident_share: number | null;
  /** Needed neurons found in memory. */
  hit_share: number | null;
  major_faults_per_token: number;
  weight_bytes_per_token: number;
  neurons_fired_share: number | null;
  /** Of generated tokens, each that of its step; null for a prompt. */
  token_latency_ms_mean: number | null;
  token_latency_ms_p50: number | null;
  token_latency_ms_p90: number | null;
  token_latency_ms_p99: number | null;
}

/** What a row is made of. */
export interface BenchFacts {
  model: ModelDirectory;
  engine: Engine;
  test: BenchTest;
  samples: readonly Sample[];
  startedAt: Date;
  memory: string | null;
  /** Whether the peak is this test's alone. */
  hasOwnPeak: boolean;
  roof: Bandwidths | null;
}

/** Puts a row together. There is at least one sample. */
export function benchRow({ model, engine, test, samples, startedAt, memory, hasOwnPeak, roof }: BenchFacts): BenchRow {
  const { manifest } = model;
  const sizes = partSizes(manifest);
  const weights = sizes.reduce((sum, part) => sum + part.weights, 0);
  const { before, after } = joinCounters(samples);
  const tokens = after.tokens - before.tokens;
  const seen = after.neuronsSeen - before.neuronsSeen;
  const ms = samples.reduce((sum, sample) => sum + sample.ms, 0);
  const nanoseconds = samples.map((sample) => Math.round(1e6 * sample.ms));
  const speeds = samples.map(
    (sample) => (1000 * test.sequences * (test.promptTokens + test.generatedTokens)) / sample.ms,
  );
  const latency = summarize(samples.flatMap((sample) => sample.latenciesMs));
  const { version, commit } = readBuild();
  const streamed = streamReport(before, after, ms, engine.threads);
  return {
    build_commit: commit,
    build_version: version,
    cpu_info: os.cpus()[0]?.model.trim() || 'unknown',
    gpu_info: '',
    backends: 'CPU',
    model_filename: model.path,
    model_type: `${manifest.hyperparameters.family} ${sizeClass(weights)} ${manifest.quantization.name}`,
    model_size: sizes.reduce((sum, part) => sum + part.bytes, 0),
    model_n_params: weights,
    n_batch: engine.batchSize,
    n_threads: engine.threads,
    n_prompt: test.promptTokens,
    n_gen: test.generatedTokens,
    n_depth: test.depth,
    n_pl: test.sequences,
    test_time: startedAt.toISOString().replace(/\.\d+/, ''),
    avg_ns: Math.round(mean(nanoseconds)),
    stddev_ns: Math.round(deviation(nanoseconds)),
    avg_ts: mean(speeds),
    stddev_ts: deviation(speeds),
    samples_ns: nanoseconds,
    samples_ts: speeds,
    kernel_set: engine.kernelSet,
    engine: engine.name,
    ablated: engine.ablated,
    predicted: engine.operatingPoint !== null,
    memory,
    memory_budget_bytes: engine.budgetBytes,
    peak_memory_bytes: hasOwnPeak ? peakMemoryBytes() : null,
    load_mode: engine.storage.split(',')[0],
    storage: engine.storage,
    load_ms: engine.loadMs,
    cache_bytes: engine.regions && engine.regions.gatesBytes + engine.regions.hotBytes + engine.regions.coldBytes,
    rows_resident_share: engine.gatesResidentShare === null ? null : (engine.regions?.rowsShare ?? 1),
    hit_share: streamed.miss_share === null ? null : 1 - streamed.miss_share,
    major_faults_per_token: (after.majorFaults - before.majorFaults) / tokens,
    weight_bytes_per_token: Math.round((after.weightBytesRead - before.weightBytesRead) / tokens),
    neurons_fired_share: seen > 0 ? (after.neuronsFired - before.neuronsFired) / seen : null,
    token_latency_ms_mean: latency.mean,
    token_latency_ms_p50: latency.p50,
    token_latency_ms_p90: latency.p90,
    token_latency_ms_p99: latency.p99,
    ...streamed,
    ...unitReport(before, after, engine),
    ...rooflineReport(before, after, ms, roof),
  };
}

/** As llama.cpp names sizes: `7B`, `12M`. */
function sizeClass(weights: number): string {
  return weights >= 0.95e9 ? `${Math.round(weights / 1e9)}B` : `${Math.round(weights / 1e6)}M`;
}
