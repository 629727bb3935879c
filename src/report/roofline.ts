import type { Bandwidths } from '../engine/contract.js';
import type { EngineCounters } from '../engine/counters.js';
import type { Engine } from '../engine/engine.js';

/**
 * What was moved in a second, against what memory and flash of this machine gave in the same process, to the same threads and
 * in reads of the same size. Null where nothing was computed, or where it cannot be measured.
 */
export interface RooflineReport {
  /** Keys and values read for a token; weights, the predictor's included, are `weight_bytes_per_token`. */
  kv_bytes_per_token: number | null;
  /** Weights, keys and values. */
  memory_bytes_per_second: number | null;
  memory_bandwidth_bytes_per_second: number | null;
  memory_bandwidth_share: number | null;
  flash_bytes_per_second: number | null;
  flash_bandwidth_bytes_per_second: number | null;
  /** The I/O share: of the time, what flash would need for these bytes if it did nothing else. */
  flash_bandwidth_share: number | null;
}

/** Measures what the engine could reach, for a roofline between two states of its counters; null if nothing was computed. */
export async function measureRoof(
  engine: Pick<Engine, 'measureBandwidths'>,
  before: EngineCounters,
  after: EngineCounters,
): Promise<Bandwidths | null> {
  if (after.tokens <= before.tokens) return null;
  const { bytes, reads } = flashReads(before, after);
  return engine.measureBandwidths(reads > 0 ? Math.round(bytes / reads) : 0);
}

/** The difference between two states of the counters, `ms` apart, against `roof`. */
export function rooflineReport(
  before: EngineCounters,
  after: EngineCounters,
  ms: number,
  roof: Bandwidths | null,
): RooflineReport {
  const tokens = after.tokens - before.tokens;
  const isKnown = tokens > 0 && ms > 0;
  const perSecond = (bytes: number) => (isKnown ? Math.round((1000 * bytes) / ms) : null);
  const kvBytes = after.kvBytesRead - before.kvBytesRead;
  const memory = perSecond(after.weightBytesRead - before.weightBytesRead + kvBytes);
  const { bytes, reads } = flashReads(before, after);
  const flash = reads > 0 ? perSecond(bytes) : null;
  const share = (rate: number | null, most: number | null) => (rate !== null && most ? rate / most : null);
  const memoryRoof = roof?.memory ?? null;
  const flashRoof = reads > 0 ? (roof?.flash ?? null) : null;
  return {
    kv_bytes_per_token: isKnown ? Math.round(kvBytes / tokens) : null,
    memory_bytes_per_second: memory,
    memory_bandwidth_bytes_per_second: memoryRoof,
    memory_bandwidth_share: share(memory, memoryRoof),
    flash_bytes_per_second: flash,
    flash_bandwidth_bytes_per_second: flashRoof,
    flash_bandwidth_share: share(flash, flashRoof),
  };
}

/** The same for people: `31.2 of 47.1 GB/s memory (66 %), 0.41 of 2.10 GB/s flash (20 %)`; empty if nothing is known. */
export function describeRoofline(report: RooflineReport): string {
  const one = (what: string, rate: number | null, most: number | null, share: number | null) =>
    rate === null || most === null || share === null
      ? []
      : [`${gigabytes(rate)} of ${gigabytes(most)} GB/s ${what} (${Math.round(100 * share)} %)`];
  return [
    ...one(
      'memory',
      report.memory_bytes_per_second,
      report.memory_bandwidth_bytes_per_second,
      report.memory_bandwidth_share,
    ),
    ...one(
      'flash',
      report.flash_bytes_per_second,
      report.flash_bandwidth_bytes_per_second,
      report.flash_bandwidth_share,
    ),
  ].join(', ');
}

function flashReads(before: EngineCounters, after: EngineCounters): { bytes: number; reads: number } {
  const since = (name: 'readBytes' | 'reads') => (after.stream?.[name] ?? 0) - (before.stream?.[name] ?? 0);
  return { bytes: since('readBytes'), reads: since('reads') };
}

function gigabytes(bytesPerSecond: number): string {
  const value = bytesPerSecond / 1e9;
  return value.toFixed(value < 10 ? 2 : 1);
}
