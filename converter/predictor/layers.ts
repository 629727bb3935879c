import { formatBytes } from '../../src/base/bytes.js';
import { Pi2Error } from '../../src/base/error.js';
import type { NativeAddon, PredictorNumbers } from '../../src/engine/contract.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import type { BundleLayout } from '../../src/format/layout.js';
import type { TensorSource } from '../checkpoint/tensor-source.js';
import { type JudgedBank, type LayerCurve, LEVELS, measureCurve } from './curve.js';
import { decodeLayer, type EncodedLayer, encodeLayer, type PredictorEncodings, predictorBytes } from './encode.js';
import { readPredictor } from './from-checkpoint.js';
import { cheapestRank, rankCandidates } from './rank.js';
import type { SampleFile, Samples } from './samples.js';
import { trainingBytes, trainPredictor } from './train.js';

/**
 * How predictors are stored. Measured on the trained dReLU model, layer 7, rank 64, with `--quant q4`: share of the FFN's bytes
 * that the predictor takes, and of its neurons that keep 95 % of the magnitude.
 *
 * | fc1, fc2      | bytes  | neurons |
 * | f16 f16       | 38.0 % | 19.0 %  |
 * | q8 q8         | 20.6 % | 19.1 %  |
 * | q4 q8         | 18.8 % | 19.2 %  |
 * | q8 q4         | 13.2 % | 20.1 %  |
 * | q4 q4         | 11.3 % | 20.3 %  |
 *
 * In every layer and at every rank q4 costs fewer bytes in sum; the same bytes spent on a larger rank buy more.
 */
export const PREDICTOR_ENCODINGS: PredictorEncodings = { fc1: 'q4', fc2: 'q4' };

/** The level that ranks are compared at: about what a budget of 1 % allows. */
const RANK_LEVEL = LEVELS.indexOf(1);
/** Passes over the training text to compare ranks, and to train the one that is chosen. */
const TRIAL_PASSES = 2;
const PASSES = 6;
/** Samples of a bank in memory; what comes later in the text is left out. */
const SAMPLE_BYTES_MOST = 1024 * 1024 * 1024;
/** JavaScript, the encoder, scores. */
const OVERHEAD_BYTES = 128 * 1024 * 1024;

/** What predictors of layers are made with. */
export interface LayerWorkshop {
  addon: NativeAddon;
  hyperparameters: Hyperparameters;
  layout: BundleLayout;
  /** Numbers of the banks of each layer. */
  banksOf: (layer: number) => number[];
  /** What predictors are judged on, and trained on. */
  heldOut: SampleFile;
  training: SampleFile | null;
  /** For each layer: magnitude that a neuron brings for a token, in the mean; and where level 1 is just worth it. */
  magnitude: readonly number[];
  worth: readonly number[];
  maxMemoryBytes: number;
  threads: number;
  /** Hears what is done; may throw to end early. */
  onProgress: (what: string) => void;
}

/** Trains the predictors of a layer's experts, of the rank that needs the fewest bytes for a token. Throws `E_MEMORY`. */
export async function trainLayer(shop: LayerWorkshop, layer: number): Promise<EncodedLayer> {
  const { hidden_size, neuron_count } = shop.hyperparameters;
  const neuronBytes = shop.layout.part1_bytes + shop.layout.part2_bytes;
  const ranks = rankCandidates(hidden_size, neuron_count);
  requireMemory(shop, layer, ranks[ranks.length - 1]);
  const rank = await cheapestRank(ranks, async (candidate) => {
    const encoded = await trainRank(shop, layer, candidate, TRIAL_PASSES);
    const { runs } = await judgeLayer(shop, layer, encoded);
    const computed = sum(runs[RANK_LEVEL].map((run) => run.computed));
    const lost = sum(runs[0].map((run) => run.magnitude)) - sum(runs[RANK_LEVEL].map((run) => run.magnitude));
    // What is lost is worth the neurons that it would buy at the price of the level.
    const lostNeurons = (lost * shop.magnitude[layer]) / (LEVELS[RANK_LEVEL] * shop.worth[layer] || 1);
    const shape = { hiddenSize: hidden_size, neuronCount: neuron_count, rank: candidate };
    return predictorBytes(shape, PREDICTOR_ENCODINGS) + (computed + lostNeurons) * neuron_count * neuronBytes;
  });
  return trainRank(shop, layer, rank, PASSES);
}

/** The curve of a layer's predictors as they are stored, on held-out text. */
export async function judgeLayer(shop: LayerWorkshop, layer: number, encoded: EncodedLayer): Promise<LayerCurve> {
  const { hidden_size, neuron_count } = shop.hyperparameters;
  const predictors = decodeLayer(shop.addon, encoded, hidden_size, neuron_count);
  const banks: JudgedBank[] = [];
  for (const [e, bank] of shop.banksOf(layer).entries()) {
    banks.push({ samples: await shop.heldOut.read(bank, SAMPLE_BYTES_MOST), predictor: predictors[e] });
  }
  return measureCurve(shop.addon, banks, shop.worth[layer], shop.threads);
}

/** Takes the predictors of a layer from the checkpoint; those of smaller rank get units that are always 0. */
export async function takeLayer(
  shop: LayerWorkshop,
  layer: number,
  checkpoint: TensorSource,
  order: Uint32Array | null,
): Promise<EncodedLayer> {
  const sources = (checkpoint.predictors() ?? [])[layer];
  const rank = Math.max(...sources.map((source) => source.rank));
  const { neuron_count } = shop.hyperparameters;
  const banks: PredictorNumbers[] = [];
  for (const [e, source] of sources.entries()) {
    shop.onProgress(`taking the predictor of layer ${layer} from the checkpoint`);
    const own = order?.subarray(e * neuron_count, (e + 1) * neuron_count) ?? null;
    banks.push(await readPredictor(shop.addon, checkpoint, source, own, rank));
  }
  return encodeLayer(shop.addon, layer, banks, PREDICTOR_ENCODINGS, shop.threads);
}

async function trainRank(shop: LayerWorkshop, layer: number, rank: number, passes: number): Promise<EncodedLayer> {
  const { addon, hyperparameters: h, threads } = shop;
  const training = shop.training as SampleFile;
  const banks = shop.banksOf(layer);
  const meanContribution = training.meanContribution(banks);
  const predictors: PredictorNumbers[] = [];
  for (const [e, bank] of banks.entries()) {
    const samples: Samples = await training.read(bank, SAMPLE_BYTES_MOST);
    const name = banks.length > 1 ? `layer ${layer}, expert ${e}` : `layer ${layer}`;
    predictors.push(
      await trainPredictor({
        ...{ addon, samples, rank, meanContribution, passes, threads },
        hiddenSize: h.hidden_size,
        neuronCount: h.neuron_count,
        seed: bank,
        onProgress: (share) => shop.onProgress(`${name}, rank ${rank}, ${Math.floor(100 * share)} %`),
      }),
    );
  }
  return encodeLayer(addon, layer, predictors, PREDICTOR_ENCODINGS, threads);
}

function requireMemory(shop: LayerWorkshop, layer: number, rank: number): void {
  const { hidden_size, neuron_count } = shop.hyperparameters;
  const training = shop.training as SampleFile;
  const samples = Math.max(...shop.banksOf(layer).map((bank) => training.bytes(bank, SAMPLE_BYTES_MOST)));
  const needed = OVERHEAD_BYTES + samples + trainingBytes(hidden_size, neuron_count, rank, samples);
  if (needed <= shop.maxMemoryBytes) return;
  throw new Pi2Error(
    'E_MEMORY',
    `training a predictor takes ${formatBytes(needed)}; the ceiling is ${formatBytes(shop.maxMemoryBytes)}`,
    `give --max-ram ${Math.ceil(needed / 2 ** 20)}M, or --predictor none`,
  );
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}
