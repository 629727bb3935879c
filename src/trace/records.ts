import type { NativeTrace } from '../engine/contract.js';

/** An event as Chrome's trace viewer and Perfetto read it; times in microseconds. */
export interface TraceEvent {
  name: string;
  /** Complete span, begin and end of one that may overlap others, counter, or metadata. */
  ph: 'X' | 'b' | 'e' | 'C' | 'M';
  pid: number;
  tid: number;
  ts?: number;
  dur?: number;
  cat?: string;
  id?: number;
  args?: Record<string, string | number>;
}

/** Tracks of an engine: JavaScript, then its threads, then flash. */
export const JAVASCRIPT_TRACK = 0;
export const FLASH_TRACK = 1000;

/** Bytes of a record, and its fields: native/base/trace.h. */
const RECORD_BYTES = 32;
const NO_LAYER = 0xffffffff;
/** Stages that are no span of a thread, and what their value counts. */
const COUNTERS = new Map([
  ['missing neurons', 'neurons'],
  ['flash bytes', 'bytes'],
]);

/** Nanoseconds of the monotonic clock as the events of a file have them. */
export function microseconds(ns: bigint, originNs: bigint): number {
  return Number(ns - originNs) / 1000;
}

/** The events of what an engine traced. `stages`: names by number; `firstId`: of the first read. */
export function decodeTrace(
  { records }: NativeTrace,
  stages: readonly string[],
  pid: number,
  originNs: bigint,
  firstId: number,
): TraceEvent[] {
  const view = new DataView(records);
  return Array.from({ length: records.byteLength / RECORD_BYTES }, (_, i) => {
    const at = i * RECORD_BYTES;
    const ts = microseconds(view.getBigUint64(at, true), originNs);
    const end = microseconds(view.getBigUint64(at + 8, true), originNs);
    const value = Number(view.getBigUint64(at + 16, true));
    const layer = view.getUint32(at + 24, true);
    const name = stages[view.getUint16(at + 28, true)];
    const where: Record<string, number> = layer === NO_LAYER ? {} : { layer };
    const counted = COUNTERS.get(name);
    if (counted !== undefined) {
      return [{ name, ph: 'C' as const, pid, tid: FLASH_TRACK, ts, args: { [counted]: value } }];
    }
    if (name === 'read') {
      const read = { name, cat: 'flash', id: firstId + i, pid, tid: FLASH_TRACK };
      return [
        { ...read, ph: 'b' as const, ts, args: { ...where, bytes: value } },
        { ...read, ph: 'e' as const, ts: end },
      ];
    }
    const args = name === 'step' ? { tokens: value } : where;
    return [{ name, ph: 'X' as const, pid, tid: 1 + view.getUint16(at + 30, true), ts, dur: end - ts, args }];
  }).flat();
}
