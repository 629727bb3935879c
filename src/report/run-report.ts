import os from 'node:os';
import { formatBytes } from '../base/bytes.js';
import { peakMemoryBytes } from '../base/memory.js';
import type { Ablation } from '../engine/ablation.js';
import type { Continuation } from '../engine/batch.js';
import type { Bandwidths } from '../engine/contract.js';
import type { EngineCounters } from '../engine/counters.js';
import type { Engine, EngineName } from '../engine/engine.js';
import type { GenerationTimings, StopReason } from '../engine/generate.js';
import type { Recall } from '../engine/recall.js';
import type { Manifest } from '../format/manifest.js';
import { readBuild } from './build.js';
import { formatMs, formatShare, formatTable } from './format.js';
import { type PredictorReport, predictorLines, predictorReport } from './predictor-report.js';
import { describeRoofline, type RooflineReport, rooflineReport } from './roofline.js';
import { mean, summarize } from './statistics.js';
import { type StreamReport, streamLines, streamReport } from './stream-report.js';
import { type UnitReport, unitLines, unitReport } from './unit-report.js';

/**
 * The report of a run as `--json` prints it. Names are stable; units come last. Null where nothing was measured: no token
 * latency without a second token.
 */
export interface RunReport extends StreamReport, PredictorReport, RooflineReport, UnitReport {
  type: 'report';
  model: string;
  family: string;
  quantization: string;
  stop_reason: StopReason;
  /** The seed that was really used, chosen or given. */
  seed: number;
  context_length: number;
  prompt_tokens: number;
  generated_tokens: number;
  prompt_tokens_per_second: number | null;
  decode_tokens_per_second: number | null;
  time_to_first_token_ms: number | null;
  load_ms: number;
  token_latency_ms_mean: number | null;
  token_latency_ms_p50: number | null;
  token_latency_ms_p90: number | null;
  token_latency_ms_p99: number | null;
  /** How neurons are really held: all in memory, read past the page cache or through it, or mapped (`mmap`). */
  load_mode: string;
  /** The same with the means: `resident`, or for example `direct, io_uring`. */
  storage: string;
  /** `pi2` or a baseline, and the steps of streaming that were taken away. */
  engine: EngineName;
  ablated: readonly Ablation[];
  /** Memory that the whole process was to stay within, and the most it had. */
  memory_budget_bytes: number;
  peak_memory_bytes: number;
  /** Of the model's files, what is in the kernel's page cache at the end, part of no budget. Null where the kernel does not tell. */
  page_cache_bytes: number | null;
  /** Of all gates, those in memory; of all neurons, those whose up and down rows have a place. Null with `mmap`: only the kernel knows. */
  gates_resident_share: number | null;
  rows_resident_share: number | null;
  /** Bytes of the regions of the neuron cache; null when every neuron is in memory. */
  gates_bytes: number | null;
  hot_bytes: number | null;
  cold_bytes: number | null;
  /** Tokens of a prompt that are computed together. */
  batch_size: number;
  /** Page faults that waited for a disk: with `mmap`, weights that were not in the page cache. */
  major_faults_per_token: number | null;
  weight_bytes: number;
  kv_cache_bytes: number;
  scratch_bytes: number;
  /** Weight bytes that the kernels read for each decoded token. */
  weight_bytes_per_token: number | null;
  /** Of the neurons of the FFNs that tokens went through, those that fired. */
  neurons_fired_share: number | null;
  threads: number;
  kernel_set: string;
  cpu_features: string[];
  cpu_model: string;
  version: string;
  commit: string;
  /** Of continuations that were decoded together, in order of their seeds; null for the one of an ordinary run. */
  continuations: ContinuationReport[] | null;
  /** The number of the one that `--best-of` printed, from 0. */
  best_continuation: number | null;
  /** How many decode steps had a token of so many sequences, most sequences first. */
  live_batch_sizes: { sequences: number; steps: number }[] | null;
}

/** One of several continuations. */
export interface ContinuationReport {
  seed: number;
  generated_tokens: number;
  stop_reason: StopReason;
  /** Its own tokens behind the first, by the time of the steps that it was part of. */
  decode_tokens_per_second: number | null;
  /** Of its tokens under the model, with `--best-of`. */
  mean_log_probability: number | null;
}

/** What was decoded together. */
export interface BatchFacts {
  continuations: readonly Continuation[];
  seeds: readonly number[];
  best: number | null;
  /** Of each decode step. */
  liveSizes: readonly number[];
}

export interface RunFacts {
  manifest: Manifest;
  engine: Pick<
    Engine,
    | 'contextLength'
    | 'threads'
    | 'kernelSet'
    | 'cpuFeatures'
    | 'loadMs'
    | 'budgetBytes'
    | 'storage'
    | 'gatesResidentShare'
    | 'regions'
    | 'operatingPoint'
    | 'name'
    | 'ablated'
    | 'unit'
    | 'batchSize'
  >;
  /** Of a batch: tokens of all, latencies of its steps. */
  timings: GenerationTimings;
  stopReason: StopReason;
  seed: number;
  /** Absent for an ordinary run. */
  batch?: BatchFacts;
  pageCacheBytes: number | null;
  /** What memory and flash gave at best; null if it was not measured. */
  roof: Bandwidths | null;
  /** Absent when it was not measured. */
  recall?: Recall;
  /** Counters after the prompt and at the end. */
  countersAfterPrompt: EngineCounters;
  counters: EngineCounters;
}

/** Puts the facts of a run together. */
export function runReport(facts: RunFacts): RunReport {
  const { manifest, engine, timings, counters } = facts;
  const latency = summarize(timings.latenciesMs);
  const decodeSteps = timings.latenciesMs.length;
  const liveMean = facts.batch && decodeSteps > 0 ? mean(facts.batch.liveSizes) : 1;
  const decodeBytes = counters.weightBytesRead - facts.countersAfterPrompt.weightBytesRead;
  const decodeMs = timings.latenciesMs.reduce((sum, latency) => sum + latency, 0);
  const decodedTokens = counters.tokens - facts.countersAfterPrompt.tokens;
  return {
    type: 'report',
    model: manifest.name,
    family: manifest.hyperparameters.family,
    quantization: manifest.quantization.name,
    stop_reason: facts.stopReason,
    seed: facts.seed,
    context_length: engine.contextLength,
    prompt_tokens: timings.promptTokens,
    generated_tokens: timings.generatedTokens,
    prompt_tokens_per_second: timings.promptMs > 0 ? (1000 * timings.promptTokens) / timings.promptMs : null,
    decode_tokens_per_second: decodeSteps > 0 ? (1000 * liveMean) / (latency.mean as number) : null,
    time_to_first_token_ms: timings.generatedTokens > 0 ? timings.firstTokenMs : null,
    load_ms: engine.loadMs,
    token_latency_ms_mean: latency.mean,
    token_latency_ms_p50: latency.p50,
    token_latency_ms_p90: latency.p90,
    token_latency_ms_p99: latency.p99,
    load_mode: engine.storage.split(',')[0],
    storage: engine.storage,
    engine: engine.name,
    ablated: engine.ablated,
    memory_budget_bytes: engine.budgetBytes,
    peak_memory_bytes: peakMemoryBytes(),
    page_cache_bytes: facts.pageCacheBytes,
    gates_resident_share: engine.gatesResidentShare,
    rows_resident_share: engine.gatesResidentShare === null ? null : (engine.regions?.rowsShare ?? 1),
    gates_bytes: engine.regions?.gatesBytes ?? null,
    hot_bytes: engine.regions?.hotBytes ?? null,
    cold_bytes: engine.regions?.coldBytes ?? null,
    batch_size: engine.batchSize,
    major_faults_per_token:
      decodedTokens > 0 ? (counters.majorFaults - facts.countersAfterPrompt.majorFaults) / decodedTokens : null,
    weight_bytes: counters.weightBytes,
    kv_cache_bytes: counters.kvBytes,
    scratch_bytes: counters.scratchBytes,
    weight_bytes_per_token: decodedTokens > 0 ? Math.round(decodeBytes / decodedTokens) : null,
    neurons_fired_share: counters.neuronsSeen > 0 ? counters.neuronsFired / counters.neuronsSeen : null,
    ...streamReport(facts.countersAfterPrompt, counters, decodeMs, engine.threads),
    ...predictorReport(
      facts.countersAfterPrompt,
      counters,
      decodeMs,
      engine.threads,
      manifest.predictor,
      engine.operatingPoint,
      facts.recall,
    ),
    ...unitReport(facts.countersAfterPrompt, counters, engine),
    ...rooflineReport(facts.countersAfterPrompt, counters, decodeMs, facts.roof),
    threads: engine.threads,
    kernel_set: engine.kernelSet,
    cpu_features: [...engine.cpuFeatures],
    cpu_model: os.cpus()[0]?.model.trim() || 'unknown',
    ...readBuild(),
    continuations: facts.batch ? continuationReports(facts.batch) : null,
    best_continuation: facts.batch?.best ?? null,
    live_batch_sizes: facts.batch ? countSizes(facts.batch.liveSizes) : null,
  };
}

function continuationReports({ continuations, seeds }: BatchFacts): ContinuationReport[] {
  return continuations.map(({ tokens, stopReason, decodeMs, meanLogProbability }, i) => ({
    seed: seeds[i],
    generated_tokens: tokens.length,
    stop_reason: stopReason,
    decode_tokens_per_second: tokens.length > 1 ? (1000 * (tokens.length - 1)) / decodeMs : null,
    mean_log_probability: meanLogProbability,
  }));
}

function countSizes(sizes: readonly number[]): { sequences: number; steps: number }[] {
  const steps = new Map<number, number>();
  for (const size of sizes) steps.set(size, (steps.get(size) ?? 0) + 1);
  return [...steps].sort(([a], [b]) => b - a).map(([sequences, count]) => ({ sequences, steps: count }));
}

/** The report for people, one fact a line. */
export function formatRunReport(report: RunReport): string {
  const speed = (perSecond: number | null) => (perSecond === null ? '-' : `${perSecond.toFixed(2)} tokens/s`);
  const time = (ms: number | null) => (ms === null ? '-' : formatMs(ms));
  const memory = `weights ${formatBytes(report.weight_bytes)}, KV cache ${formatBytes(report.kv_cache_bytes)}`;
  const perToken = report.weight_bytes_per_token;
  return formatTable([
    ['prompt', `${report.prompt_tokens} tokens, ${speed(report.prompt_tokens_per_second)}`],
    ['decode', `${report.generated_tokens} tokens, ${speed(report.decode_tokens_per_second)}`],
    ...continuationLines(report),
    ['first token', time(report.time_to_first_token_ms)],
    [
      'token latency',
      `mean ${time(report.token_latency_ms_mean)}, P50 ${time(report.token_latency_ms_p50)}, ` +
        `P90 ${time(report.token_latency_ms_p90)}, P99 ${time(report.token_latency_ms_p99)}`,
    ],
    ['load', formatMs(report.load_ms)],
    [
      'peak memory',
      `${formatBytes(report.peak_memory_bytes)} of ${formatBytes(report.memory_budget_bytes)} (${memory})${describePageCache(report)}`,
    ],
    ...(report.ablated.length > 0 ? [['taken away', report.ablated.join(', ')] as [string, string]] : []),
    ['load mode', describeLoad(report)],
    ...regionLines(report),
    ...streamLines(report),
    ...predictorLines(report),
    ...unitLines(report),
    ['weights read', perToken === null ? '-' : `${formatBytes(perToken)} a token`],
    ...rooflineLines(report),
    ['neurons fired', report.neurons_fired_share === null ? '-' : formatShare(report.neurons_fired_share)],
    ['model', `${report.model} (${report.family}), ${report.quantization}, context ${report.context_length}`],
    ['stopped by', report.stop_reason.replace('_', ' ')],
    ['seed', String(report.seed)],
    ['cpu', `${report.cpu_model}, ${report.threads} threads, ${report.kernel_set} (${report.cpu_features.join(' ')})`],
    ['powerinfer2', `${report.version}, commit ${report.commit}`],
  ]);
}

/** A line for each of several continuations, and how many were live. */
function continuationLines({ continuations, best_continuation, live_batch_sizes }: RunReport): [string, string][] {
  if (continuations === null) return [];
  const live = (live_batch_sizes ?? []).map(({ sequences, steps }) => `${steps} steps of ${sequences}`).join(', ');
  return [
    ['live sequences', live === '' ? '-' : live],
    ...continuations.map((one, i): [string, string] => {
      const speed = one.decode_tokens_per_second;
      const facts = [
        `seed ${one.seed}, ${one.generated_tokens} tokens`,
        ...(speed === null ? [] : [`${speed.toFixed(2)} tokens/s`]),
        ...(one.mean_log_probability === null
          ? []
          : [`log-probability ${one.mean_log_probability.toFixed(4)} a token`]),
        `stopped by ${one.stop_reason.replace('_', ' ')}`,
        ...(best_continuation === i ? ['the best'] : []),
      ];
      return [`continuation ${i + 1}`, facts.join(', ')];
    }),
  ];
}

/** Where neurons are, when not all of them are in memory. */
function regionLines(report: RunReport): [string, string][] {
  const { gates_bytes, hot_bytes, cold_bytes, gates_resident_share, rows_resident_share } = report;
  if (gates_bytes === null || hot_bytes === null || cold_bytes === null) return [];
  const gates = `gates ${formatBytes(gates_bytes)} (${formatShare(gates_resident_share ?? 0)})`;
  const rows = `hot ${formatBytes(hot_bytes)}, cold ${formatBytes(cold_bytes)} (${formatShare(rows_resident_share ?? 0)})`;
  return [['neurons kept', report.kept_share === null ? `${gates}, ${rows}` : rows]];
}

function rooflineLines(report: RunReport): [string, string][] {
  const text = describeRoofline(report);
  return text === '' ? [] : [['roofline', text]];
}

function describePageCache({ page_cache_bytes: bytes }: RunReport): string {
  return bytes === null ? '' : `; page cache of the model ${formatBytes(bytes)}`;
}

function describeLoad({ storage, gates_resident_share: gates, major_faults_per_token: faults }: RunReport): string {
  if (gates !== null) return storage;
  const waits = faults === null ? '' : `; ${faults.toFixed(1)} major page faults a token`;
  return `${storage}, what is in memory is up to the kernel’s page cache${waits}`;
}
