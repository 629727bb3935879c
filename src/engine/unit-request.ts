/** Which dense unit a model is opened with; docs/DENSE_UNIT.md. */
import { Pi2Error } from '../base/error.js';
import { clusterNeurons } from '../format/npu.js';
import { clusterCount, clusterEnd, clustersOfRatio, clustersWithin, SMALL_BATCHES } from '../plan/hot-ratio.js';
import type { StreamShape } from '../plan/memory-plan.js';
import type { EngineRequest, UnitRequest } from './contract.js';
import type { EngineOptions } from './engine.js';
import type { ModelRequest } from './engine-request.js';

/**
 * `host`: our kernels on threads of their own. `auto` takes a unit that is no core of this machine's CPU; there is none yet, so
 * it is `none`.
 */
export const NPU_CHOICES = ['auto', 'none', 'host'] as const;
export type NpuChoice = (typeof NPU_CHOICES)[number];

/** The unit that was asked for, before memory has its say. */
export interface WantedUnit {
  kind: UnitRequest['kind'];
  threads: number;
  /** Most clusters that it may get. */
  clusters: number;
  /** Whether it gets just these, whatever is faster. */
  isForced: boolean;
}

/** How a dense unit is used by an open engine. */
export interface UnitUse {
  /** E.g. `host`. */
  name: string;
  /** Share of each bank's neurons that it computes, of 1, 2, 3, 4 tokens computed together and of a chunk of a prompt. */
  hotRatios: number[];
  /** Why these are less than was asked for; else null. */
  notice: string | null;
}

/** What the options ask for; null for the CPU alone. Throws E_USAGE for options that contradict each other. */
export function wantedUnit(base: ModelRequest, options: EngineOptions): WantedUnit | null {
  const { npu = 'auto', hotRatio, engine = 'pi2' } = options;
  if (npu === 'auto' || npu === 'none') {
    if (hotRatio === undefined) return null;
    const why = `--hot-ratio is of a dense unit, --npu ${npu} has none here`;
    throw new Pi2Error('E_USAGE', why, 'give --npu host, or leave --hot-ratio out');
  }
  if (engine !== 'pi2') {
    throw new Pi2Error('E_USAGE', `--engine ${engine} has no dense unit`, 'leave one of --engine and --npu out');
  }
  const isForced = hotRatio !== undefined;
  const clusters = isForced ? clustersOfRatio(hotRatio, base.neuronCount) : clusterCount(base.neuronCount);
  return { kind: npu, threads: Math.max(1, Math.floor(base.threads / 2)), clusters, isForced };
}

/** The request for a wanted unit: of a streamed model it gets no more than is always in memory. */
export function unitRequest(
  wanted: WantedUnit,
  { neuronCount }: ModelRequest,
  shape: StreamShape | undefined,
): UnitRequest {
  const hot = shape?.hotNeurons.reduce((least, count) => Math.min(least, count), neuronCount) ?? neuronCount;
  const mostClusters = Math.min(wanted.clusters, clustersWithin(hot, neuronCount));
  return {
    kind: wanted.kind,
    threads: wanted.threads,
    clusterNeurons: clusterNeurons(neuronCount),
    mostClusters,
    clusters: new Array<number>(SMALL_BATCHES.length + 1).fill(wanted.isForced ? mostClusters : 0),
  };
}

/** How an engine with this request uses its unit; null if it has none. */
export function unitUse(wanted: WantedUnit | null, request: EngineRequest, name: string): UnitUse | null {
  const { unit, neuronCount } = request;
  if (wanted === null || unit === undefined) return null;
  const share = (clusters: number) => clusterEnd(clusters, neuronCount) / neuronCount;
  const isLowered = wanted.isForced && unit.mostClusters < wanted.clusters;
  return {
    name,
    hotRatios: unit.clusters.map(share),
    notice: isLowered
      ? `memory holds the neurons of a hot ratio of ${share(unit.mostClusters).toFixed(2)}, not of ${share(wanted.clusters).toFixed(2)}`
      : null,
  };
}
