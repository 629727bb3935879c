import type { NativeAddon, PredictorNumbers } from '../../src/engine/contract.js';
import type { Samples } from './samples.js';

/** Neurons of an expert are counted in so many runs of equal length, hottest first: what may be in memory, what on flash. */
export const RUNS = 4;
/** Tokens that are scored at once. */
const SCORE_TOKENS = 256;
const BINS = 1 << 16;

/**
 * The magnitude shares that thresholds are made for, falling: all that ever fired, then losses that double in four steps, then
 * nothing.
 */
export const LEVELS: readonly number[] = [1, ...Array.from({ length: 49 }, (_, i) => 1 - 0.0002 * 2 ** (i / 4)), 0];

/** What a threshold does to one run of a layer's neurons: shares of all neurons and of all magnitude of the layer. */
interface RunShares {
  computed: number;
  magnitude: number;
}

/** What a layer computes for each of the levels. */
export interface LayerCurve {
  /** For each level: the least score that is computed. */
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
 * trained on. Scores are sorted into bins by their first 16 bits: fine enough, and of any scale.
 */
export async function measureCurve(
  addon: NativeAddon,
  banks: readonly JudgedBank[],
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
  return curveOf(counts, magnitudes, Math.max(1, neuronTokens));
}

function curveOf(counts: Float64Array, magnitudes: Float64Array, neuronTokens: number): LayerCurve {
  const total = magnitudes.reduce((sum, magnitude) => sum + magnitude, 0);
  const curve: LayerCurve = { thresholds: [], runs: [] };
  const runs: RunShares[] = Array.from({ length: RUNS }, () => ({ computed: 0, magnitude: 0 }));
  let bin = BINS;
  let kept = 0;
  // From the highest score down: the levels ascend.
  for (const level of LEVELS.toReversed()) {
    while (bin > 0 && kept < level * total) {
      bin--;
      for (let run = 0; run < RUNS; run++) {
        kept += magnitudes[run * BINS + bin];
        runs[run].computed += counts[run * BINS + bin] / neuronTokens;
        runs[run].magnitude += total === 0 ? 0 : magnitudes[run * BINS + bin] / total;
      }
      // The sum of the shares may miss the whole by a rounding.
      if (total - kept <= 1e-9 * total) kept = total;
    }
    curve.thresholds.unshift(edgeOf(bin));
    curve.runs.unshift(runs.map((run) => ({ ...run })));
  }
  return curve;
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
