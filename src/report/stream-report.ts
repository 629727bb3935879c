import { formatBytes } from '../base/bytes.js';
import type { EngineCounters, StreamCounters } from '../engine/counters.js';
import type { Engine } from '../engine/engine.js';
import { formatShare } from './format.js';

/**
 * What streaming cost while decoding: the prompt is not in it. All null when every neuron is in memory, or nothing was decoded.
 */
export interface StreamReport {
  /** Whether gates of missing neurons are read before their rows, or all at once. */
  two_phases: boolean | null;
  /** Of the neurons that were needed: found in the hot region, in the cold region, or read from flash. */
  hot_hit_share: number | null;
  cold_hit_share: number | null;
  miss_share: number | null;
  /** Bytes of the neurons that were read, and of all pages that were read for them. */
  flash_asked_bytes_per_token: number | null;
  flash_read_bytes_per_token: number | null;
  flash_reads_per_token: number | null;
  /** Of the bytes asked for, those of neurons that fired; and rows not read, because the gate read before did not fire. */
  flash_used_bytes_per_token: number | null;
  flash_spared_bytes_per_token: number | null;
  /** Time that computing threads waited for flash, summed over threads, and its share of their time. */
  stall_ms_per_token: number | null;
  stall_share: number | null;
  /** Of the waiting time, that for gates and that for rows. */
  gate_stall_ms_per_token: number | null;
  row_stall_ms_per_token: number | null;
  /** Neurons whose reads began before attention, and of those the ones that were wanted. */
  prefetched_per_token: number | null;
  prefetch_used_share: number | null;
}

/** The difference between two states of the counters. `decodeMs` is the time between them, `threads` how many compute. */
export function streamReport(
  before: EngineCounters,
  after: EngineCounters,
  decodeMs: number,
  threads: number,
): StreamReport {
  const tokens = after.tokens - before.tokens;
  const { stream: start } = before;
  const { stream: end } = after;
  if (start === undefined || end === undefined || tokens <= 0) return NOTHING_STREAMED;
  const since = (name: Exclude<keyof StreamCounters, 'storage' | 'twoPhases'>) => end[name] - start[name];
  const needed = since('hotHits') + since('coldHits') + since('misses');
  const share = (count: number) => (needed > 0 ? count / needed : null);
  const gateStallMs = since('gateStallNs') / 1e6;
  const rowStallMs = since('rowStallNs') / 1e6;
  const stallMs = gateStallMs + rowStallMs;
  return {
    two_phases: end.twoPhases,
    hot_hit_share: share(since('hotHits')),
    cold_hit_share: share(since('coldHits')),
    miss_share: share(since('misses')),
    flash_asked_bytes_per_token: Math.round(since('askedBytes') / tokens),
    flash_read_bytes_per_token: Math.round(since('readBytes') / tokens),
    flash_reads_per_token: since('reads') / tokens,
    flash_used_bytes_per_token: Math.round(since('usedBytes') / tokens),
    flash_spared_bytes_per_token: Math.round(since('sparedBytes') / tokens),
    stall_ms_per_token: stallMs / tokens,
    stall_share: decodeMs > 0 ? stallMs / (threads * decodeMs) : null,
    gate_stall_ms_per_token: gateStallMs / tokens,
    row_stall_ms_per_token: rowStallMs / tokens,
    prefetched_per_token: since('prefetched') / tokens,
    prefetch_used_share: since('prefetched') > 0 ? since('prefetchUsed') / since('prefetched') : null,
  };
}

const NOTHING_STREAMED: StreamReport = {
  two_phases: null,
  hot_hit_share: null,
  cold_hit_share: null,
  miss_share: null,
  flash_asked_bytes_per_token: null,
  flash_read_bytes_per_token: null,
  flash_reads_per_token: null,
  flash_used_bytes_per_token: null,
  flash_spared_bytes_per_token: null,
  stall_ms_per_token: null,
  stall_share: null,
  gate_stall_ms_per_token: null,
  row_stall_ms_per_token: null,
  prefetched_per_token: null,
  prefetch_used_share: null,
};

/** Words for how much of the neurons is in memory. */
export function describeKept({ gatesResidentShare, regions, operatingPoint }: KeptFacts): string {
  const rows = formatShare(regions?.rowsShare ?? 1);
  if (operatingPoint !== null) return `${rows} of the neurons`;
  return `${formatShare(gatesResidentShare ?? 0)} of the gates, ${rows} of the other rows`;
}

type KeptFacts = Pick<Engine, 'gatesResidentShare' | 'regions' | 'operatingPoint'>;

/** Lines for people; none when nothing was streamed. */
export function streamLines(report: StreamReport): [string, string][] {
  if (report.flash_reads_per_token === null) return [];
  const share = (value: number | null) => (value === null ? '-' : formatShare(value));
  const hits = `hot ${share(report.hot_hit_share)}, cold ${share(report.cold_hit_share)}`;
  const bytes = `${formatBytes(report.flash_read_bytes_per_token as number)} a token`;
  const asked = `${formatBytes(report.flash_asked_bytes_per_token as number)} of them asked for`;
  const used = `${formatBytes(report.flash_used_bytes_per_token as number)} used`;
  return [
    ['neurons found', `${hits}, on flash ${share(report.miss_share)}`],
    ['flash read', `${bytes} in ${report.flash_reads_per_token.toFixed(1)} reads, ${asked}, ${used}`],
    [
      'waited for flash',
      `${(report.stall_ms_per_token as number).toFixed(2)} ms a token, ${share(report.stall_share)} of thread time`,
    ],
  ];
}
