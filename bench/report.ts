import os from 'node:os';
import { formatBytes } from '../src/base/bytes.js';
import { formatDuration } from '../src/base/duration.js';
import { loadAddon } from '../src/engine/addon.js';
import { readBuild } from '../src/report/build.js';
import { formatShare } from '../src/report/format.js';
import type { ModelResult, TestResult } from './measure.js';
import type { PreparedModel } from './models.js';
import { deviation, mean, median } from './statistics.js';

/** Everything a result depends on besides the model. No date: the commit says which code it was. */
export interface Conditions {
  type: 'conditions';
  command: string;
  cpu_model: string;
  cpu_features: string[];
  cores: number;
  memory_bytes: number;
  /** Processes that wanted a core in the last minute, when the run began and ended: above the cores, others took part. */
  load_average_before: number;
  load_average_after: number;
  kernel: string;
  node: string;
  version: string;
  commit: string;
}

/** A measured test as JSON has it. */
export interface TestRow {
  type: 'test';
  model: string;
  synthetic: boolean;
  quantization: string;
  test: string;
  threads: number;
  kernel_set: string;
  tokens_per_second: number[];
  tokens_per_second_mean: number;
  tokens_per_second_deviation: number;
  tokens_per_second_median: number;
  weight_bytes_per_token: number;
  kv_bytes_per_token: number;
  neurons_fired_share: number;
  /** Median tokens a second times weight bytes a token. */
  bytes_per_second: number;
  bandwidths_bytes_per_second: number[];
  bandwidth_bytes_per_second_median: number;
  bandwidth_share: number;
  /** Share of the cores that other processes took during the tests of this model: near 0, or the speeds are too low. */
  others_share: number | null;
  engine_bytes: number;
  load_ms: number;
}

export interface ConversionRow {
  type: 'conversion';
  model: string;
  synthetic: boolean;
  quantization: string;
  seconds: number;
  source_bytes: number;
  source_bytes_per_second: number;
  peak_memory_bytes: number;
  /** Of the synthetic checkpoint; null when there was one. */
  generation_seconds: number | null;
}

export type Row = TestRow | ConversionRow;

/** The conditions of this process now. `command` is what was typed, `loadBefore` the load average when it began. */
export function conditions(command: string, loadBefore: number): Conditions {
  const cpu = loadAddon().cpu();
  return {
    type: 'conditions',
    command,
    cpu_model: os.cpus()[0]?.model.trim() || 'unknown',
    cpu_features: cpu.features,
    cores: cpu.cores,
    memory_bytes: os.totalmem(),
    load_average_before: loadBefore,
    load_average_after: os.loadavg()[0],
    kernel: `${os.type()} ${os.release()}`,
    node: process.version,
    ...readBuild(),
  };
}

/** The row of a model's conversion; none when the model was there already. */
export function conversionRows(result: ModelResult, prepared: PreparedModel, synthetic: boolean): ConversionRow[] {
  const { conversion } = prepared;
  if (!conversion) return [];
  return [
    {
      type: 'conversion',
      model: result.model,
      synthetic,
      quantization: result.quantization,
      seconds: conversion.seconds,
      source_bytes: conversion.sourceBytes,
      source_bytes_per_second: conversion.sourceBytes / conversion.seconds,
      peak_memory_bytes: conversion.peakMemoryBytes,
      generation_seconds: prepared.generationSeconds,
    },
  ];
}

/** A row for each test of a model. */
export function testRows(result: ModelResult, synthetic: boolean): TestRow[] {
  return result.tests.map((test) => testRow(result, test, synthetic));
}

function testRow(result: ModelResult, test: TestResult, synthetic: boolean): TestRow {
  const tokensPerSecond = median(test.tokensPerSecond);
  const bandwidth = median(result.bandwidths);
  const bytesPerSecond = tokensPerSecond * test.weightBytesPerToken;
  return {
    type: 'test',
    model: result.model,
    synthetic,
    quantization: result.quantization,
    test: test.test,
    threads: result.threads,
    kernel_set: result.kernelSet,
    tokens_per_second: test.tokensPerSecond,
    tokens_per_second_mean: mean(test.tokensPerSecond),
    tokens_per_second_deviation: deviation(test.tokensPerSecond),
    tokens_per_second_median: tokensPerSecond,
    weight_bytes_per_token: Math.round(test.weightBytesPerToken),
    kv_bytes_per_token: Math.round(test.kvBytesPerToken),
    neurons_fired_share: test.firedShare,
    bytes_per_second: bytesPerSecond,
    bandwidths_bytes_per_second: result.bandwidths,
    bandwidth_bytes_per_second_median: bandwidth,
    bandwidth_share: bytesPerSecond / bandwidth,
    others_share: result.othersShare,
    engine_bytes: result.engineBytes,
    load_ms: result.loadMs,
  };
}

/** Conditions and one table for each kind of row, as Markdown. */
export function toMarkdown(facts: Conditions, rows: readonly Row[]): string {
  const tests = rows.filter((row) => row.type === 'test');
  const conversions = rows.filter((row) => row.type === 'conversion');
  return [
    describeConditions(facts),
    ...(tests.length > 0 ? [testTable(tests), describeBandwidths(tests)] : []),
    ...(conversions.length > 0 ? [conversionTable(conversions)] : []),
  ].join('\n');
}

/** The command and the machine, in words. */
export function describeConditions(facts: Conditions): string {
  const load = `${facts.load_average_before.toFixed(2)} before, ${facts.load_average_after.toFixed(2)} after`;
  return `\`${facts.command}\`
${facts.cpu_model} (${facts.cpu_features.join(' ')}), ${facts.cores} cores, ${formatBytes(facts.memory_bytes)}; load ${load}
powerinfer2 ${facts.version}, commit ${facts.commit}; node ${facts.node}, ${facts.kernel}
`;
}

function testTable(rows: readonly TestRow[]): string {
  const header = [
    'model',
    'quant',
    'threads',
    'kernels',
    'test',
    'tokens/s',
    'fired',
    'weights a token',
    'GB/s',
    'RAM',
  ];
  const lines = rows.map((row) => [
    modelName(row),
    row.quantization,
    String(row.threads),
    row.kernel_set,
    row.test,
    `${row.tokens_per_second_mean.toFixed(2)} ± ${row.tokens_per_second_deviation.toFixed(2)}`,
    formatShare(row.neurons_fired_share),
    formatBytes(row.weight_bytes_per_token),
    gigabytes(row.bytes_per_second),
    formatShare(row.bandwidth_share),
  ]);
  return markdownTable(header, lines);
}

/** RAM is the share of this bandwidth; it and GB/s use medians. */
function describeBandwidths(rows: readonly TestRow[]): string {
  const byModel = new Map(rows.map((row) => [row.model, row]));
  const lines = [...byModel.values()].map((row) => {
    const probes = row.bandwidths_bytes_per_second.map(gigabytes).join(', ');
    const others = row.others_share === null ? 'an unknown share' : formatShare(row.others_share);
    return `${row.model}: ${row.threads} threads read ${probes} GB/s, median ${gigabytes(row.bandwidth_bytes_per_second_median)}; the engine holds ${formatBytes(row.engine_bytes)}, loaded in ${formatDuration(row.load_ms / 1000)}; others took ${others} of the cores`;
  });
  return `RAM: median tokens/s times weights a token, as a share of what the same threads read from memory in turn with the tests:\n${lines.join('\n')}\n`;
}

function conversionTable(rows: readonly ConversionRow[]): string {
  const header = ['conversion', 'quant', 'source', 'time', 'source MB/s', 'peak memory', 'generated in'];
  const lines = rows.map((row) => [
    modelName(row),
    row.quantization,
    formatBytes(row.source_bytes),
    formatDuration(row.seconds),
    (row.source_bytes_per_second / 1e6).toFixed(0),
    formatBytes(row.peak_memory_bytes),
    row.generation_seconds === null ? '-' : formatDuration(row.generation_seconds),
  ]);
  return markdownTable(header, lines);
}

function modelName(row: Row): string {
  return row.synthetic ? `${row.model} (random weights)` : row.model;
}

function gigabytes(bytesPerSecond: number): string {
  return (bytesPerSecond / 1e9).toFixed(1);
}

/** A table as Markdown, columns aligned. */
export function markdownTable(header: string[], lines: string[][]): string {
  const widths = header.map((name, i) => Math.max(name.length, ...lines.map((line) => line[i].length)));
  const row = (cells: string[]) => `| ${cells.map((cell, i) => cell.padEnd(widths[i])).join(' | ')} |\n`;
  return row(header) + row(widths.map((width) => '-'.repeat(width))) + lines.map(row).join('');
}
