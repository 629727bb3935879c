/** How banks are cut into clusters for a dense unit; docs/DENSE_UNIT.md. */

const CLUSTERS_MAX = 8;
const CLUSTER_MULTIPLE = 128;

/** Neurons of every cluster of a bank but the last, which may have fewer: a multiple of 128, so that there are at most 8. */
export function clusterNeurons(neuronCount: number): number {
  return Math.ceil(neuronCount / CLUSTERS_MAX / CLUSTER_MULTIPLE) * CLUSTER_MULTIPLE;
}
