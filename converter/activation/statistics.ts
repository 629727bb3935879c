import { BATCH_SIZES_MOST, layerNeurons } from '../../src/format/profile-header.js';
import { type ActivationProfile, layerCounts } from './profile.js';

/** How much of all activations the covering share is about. */
const COVERED = 0.8;

/** What a profile says about a layer, or about all. Shares are from 0 to 1, of all neurons of all experts. */
export interface FiringStatistics {
  /** Mean share of neurons that fire for a token. */
  rate: number;
  /** `rates_by_batch[b - 1]`: mean share that fires for at least one of b consecutive tokens. Null: no such batch. */
  rates_by_batch: (number | null)[];
  /** Least share of neurons that together do 80 % of all firing. Null when nothing fired. */
  covering_80: number | null;
  /** Share of neurons that never fired. */
  never: number;
  /** Share of the neurons that fire which had fired for the token before as well. Null when there were none. */
  overlap: number | null;
  /** What `overlap` would be if tokens were in random order. */
  overlap_by_chance: number | null;
}

export interface ProfileStatistics {
  tokens: number;
  layers: (FiringStatistics & {
    /** Share of tokens that each expert was used for; null for a dense FFN. */
    experts: number[] | null;
  })[];
  /** Means over the layers, but for null ones. */
  mean: FiringStatistics;
  /** Least share of all neurons of the model that together do 80 % of all firing. */
  covering_80_whole_model: number | null;
}

/** What a profile says of each layer and of the model as a whole; shares are of neurons, rates of tokens. */
export function profileStatistics(profile: ActivationProfile): ProfileStatistics {
  const { shape, batches } = profile;
  const layers = Array.from({ length: shape.layers }, (_, layer) => {
    const used = profile.routed.subarray(layer * shape.experts, (layer + 1) * shape.experts);
    const experts = shape.experts > 1 ? Array.from(used, (count) => count / batches[0]) : null;
    return { ...layerStatistics(profile, layer), experts };
  });
  const all = new Uint32Array(shape.layers * layerNeurons(shape));
  for (let layer = 0; layer < shape.layers; layer++) all.set(layerCounts(profile, layer), layer * layerNeurons(shape));
  return { tokens: batches[0], layers, mean: meanOf(layers), covering_80_whole_model: coveringShare(all) };
}

function layerStatistics(profile: ActivationProfile, layer: number): FiringStatistics {
  const { batches, following, shared } = profile;
  const counts = layerCounts(profile, layer);
  const total = sum(counts);
  const squares = counts.reduce((all, count) => all + count * count, 0);
  return {
    rate: total / (batches[0] * counts.length),
    rates_by_batch: Array.from({ length: BATCH_SIZES_MOST }, (_, i) =>
      ratio(sum(layerCounts(profile, layer, i + 1)), batches[i] * counts.length),
    ),
    covering_80: coveringShare(counts),
    never: counts.reduce((none, count) => none + (count === 0 ? 1 : 0), 0) / counts.length,
    overlap: ratio(shared[layer], following[layer]),
    // A neuron that fires does so for a random token with its own rate.
    overlap_by_chance: ratio(squares, total * batches[0]),
  };
}

/** The least share of neurons that together have at least 80 % of the counts. */
function coveringShare(counts: Uint32Array): number | null {
  const total = sum(counts);
  if (total === 0) return null;
  const ascending = counts.slice().sort();
  let covered = 0;
  let neurons = 0;
  while (covered < COVERED * total) covered += ascending[ascending.length - ++neurons];
  return neurons / counts.length;
}

function meanOf(layers: readonly FiringStatistics[]): FiringStatistics {
  const mean = (pick: (layer: FiringStatistics) => number | null) => {
    const values = layers.map(pick).filter((value) => value !== null);
    return ratio(
      values.reduce((all, value) => all + value, 0),
      values.length,
    );
  };
  return {
    rate: mean((layer) => layer.rate) as number,
    rates_by_batch: Array.from({ length: BATCH_SIZES_MOST }, (_, i) => mean((layer) => layer.rates_by_batch[i])),
    covering_80: mean((layer) => layer.covering_80),
    never: mean((layer) => layer.never) as number,
    overlap: mean((layer) => layer.overlap),
    overlap_by_chance: mean((layer) => layer.overlap_by_chance),
  };
}

function sum(counts: Uint32Array): number {
  return counts.reduce((total, count) => total + count, 0);
}

function ratio(part: number, whole: number): number | null {
  return whole === 0 ? null : part / whole;
}
