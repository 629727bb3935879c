/** How many clusters of each bank are a dense unit's; docs/DENSE_UNIT.md, "Hot ratio". Pure. */
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

/** The whole number of clusters whose share of a bank's neurons is nearest to `ratio`, 0 to 1. */
export function clustersOfRatio(ratio: number, neuronCount: number): number {
  const off = (clusters: number) => Math.abs(clusterEnd(clusters, neuronCount) / neuronCount - ratio);
  let best = 0;
  for (let clusters = 1; clusters <= clusterCount(neuronCount); clusters++) {
    if (off(clusters) < off(best)) best = clusters;
  }
  return best;
}

/** Clusters, all of whose neurons are among the first `neurons` of a bank. */
export function clustersWithin(neurons: number, neuronCount: number): number {
  return neurons === neuronCount ? clusterCount(neuronCount) : Math.floor(neurons / clusterNeurons(neuronCount));
}
