import type { EngineCounters } from '../engine/counters.js';
import type { Engine } from '../engine/engine.js';
import { formatShare } from './format.js';

/** Who computed what while decoding; null where there is no dense unit, or nothing was decoded. */
export interface UnitReport {
  /** `none`, or what computed hot neurons: `host`, `onnxruntime 1.24.3, cpu`. */
  npu: string;
  /** Share of each expert's neurons that it computes, of 1, 2, 3 and 4 tokens computed together and of a chunk of a prompt. */
  npu_hot_ratios: readonly number[] | null;
  /** Neurons that it computed for each token. */
  npu_neurons_per_token: number | null;
  /** Of the time of FFNs that both computed: the CPU waiting for the unit, and (if it tells) the unit waiting for the CPU. */
  npu_wait_share: number | null;
  npu_idle_share: number | null;
}

/** The difference between two states of the counters. */
export function unitReport(before: EngineCounters, after: EngineCounters, { unit }: Pick<Engine, 'unit'>): UnitReport {
  const nothing = { npu_neurons_per_token: null, npu_wait_share: null, npu_idle_share: null };
  if (unit === null) return { npu: 'none', npu_hot_ratios: null, ...nothing };
  const known = { npu: unit.name, npu_hot_ratios: unit.hotRatios };
  const tokens = after.tokens - before.tokens;
  if (before.unit === undefined || after.unit === undefined || tokens <= 0) return { ...known, ...nothing };
  const jobNs = after.unit.jobNs - before.unit.jobNs;
  const busyNs = after.unit.busyNs - before.unit.busyNs;
  return {
    ...known,
    npu_neurons_per_token: (after.unit.neurons - before.unit.neurons) / tokens,
    npu_wait_share: jobNs > 0 ? (after.unit.waitNs - before.unit.waitNs) / jobNs : null,
    npu_idle_share: jobNs > 0 && busyNs > 0 ? Math.max(0, 1 - busyNs / jobNs) : null,
  };
}

/** Lines for people; none without a unit. */
export function unitLines(report: UnitReport): [string, string][] {
  const { npu, npu_hot_ratios: ratios, npu_wait_share: wait, npu_idle_share: idle } = report;
  if (ratios === null) return [];
  const ofBatches = ratios.slice(0, -1).map((ratio) => ratio.toFixed(2));
  const of = `hot ratio ${ofBatches.join(' ')} of 1 to ${ofBatches.length} tokens, ${ratios.at(-1)?.toFixed(2)} of prompts`;
  const waited = wait === null ? '' : `; the CPU waited for it ${formatShare(wait)} of the time`;
  const idled = idle === null ? '' : `, it for the CPU ${formatShare(idle)}`;
  return [['dense unit', `${npu}, ${of}${waited}${idled}`]];
}
