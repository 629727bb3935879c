import type { RowWriter, Shape } from './shapes.js';

/** Of the stream's numbers, those that are the same for every token; the gates' thresholds act through them. */
const LEVEL_SIZE = 256;
/** Numbers that differ by token: everything a neuron reacts to. A predictor of twice this rank can know it all. */
const FEATURES_MOST = 512;
/** Of the neurons whose gate fires, those whose up does too. */
const UP_SHARE = 0.5;
/**
 * Shares of neurons that fire, of the first and the last layer, if no rate were cut off: 22 % down to 6 %, as published for
 * TurboSparse models (78 to 94 % sparse). With rates of at most RATE_MOST it comes to 13 % down to 5 %.
 */
const FIRST_ACTIVE_SHARE = 0.22;
const LAST_ACTIVE_SHARE = 0.06;
/**
 * Deviation of the logarithm of rates inside a layer. The hotter half of the neurons has a share of phi(1.645) = 95 % of all
 * activations if no rate is cut off, which is the published share of hits with half of the neurons kept.
 */
const LOG_RATE_DEVIATION = 1.645;
const RATE_MOST = 0.95 * UP_SHARE;
/** What the features' variance grows by from the first layer to the last; blocks add to the stream. */
const STREAM_GROWTH = 0.5;

/**
 * What makes a synthetic dReLU model sparse like a real one: firing rates that differ by neuron and layer, a gate whose sign
 * depends on the token through some features of the stream, and predictors that see these features. Weights mean nothing else.
 *
 *   stream   level (256 equal numbers), features (random by token), the rest is 0
 *   gate_i   -threshold_i over the level, random over the features: fires for a share phi(-threshold_i) of tokens
 *   up_i     random: half of the tokens
 *   fc1      each feature twice, with both signs, and the level: ReLU loses nothing
 *   fc2_i    gate_i over the features, twice with both signs, and -threshold_i
 */
export class SparseStream {
  readonly features: number;
  readonly #shape: Shape;
  readonly #numbersOf: (tensor: string, from: number, count: number) => Uint16Array;

  /** `numbersOf`: the random bf16 numbers that a tensor is made of, `count` from element `from` on. */
  constructor(shape: Shape, numbersOf: (tensor: string, from: number, count: number) => Uint16Array) {
    this.#shape = shape;
    this.#numbersOf = numbersOf;
    this.features = Math.min(FEATURES_MOST, shape.hiddenSize - LEVEL_SIZE);
  }

  /** Hidden units of a predictor. */
  get rank(): number {
    return 2 * this.features + 1;
  }

  /** Gates have deviation 1 over features of size 1. */
  get gateScale(): number {
    return Math.sqrt(this.#shape.hiddenSize / this.features);
  }

  /** Level 1, random features, nothing else. */
  readonly embeddings: RowWriter = (_, values) => {
    values.fill(toBf16(1), 0, LEVEL_SIZE);
    values.fill(0, LEVEL_SIZE + this.features);
  };

  /** Blocks add to features alone. */
  readonly outputs: RowWriter = (row, values) => {
    if (row < LEVEL_SIZE || row >= LEVEL_SIZE + this.features) values.fill(0);
  };

  gates(layer: number): RowWriter {
    return (row, values) => {
      values.fill(toBf16(-this.threshold(layer, row) / LEVEL_SIZE), 0, LEVEL_SIZE);
    };
  }

  readonly predictorInputs: RowWriter = (row, values) => {
    values.fill(0);
    if (row < this.features) values[LEVEL_SIZE + row] = toBf16(1);
    else if (row < 2 * this.features) values[LEVEL_SIZE + row - this.features] = toBf16(-1);
    else values.fill(toBf16(1 / LEVEL_SIZE), 0, LEVEL_SIZE);
  };

  predictorScores(layer: number, gateTensor: string): RowWriter {
    const { hiddenSize } = this.#shape;
    return (row, values) => {
      const weights = this.#numbersOf(gateTensor, row * hiddenSize + LEVEL_SIZE, this.features);
      values.set(weights);
      // The other sign is the other top bit.
      for (let k = 0; k < this.features; k++) values[this.features + k] = weights[k] ^ 0x8000;
      values[2 * this.features] = toBf16(-this.threshold(layer, row));
    };
  }

  /** Of the tokens, those that a neuron fires for. */
  rate(layer: number, neuron: number): number {
    const depth = layer / Math.max(1, this.#shape.layerCount - 1);
    const share = FIRST_ACTIVE_SHARE * (LAST_ACTIVE_SHARE / FIRST_ACTIVE_SHARE) ** depth;
    // A normal number of this neuron alone.
    const place = (layer * this.#shape.neuronCount + neuron + 0.5) * 0.6180339887498949;
    const heat = inverseNormal(place - Math.floor(place));
    return Math.min(RATE_MOST, share * Math.exp(LOG_RATE_DEVIATION * heat - LOG_RATE_DEVIATION ** 2 / 2));
  }

  /**
   * The score from which a neuron on flash is fetched, so that the fetched ones are `fetchedPerFired` times those that fire.
   * `order`: the neurons of the layer, the hottest first; `kept` of them are in memory.
   */
  flashThreshold(layer: number, order: Uint32Array, kept: number, fetchedPerFired: number): number {
    const cold = [...order.subarray(Math.min(order.length - 1, Math.ceil(kept * order.length)))];
    const rates = cold.map((neuron) => this.rate(layer, neuron));
    const wanted = fetchedPerFired * rates.reduce((sum, rate) => sum + rate, 0);
    const needed = cold.map((neuron) => this.threshold(layer, neuron) / this.#growth(layer));
    let low = 0;
    let high = 8;
    for (let i = 0; i < 30; i++) {
      const middle = (low + high) / 2;
      const fetched = needed.reduce((sum, threshold) => sum + normalIntegral(-threshold - middle), 0);
      if (fetched > wanted) low = middle;
      else high = middle;
    }
    return low * this.#growth(layer);
  }

  /** Deviation of features in a layer: blocks have added to them. */
  #growth(layer: number): number {
    return Math.sqrt(1 + (STREAM_GROWTH * layer) / this.#shape.layerCount);
  }

  /** What the features of a token must reach for the gate to fire. */
  threshold(layer: number, neuron: number): number {
    return -this.#growth(layer) * inverseNormal(this.rate(layer, neuron) / UP_SHARE);
  }
}

/** The upper half of a float32, truncated. */
function toBf16(value: number): number {
  const bits = new DataView(new ArrayBuffer(4));
  bits.setFloat32(0, value);
  return bits.getUint16(0);
}

/** The number below which a normal number lies with probability p; by bisection of an approximation of its integral. */
function inverseNormal(p: number): number {
  let low = -8;
  let high = 8;
  for (let i = 0; i < 40; i++) {
    const middle = (low + high) / 2;
    if (normalIntegral(middle) < p) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/** Abramowitz and Stegun 26.2.17, within 7.5e-8. */
function normalIntegral(x: number): number {
  const t = 1 / (1 + 0.2316419 * Math.abs(x));
  const series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
  const tail = (Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI)) * series;
  return x < 0 ? tail : 1 - tail;
}
