/** What the comparison with llama.cpp says: a row a test of an engine, as JSON and as a table. */
import { formatBytes } from '../src/base/bytes.js';
import type { GroupUsage } from './memory-group.js';
import type { PeerCap, PeerEntry } from './peer-cases.js';
import type { PeerFacts, PeerSample, PeerTest } from './peer-worker.js';
import { markdownTable } from './report.js';
import { deviation, mean, median } from './statistics.js';

/** What memory and flash give, measured in the same run. */
export interface Limits {
  type: 'limits';
  threads: number;
  /** The best of the probes before and after the tests. */
  ram_bytes_per_second: number;
  ram_probes_bytes_per_second: number[];
  /** 512 KiB one after another, 8 at once; and 8 KiB anywhere, 32 at once. */
  flash_sequential_bytes_per_second: number;
  flash_random_bytes_per_second: number;
  flash_how: string;
}

/** A test of an engine under a cap. Names ending in `_median` and the like are over the runs; null is not measured. */
export interface PeerRow {
  type: 'peer';
  shape: string;
  offload: number | null;
  cap_bytes: number | null;
  engine: PeerEntry['engine'];
  name: string;
  model: string;
  how: string;
  threads: number;
  load_ms: number;
  test: string;
  /** Tokens computed in each run, and their speed. */
  tokens: number[];
  tokens_per_second: number[];
  tokens_per_second_mean: number;
  tokens_per_second_deviation: number;
  tokens_per_second_median: number;
  /** Median speed as a multiple of llama.cpp's, in the same run, test and cap. */
  ratio: number | null;
  weight_bytes_per_token: number | null;
  read_bytes_per_token: number;
  major_faults_per_token: number;
  hit_share: number | null;
  latency_p99_to_mean: number | null;
  /** Of what memory, or flash read as this engine reads it, gives: bytes a token times median speed. */
  ram_share: number | null;
  flash_share: number;
  /** Share of the cores that other processes took: above some 0.1 the speeds are too low. */
  others_share: number | null;
  /** Most that the control group had, loading included; whether it stayed within the cap without a kill. */
  peak_bytes: number;
  cap_held: boolean;
  /** Times that the cap was reached and the kernel gave page cache back. */
  limit_hits: number;
}

/** An engine that did not get to the end. */
export interface PeerFailure {
  type: 'failure';
  shape: string;
  cap_bytes: number | null;
  engine: PeerEntry['engine'];
  name: string;
  reason: string;
  oom_kills: number;
}

/** What was measured of one entry. */
export interface PeerResult {
  entry: PeerEntry;
  facts: PeerFacts;
  usage: GroupUsage;
  samples: readonly { test: PeerTest; runs: readonly PeerSample[] }[];
}

/** The name llama-bench gives a test, with the tokens that were really computed. */
export function testName({ kind, tokens }: PeerTest): string {
  return `${kind}${tokens}`;
}

/** Rows of all entries under one cap. */
export function peerRows(shape: string, cap: PeerCap, limits: Limits, results: readonly PeerResult[]): PeerRow[] {
  const rows = results.flatMap((result) =>
    result.samples.map(({ test, runs }) => peerRow(shape, cap, limits, result, test, runs)),
  );
  for (const row of rows) {
    const peer = rows.find(({ engine, test }) => engine === 'llama.cpp' && test === row.test);
    if (peer && peer !== row) row.ratio = row.tokens_per_second_median / peer.tokens_per_second_median;
  }
  return rows;
}

function peerRow(
  shape: string,
  cap: PeerCap,
  limits: Limits,
  { entry, facts, usage }: PeerResult,
  test: PeerTest,
  runs: readonly PeerSample[],
): PeerRow {
  const speeds = runs.map(({ tokens, ms }) => (1000 * tokens) / ms);
  const speed = median(speeds);
  const latencies = runs.flatMap(({ latenciesMs }) => latenciesMs);
  const meanOf = (values: (number | null)[]) =>
    values.some((value) => value === null) ? null : mean(values as number[]);
  // A prompt reads weights once a batch: what it moves a token says nothing about a limit.
  const weightBytes = test.kind === 'tg' ? meanOf(runs.map((run) => run.weightBytes)) : null;
  const readBytes = mean(runs.map((run) => run.readBytes));
  const flash =
    entry.reads === 'sequential' ? limits.flash_sequential_bytes_per_second : limits.flash_random_bytes_per_second;
  return {
    type: 'peer',
    shape,
    offload: cap.offload,
    cap_bytes: cap.bytes,
    engine: entry.engine,
    name: entry.name,
    model: entry.model,
    how: facts.how,
    threads: facts.threads,
    load_ms: facts.loadMs,
    test: testName(test),
    tokens: runs.map(({ tokens }) => tokens),
    tokens_per_second: speeds,
    tokens_per_second_mean: mean(speeds),
    tokens_per_second_deviation: deviation(speeds),
    tokens_per_second_median: speed,
    ratio: null,
    weight_bytes_per_token: weightBytes,
    read_bytes_per_token: readBytes,
    major_faults_per_token: mean(runs.map((run) => run.majorFaults)),
    hit_share: meanOf(runs.map((run) => run.hitShare)),
    latency_p99_to_mean: latencies.length < 2 ? null : percentile(latencies, 0.99) / mean(latencies),
    ram_share: weightBytes === null ? null : (weightBytes * speed) / limits.ram_bytes_per_second,
    flash_share: (readBytes * speed) / flash,
    others_share: meanOf(runs.map((run) => run.othersShare)),
    peak_bytes: usage.peakBytes,
    cap_held: usage.oomKills === 0 && (cap.bytes === null || usage.peakBytes <= cap.bytes),
    limit_hits: usage.limitHits,
  };
}

/** The least of a sample that is not below `share` of it. */
function percentile(sample: readonly number[], share: number): number {
  const sorted = Float64Array.from(sample).sort();
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

const HEADER = [
  'engine, model',
  'cap MiB',
  'test',
  'tokens/s',
  'x llama.cpp',
  'RAM MiB/t',
  'flash MiB/t',
  'hit %',
  'P99/mean',
  'of RAM %',
  'of flash %',
  'peak MiB',
  'held',
  'others %',
];

/** All rows as one table, with the limits above it and what did not run below. */
export function describePeers(limits: Limits, rows: readonly PeerRow[], failures: readonly PeerFailure[]): string {
  const table = markdownTable(HEADER, rows.map(cells));
  const lost = failures.map(
    ({ engine, name, cap_bytes, reason }) => `${engine} ${name}, cap ${cap(cap_bytes)}: ${reason}\n`,
  );
  const how = [...new Map(rows.map((row) => [`${row.engine} ${row.name} ${row.cap_bytes}`, row])).values()].map(
    (row) => `${row.engine} ${row.name}, cap ${cap(row.cap_bytes)}: ${row.model}, ${row.how}, ${row.threads} threads\n`,
  );
  return `${describeLimits(limits)}\n${table}\n${[...how, ...lost].join('')}${LEGEND}`;
}

const LEGEND = `
tokens/s: mean ± deviation; x llama.cpp: medians, same run, same cap, in turn. A run of tg ends early when its time is over.
llama.cpp computes the same bytes whatever the activation is: its model is the dense one of the same shape.
RAM MiB/t: weights that kernels read for a token (llama.cpp: all but unused embeddings and experts). flash MiB/t: what the kernel
fetched for the process (read_bytes of /proc/PID/io), page faults and read-ahead included. of flash: sequential for mapped files,
random 8 KiB for neurons. peak: of the control group, page cache included; held: never above the cap, nothing killed; by reclaim: the kernel had to give
page cache back for that. others: share of the cores that other processes took; above some 10 % a speed is too low.
`;

function describeLimits(limits: Limits): string {
  const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(2)} GB/s`;
  const probes = limits.ram_probes_bytes_per_second.map((bytes) => (bytes / 1e9).toFixed(1)).join(', ');
  return (
    `RAM ${gigabytes(limits.ram_bytes_per_second)} with ${limits.threads} threads (probes ${probes}); ` +
    `flash ${gigabytes(limits.flash_sequential_bytes_per_second)} sequential, ` +
    `${gigabytes(limits.flash_random_bytes_per_second)} random 8 KiB (${limits.flash_how})\n`
  );
}

function cells(row: PeerRow): string[] {
  const mebibytes = (bytes: number | null) =>
    bytes === null ? '-' : (bytes / 2 ** 20).toFixed(bytes < 2 ** 30 ? 1 : 0);
  const percent = (share: number | null) => (share === null ? '-' : (100 * share).toFixed(1));
  return [
    `${row.engine} ${row.name}`,
    row.cap_bytes === null ? 'none' : mebibytes(row.cap_bytes),
    row.tokens.some((tokens) => tokens !== row.tokens[0]) || row.test !== `${row.test.slice(0, 2)}${row.tokens[0]}`
      ? `${row.test} (${Math.min(...row.tokens)})`
      : row.test,
    `${row.tokens_per_second_mean.toFixed(2)} ± ${row.tokens_per_second_deviation.toFixed(2)}`,
    row.ratio === null ? '-' : row.ratio.toFixed(2),
    mebibytes(row.weight_bytes_per_token),
    mebibytes(row.read_bytes_per_token),
    percent(row.hit_share),
    row.latency_p99_to_mean?.toFixed(2) ?? '-',
    percent(row.ram_share),
    percent(row.flash_share),
    mebibytes(row.peak_bytes),
    row.cap_bytes === null ? '-' : row.cap_held ? (row.limit_hits > 0 ? 'by reclaim' : 'yes') : 'NO',
    percent(row.others_share),
  ];
}

function cap(bytes: number | null): string {
  return bytes === null ? 'none' : formatBytes(bytes);
}
