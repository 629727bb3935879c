import type { NativeAddon, PredictorNumbers } from '../../src/engine/contract.js';
import type { Samples } from './samples.js';

/** Neurons of an expert are counted in so many runs of equal length, hottest first: what may be in memory, what on flash. */
export const RUNS = 4;
/** Tokens that are scored at once. */
const SCORE_TOKENS = 256;
const BINS = 1 << 16;

/**
 * Prices of computing a neuron, relative to what all neurons bring in the mean: a neuron is computed where the magnitude that its
 * score promises is worth the price. From nothing (all that ever fired) to beyond any worth (none).
 */
export const LEVELS: readonly number[] = [
  0,
  ...Array.from({ length: 55 }, (_, i) => 2 ** ((i - 27) / 3)),
  Number.POSITIVE_INFINITY,
];

/** What a threshold does to one run of a layer's neurons: shares of all neurons and of all magnitude of the layer. */
interface RunShares {
  computed: number;
  magnitude: number;
}

/** What a layer computes for each of the levels. */
export interface LayerCurve {
  /** For each level: the least score that is computed, ascending. */
  thresholds: number[];
  /** For each level and run. */
  runs: RunShares[][];
}

/** The bank's samples and the predictor whose scores are judged on them. */
export interface JudgedBank {
  samples: Samples;
  predictor: PredictorNumbers;
}

/**
 * How many neurons of a layer reach a score, and how much of the magnitude they have, on samples that the predictor was not
 * trained on. `worth` is the magnitude that a neuron brings for a token where level 1 is just worth it. Scores are sorted into
 * bins by their first 16 bits: fine enough, and of any scale.
 */
export async function measureCurve(
  addon: NativeAddon,
  banks: readonly JudgedBank[],
  worth: number,
  threads: number,
): Promise<LayerCurve> {
  const counts = new Float64Array(RUNS * BINS);
  const magnitudes = new Float64Array(RUNS * BINS);
  let neuronTokens = 0;
  for (const { samples, predictor } of banks) {
    const { hiddenSize, neuronCount } = predictor;
    const scores = new Float32Array(SCORE_TOKENS * neuronCount);
    const words = new Uint32Array(scores.buffer);
    const runOf = Uint32Array.from({ length: neuronCount }, (_, i) => Math.floor((RUNS * i) / neuronCount) * BINS);
    neuronTokens += samples.tokens * neuronCount;
    for (let first = 0; first < samples.tokens; first += SCORE_TOKENS) {
      const tokens = Math.min(SCORE_TOKENS, samples.tokens - first);
      const inputs = samples.inputs.subarray(first * hiddenSize, (first + tokens) * hiddenSize);
      await addon.scorePredictor({ ...predictor, inputs, scores: scores.subarray(0, tokens * neuronCount), threads });
      for (let t = 0; t < tokens; t++) {
        const row = t * neuronCount;
        for (let i = 0; i < neuronCount; i++) counts[runOf[i] + binOf(words[row + i])]++;
        for (let e = samples.starts[first + t]; e < samples.starts[first + t + 1]; e++) {
          const i = samples.neurons[e];
          magnitudes[runOf[i] + binOf(words[row + i])] += samples.contributions[e];
        }
      }
    }
  }
  return curveOf(counts, magnitudes, Math.max(1, neuronTokens), worth);
}

function curveOf(counts: Float64Array, magnitudes: Float64Array, neuronTokens: number, worth: number): LayerCurve {
  const total = magnitudes.reduce((sum, magnitude) => sum + magnitude, 0);
  const binCounts = new Float64Array(BINS);
  const binMagnitudes = new Float64Array(BINS);
  for (let i = 0; i < counts.length; i++) {
    binCounts[i % BINS] += counts[i];
    binMagnitudes[i % BINS] += magnitudes[i];
  }
  const curve: LayerCurve = { thresholds: [], runs: [] };
  const runs: RunShares[] = Array.from({ length: RUNS }, () => ({ computed: 0, magnitude: 0 }));
  let bin = BINS;
  // From the highest price down, bins are added from the highest score down.
  for (const level of LEVELS.toReversed()) {
    const end = cheapestBin(binCounts, binMagnitudes, level * worth, bin);
    while (bin > end) {
      bin--;
      for (const [run, shares] of runs.entries()) {
        shares.computed += counts[run * BINS + bin] / neuronTokens;
        shares.magnitude += total === 0 ? 0 : magnitudes[run * BINS + bin] / total;
      }
    }
    curve.thresholds.unshift(edgeOf(bin));
    curve.runs.unshift(runs.map((run) => ({ ...run })));
  }
  return curve;
}

/** The bin, not above `most`, from which on magnitude less price is most; the highest of several. */
function cheapestBin(counts: Float64Array, magnitudes: Float64Array, price: number, most: number): number {
  if (price === Number.POSITIVE_INFINITY) return most;
  let best = most;
  let bestGain = 0;
  let gain = 0;
  for (let bin = most - 1; bin >= 0; bin--) {
    gain += magnitudes[bin] - price * counts[bin];
    if (gain <= bestGain) continue;
    best = bin;
    bestGain = gain;
  }
  return best;
}

/** Floats in ascending order have ascending bins: the sign bit turned over, negative numbers with all bits turned over. */
function binOf(word: number): number {
  return (word >>> 31 === 0 ? word ^ 0x80000000 : ~word) >>> 16;
}

const edge = new DataView(new ArrayBuffer(4));
/** Above every score that means something, and still a number that JSON can hold. */
const NEVER = 3e38;

/** The least float of a bin; above the last bin, what no score reaches. */
function edgeOf(bin: number): number {
  if (bin === BINS) return NEVER;
  const word = bin << 16;
  edge.setUint32(0, bin >= BINS / 2 ? word ^ 0x80000000 : ~word);
  const value = edge.getFloat32(0);
  return Number.isFinite(value) ? value : bin >= BINS / 2 ? NEVER : -NEVER;
}
