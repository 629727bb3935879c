import { type ActivationProfile, layerCounts } from './profile.js';

/** For each layer [experts x neurons]: which neuron of the checkpoint bundle j of an expert is. */
export type HeatOrder = readonly Uint32Array[];

/** The neurons of each expert by how often they fired, the hottest first; ties by number. */
export function heatOrder(profile: ActivationProfile): HeatOrder {
  const { layers, experts, neurons } = profile.shape;
  return Array.from({ length: layers }, (_, layer) => {
    const counts = layerCounts(profile, layer);
    const order = new Uint32Array(experts * neurons);
    for (let expert = 0; expert < experts; expert++) {
      const own = counts.subarray(expert * neurons, (expert + 1) * neurons);
      const sorted = Uint32Array.from({ length: neurons }, (_, i) => i).sort((a, b) => own[b] - own[a] || a - b);
      order.set(sorted, expert * neurons);
    }
    return order;
  });
}
