/** How many clusters of each bank are a dense unit's; docs/DENSE_UNIT.md, "Hot ratio". Pure. */
import type { FiringRates } from '../format/firing-rates.js';
import { clusterNeurons } from '../format/npu.js';

/** Tokens computed together that have a ratio of their own; behind them comes the one of a chunk of a prompt. */
export const SMALL_BATCHES = [1, 2, 3, 4] as const;

/** Clusters of a bank. */
export function clusterCount(neuronCount: number): number {
  return Math.ceil(neuronCount / clusterNeurons(neuronCount));
}

/** Neurons of the first clusters of a bank. */
export function clusterEnd(clusters: number, neuronCount: number): number {
  return Math.min(clusters * clusterNeurons(neuronCount), neuronCount);
}

/** The same for 1, 2, … `clusters` clusters. */
export function clusterEnds(clusters: number, neuronCount: number): number[] {
  return Array.from({ length: clusters }, (_, i) => clusterEnd(i + 1, neuronCount));
}

/** The whole number of clusters whose share of a bank's neurons is nearest to `ratio`, 0 to 1; of two as near the larger. */
export function clustersOfRatio(ratio: number, neuronCount: number): number {
  const off = (clusters: number) => Math.abs(clusterEnd(clusters, neuronCount) / neuronCount - ratio);
  let best = 0;
  for (let clusters = 1; clusters <= clusterCount(neuronCount); clusters++) {
    if (off(clusters) <= off(best)) best = clusters;
  }
  return best;
}

/** Clusters, all of whose neurons are among the first `neurons` of a bank. */
export function clustersWithin(neurons: number, neuronCount: number): number {
  return neurons === neuronCount ? clusterCount(neuronCount) : Math.floor(neurons / clusterNeurons(neuronCount));
}

/** Nanoseconds of a neuron on the CPU: to find out whether it fires, and beyond that if it does. */
interface NeuronTimes {
  lookNs: number;
  fireNs: number;
}

/** What was measured for some number of tokens computed together. */
export interface JobTimes {
  /** Nanoseconds that the unit takes for 1, 2, … clusters. */
  unit: readonly number[];
  /** With all threads, and with those that are left beside the unit. */
  alone: NeuronTimes;
  beside: NeuronTimes;
  /** Whether the CPU computes only when the unit is done. */
  takesTurns: boolean;
}

/** A gain of less than this share is none: times differ by as much from one measurement to the next. */
const LEAST_GAIN = 0.05;

/**
 * The number of clusters with which a job is estimated to be fastest; 0, the CPU alone, unless others gain more than
 * measurements differ. `shares`: in which share of jobs each neuron fires, in heat order.
 */
export function fastestClusters({ unit, alone, beside, takesTurns }: JobTimes, shares: ArrayLike<number>): number {
  const neurons = shares.length;
  const firing = new Float64Array(neurons + 1);
  for (let i = neurons - 1; i >= 0; i--) firing[i] = firing[i + 1] + shares[i];
  const cpuNs = ({ lookNs, fireNs }: NeuronTimes, from: number) => (neurons - from) * lookNs + firing[from] * fireNs;
  let best = 0;
  let bestNs = (1 - LEAST_GAIN) * cpuNs(alone, 0);
  for (const [i, unitNs] of unit.entries()) {
    const restNs = cpuNs(beside, clusterEnd(i + 1, neurons));
    const ns = takesTurns ? unitNs + restNs : Math.max(unitNs, restNs);
    if (ns < bestNs) {
      best = i + 1;
      bestNs = ns;
    }
  }
  return best;
}

/** What a neuron is taken to fire without a profile: about what sparse models do. */
const ASSUMED_RATE = 0.1;

/**
 * In which share of jobs each neuron fires for one of the tokens, in heat order; for 1 to 4 tokens, and for a chunk of a prompt,
 * where nearly all do. `firesAlways`: of models whose activation is never zero. Without `rates` neurons are taken to be alike.
 * Of a mixture of experts a job is the tokens that are routed to one, which are taken to fire neurons independently.
 */
export function firingShares(neuronCount: number, firesAlways: boolean, rates: FiringRates | null): Float64Array[] {
  const always = new Float64Array(neuronCount).fill(1);
  const isDense = rates?.routed.every((share) => share === 1);
  const ofBatch = (tokens: number): Float64Array => {
    if (firesAlways) return always;
    const counted = rates?.batchShares?.[tokens - 1];
    if (isDense && counted) return counted;
    const anyOf = (rate: number) => 1 - (1 - Math.min(1, rate)) ** tokens;
    if (rates === null) return new Float64Array(neuronCount).fill(anyOf(ASSUMED_RATE));
    const shares = new Float64Array(neuronCount);
    for (const [bank, ofBank] of rates.rates.entries()) {
      const routed = rates.routed[bank] || 1;
      for (let i = 0; i < neuronCount; i++) shares[i] += anyOf(ofBank[i] / routed) / rates.rates.length;
    }
    return shares;
  };
  return [...SMALL_BATCHES.map(ofBatch), always];
}
