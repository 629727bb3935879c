import type { NativeAddon, PredictorNumbers } from '../../src/engine/contract.js';
import { type Random, seededRandom } from '../../src/engine/random.js';
import type { Samples } from './samples.js';

/** Tokens of a step. */
const BATCH_SIZE = 128;
/** Falls to zero over the training. */
const LEARNING_RATE = 4e-3;
/** Work of one call of the addon, in floating-point operations: a fraction of a second, so that an abort is heard. */
const CALL_OPERATIONS = 2e10;

export interface TrainingRequest {
  addon: NativeAddon;
  samples: Samples;
  hiddenSize: number;
  neuronCount: number;
  rank: number;
  /** Contributions are relative to this, the mean of the layer: scores of its banks compare. */
  meanContribution: number;
  /** How often every token is learned. */
  passes: number;
  seed: number;
  threads: number;
  /** Hears of the share that is done, between calls; may throw to end early. */
  onProgress: (share: number) => void;
}

/** Trains the predictor of one bank. The same request gives the same numbers, whatever the threads. */
export async function trainPredictor(request: TrainingRequest): Promise<PredictorNumbers> {
  const { addon, samples, hiddenSize, neuronCount, rank, passes, threads } = request;
  const random = seededRandom(request.seed);
  const scale = request.meanContribution > 0 ? 1 / request.meanContribution : 1;
  const weights = samples.contributions.map((contribution) => contribution * scale);
  const parameters = initialParameters(request, weights, random);
  const moments = new Float32Array(2 * parameters.length);
  const { inputs, starts, neurons } = samples;
  const steps = Math.ceil(samples.tokens / BATCH_SIZE);
  const perCall = Math.max(1, Math.floor(CALL_OPERATIONS / (6 * rank * (hiddenSize + neuronCount) * BATCH_SIZE)));
  let stepsBefore = 0;
  for (let pass = 0; pass < passes; pass++) {
    const order = shuffled(samples.tokens, random);
    for (let step = 0; step < steps; step += perCall) {
      const share = stepsBefore / (passes * steps);
      request.onProgress(share);
      const part = order.slice(step * BATCH_SIZE, (step + perCall) * BATCH_SIZE);
      await addon.trainPredictor({
        ...{ hiddenSize, neuronCount, rank, parameters, inputs, starts, neurons, weights, moments, stepsBefore },
        ...{ order: part, batchSize: BATCH_SIZE, learningRate: LEARNING_RATE * (1 - share), threads },
      });
      stepsBefore += Math.ceil(part.length / BATCH_SIZE);
    }
  }
  return { hiddenSize, neuronCount, rank, parameters };
}

/** Bytes that training takes besides the samples: parameters, moments, gradient; weights of the samples. */
export function trainingBytes(hiddenSize: number, neuronCount: number, rank: number, sampleBytes: number): number {
  const parameters = rank * (hiddenSize + neuronCount) + neuronCount;
  const batch = BATCH_SIZE * (3 * hiddenSize + 3 * neuronCount + 3 * rank);
  return 4 * (4 * parameters + batch) + sampleBytes / 2;
}

/**
 * fc1 at random, so that hidden units are near 1; fc2 small; the bias as it is best without them, from how often and how much
 * each neuron contributed.
 */
function initialParameters(request: TrainingRequest, weights: Float32Array, random: Random): Float32Array {
  const { samples, hiddenSize, neuronCount, rank } = request;
  const parameters = new Float32Array(rank * (hiddenSize + neuronCount) + neuronCount);
  const size = rootMeanSquare(samples.inputs) || 1;
  const fc1Most = Math.sqrt(3 / hiddenSize) / size;
  const fc2Most = 0.1 / Math.sqrt(rank);
  const fc2 = rank * hiddenSize;
  const bias = fc2 + rank * neuronCount;
  for (let i = 0; i < fc2; i++) parameters[i] = fc1Most * (2 * random() - 1);
  for (let i = fc2; i < bias; i++) parameters[i] = fc2Most * (2 * random() - 1);
  const fired = new Float64Array(neuronCount);
  const total = new Float64Array(neuronCount);
  for (let i = 0; i < weights.length; i++) {
    fired[samples.neurons[i]]++;
    total[samples.neurons[i]] += weights[i];
  }
  for (let i = 0; i < neuronCount; i++) {
    parameters[bias + i] = Math.log((total[i] + 0.5) / (samples.tokens - fired[i] + 0.5));
  }
  return parameters;
}

function rootMeanSquare(numbers: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < numbers.length; i++) sum += numbers[i] * numbers[i];
  return numbers.length === 0 ? 0 : Math.sqrt(sum / numbers.length);
}

/** The numbers below `count` in random order. */
function shuffled(count: number, random: Random): Uint32Array {
  const order = Uint32Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}
