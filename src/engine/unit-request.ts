/** Which dense unit a model is opened with; docs/DENSE_UNIT.md. */
import { Pi2Error } from '../base/error.js';
import { readFiringRates } from '../format/firing-rates.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { clusterNeurons, graphShapes } from '../format/npu.js';
import { listDeviceProfiles, openDeviceProfile } from '../npu/device-profile.js';
import {
  denseWeights,
  makeOnnxruntimeRequest,
  type OnnxruntimePlaces,
  type OnnxruntimeRequest,
} from '../npu/onnxruntime-request.js';
import {
  clusterCount,
  clusterEnd,
  clustersOfRatio,
  clustersWithin,
  fastestClusters,
  firingShares,
  SMALL_BATCHES,
} from '../plan/hot-ratio.js';
import type { StreamShape } from '../plan/memory-plan.js';
import type { EngineRequest, NativeEngine } from './contract.js';
import type { EngineOptions } from './engine.js';
import type { ModelRequest } from './engine-request.js';
import type { UnitRequest } from './unit-contract.js';

/**
 * `host`: our kernels on threads of their own. `onnxruntime`: graphs by ONNX Runtime, on the CPU or (`qnn`) on the NPU of a
 * device profile. `auto`: that NPU, if its device is said, else the CPU alone: a unit on the CPU's own cores computes what the
 * CPU leaves out.
 */
export const NPU_CHOICES = ['auto', 'none', 'host', 'onnxruntime', 'onnxruntime:cpu', 'onnxruntime:qnn'] as const;
export type NpuChoice = (typeof NPU_CHOICES)[number];

/** The unit that was asked for, before memory has its say. */
export interface WantedUnit {
  kind: UnitRequest['kind'];
  /** Cores of this machine's CPU that it computes on. */
  threads: number;
  /** Most clusters that it may get. */
  clusters: number;
  /** Whether it gets just these, whatever is faster. */
  isForced: boolean;
  onnxruntime?: OnnxruntimeRequest;
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

/**
 * What the options ask for; null for the CPU alone. Throws `Pi2Error`: E_USAGE for options that contradict each other, E_NPU
 * for a model without graphs or a library that is missing, E_MODEL for a graph that is damaged.
 */
export async function wantedUnit(
  model: ModelDirectory,
  base: ModelRequest,
  options: EngineOptions,
): Promise<WantedUnit | null> {
  const { hotRatio, engine = 'pi2' } = options;
  const npu = chooseUnit(model, options);
  if (npu === 'none') {
    if (hotRatio === undefined) return null;
    const why = `--hot-ratio is of a dense unit, and --npu ${options.npu ?? 'auto'} means that there is none here`;
    throw new Pi2Error('E_USAGE', why, 'give --npu host, or leave --hot-ratio out');
  }
  if (engine !== 'pi2') {
    throw new Pi2Error('E_USAGE', `--engine ${engine} has no dense unit`, 'leave one of --engine and --npu out');
  }
  const { neuronCount, threads } = base;
  const isForced = hotRatio !== undefined;
  const clusters = isForced ? clustersOfRatio(hotRatio, neuronCount) : clusterCount(neuronCount);
  if (npu === 'host') return { kind: 'host', threads: Math.max(1, Math.floor(threads / 2)), clusters, isForced };
  // With no cluster at all a unit is opened too: it has one graph, which nobody runs.
  const shapes = graphShapes(neuronCount).filter((shape) => shape.clusters <= Math.max(1, clusters));
  const places = onnxruntimePlaces(npu, options);
  const onnxruntime = await makeOnnxruntimeRequest(denseWeights(model), shapes, places);
  return { kind: 'onnxruntime', threads: places.profile === undefined ? 1 : 0, clusters, isForced, onnxruntime };
}

/** What `auto` means: an NPU whose device is said, if the model has graphs for it. */
function chooseUnit(model: ModelDirectory, { npu = 'auto', npuProfile, engine = 'pi2' }: EngineOptions) {
  if (npu !== 'auto') return npu;
  const hasGraphs = model.manifest.npu !== undefined && engine === 'pi2';
  const hasNpu = npuProfile !== undefined && openDeviceProfile(npuProfile).provider !== undefined;
  return hasGraphs && hasNpu ? 'onnxruntime:qnn' : 'none';
}

/** Which library and which of its providers is to compute. */
function onnxruntimePlaces(npu: NpuChoice, { npuLibrary, npuProfile }: EngineOptions): OnnxruntimePlaces {
  const library = npuLibrary === undefined ? {} : { library: npuLibrary };
  if (npu !== 'onnxruntime:qnn') return library;
  if (npuProfile !== undefined) return { ...library, profile: openDeviceProfile(npuProfile) };
  const known = listDeviceProfiles().join(', ');
  throw new Pi2Error(
    'E_USAGE',
    '--npu onnxruntime:qnn needs the profile of its device',
    `give --npu-profile: ${known}`,
  );
}

/**
 * The request for a wanted unit. Of a streamed model the `host` unit gets no more than is always in memory; so does another whose
 * share is to be measured, since the CPU's speed is measured on the same neurons.
 */
export function unitRequest(
  { kind, threads, clusters, isForced, onnxruntime }: WantedUnit,
  { neuronCount }: ModelRequest,
  shape: StreamShape | undefined,
): UnitRequest {
  const hot = shape?.hotNeurons.reduce((least, count) => Math.min(least, count), neuronCount) ?? neuronCount;
  const isBound = kind === 'host' || !isForced;
  const mostClusters = isBound ? Math.min(clusters, clustersWithin(hot, neuronCount)) : clusters;
  return {
    kind,
    threads,
    clusterNeurons: clusterNeurons(neuronCount),
    mostClusters,
    clusters: new Array<number>(SMALL_BATCHES.length + 1).fill(isForced ? mostClusters : 0),
    ...(onnxruntime === undefined ? {} : { onnxruntime }),
  };
}

/**
 * Decides how much an open engine's unit computes, where that was not said: measures both sides and takes what is estimated to
 * be fastest. Resolves with how the unit is used; null if there is none.
 */
export async function settleUnit(
  model: ModelDirectory,
  wanted: WantedUnit | null,
  { unit, neuronCount, threads }: EngineRequest,
  native: NativeEngine,
): Promise<UnitUse | null> {
  if (wanted === null || unit === undefined) return null;
  let { clusters } = unit;
  if (!wanted.isForced && unit.mostClusters > 0) {
    const times = await native.measureUnit();
    const { activation } = model.manifest.hyperparameters.ffn;
    const rates = activation === 'silu' ? null : await readFiringRates(model, SMALL_BATCHES.length);
    const shares = firingShares(neuronCount, activation === 'silu', rates);
    const takesTurns = unit.threads >= threads;
    clusters = shares.map((ofGraph, i) => {
      const [alone, beside] = [times.alone[i], times.beside[i]];
      return fastestClusters({ unit: times.unit[i], alone, beside, takesTurns }, ofGraph);
    });
    await native.setUnitSchedule({ clusters });
  }
  const share = (count: number) => clusterEnd(count, neuronCount) / neuronCount;
  const isLowered = wanted.isForced && unit.mostClusters < wanted.clusters;
  const why = `memory holds the neurons of a hot ratio of ${share(unit.mostClusters).toFixed(2)}, not of ${share(wanted.clusters).toFixed(2)}`;
  return {
    name: native.counters().unit?.name ?? unit.kind,
    hotRatios: clusters.map(share),
    notice: isLowered ? why : null,
  };
}
