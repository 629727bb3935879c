import {
  type LayerFacts,
  type LayerModel,
  layerFacts,
  layerModel,
  rateOf,
  type Setting,
  sharesOf,
  TOPIC_KEPT,
} from './activation-settings.js';
import { bisect, inverseNormal, normalIntegral } from './normal.js';
import { fromBf16, type NumberBlock, toBf16 } from './number-block.js';
import type { Shape } from './shapes.js';
import type { RowWriter } from './tensors.js';

/** Of the stream's numbers, those that are the same for every token; thresholds of gates and ups act through them. */
const LEVEL_MOST = 256;
/** Numbers that differ by token: everything a neuron reacts to. A predictor of twice this rank can know it all. */
const FEATURES_MOST = 512;
/**
 * What blocks add to the stream is scaled by this: the sums of neurons that nearly always fire are the same for every token, and
 * would shift the thresholds of all others.
 */
const OUTPUT_SCALE = 0.4;
/** What the own features' variance grows by from the first layer to the last, as blocks add to the stream; measured. */
const STREAM_GROWTH = 0.08;
const ONE = toBf16(1);
const MINUS_ONE = toBf16(-1);
const SIGN = 0x8000;

/** An expert of a layer, and the tensors of its gates and ups. */
export interface Bank {
  layer: number;
  expert: number;
  gate: string;
  up: string;
}

/** What the features of a token must reach, in their own measure, for gate and up to be above zero. */
interface Thresholds {
  gate: Float64Array;
  up: Float64Array;
}

/**
 * What makes a synthetic dReLU model sparse like a real one: firing rates that differ by neuron and layer, gates and ups whose
 * signs depend on the token through some features of the stream, topics that neighbouring tokens share, and predictors that see
 * all of this. Weights mean nothing else.
 *
 *   stream   level (256 equal numbers), topic (128 numbers, +1 or -1, different topics at right angles), own features of the
 *            token (random); the rest is 0. Without topics all features are own.
 *   gate_i   -threshold_i over the level, random over topic and own features, whose shares of the variance differ by layer
 *   up_i     the same with other thresholds
 *   head     the numbers of the token's own topic: so the next token is of the same topic with probability `TOPIC_KEPT`
 *   fc1      each feature twice, with both signs, and the level: ReLU loses nothing
 *   fc2_i    gate_i over the features, twice with both signs, and -threshold_i
 */
export class SparseStream {
  readonly facts: readonly LayerFacts[];
  /** Topics, as many as the stream has numbers for them; 0: tokens have none. Token t is of topic t mod this. */
  readonly topics: number;
  readonly #shape: Shape;
  readonly #block: NumberBlock;
  readonly #models: readonly LayerModel[];
  readonly #level: number;
  readonly #features: number;
  readonly #banks = new Map<number, Thresholds>();

  constructor(shape: Shape, setting: Setting, block: NumberBlock) {
    const { layerCount, hiddenSize, expertCount = 1, expertsPerToken = 1 } = shape;
    this.#shape = shape;
    this.#block = block;
    this.facts = layerFacts(setting, layerCount, expertCount > 1);
    this.#models = this.facts.map((facts) => layerModel(facts, expertsPerToken / expertCount));
    this.#level = Math.min(LEVEL_MOST, hiddenSize / 4);
    this.#features = Math.min(FEATURES_MOST, hiddenSize - this.#level);
    const hasTopics = this.facts.some(({ overlap }) => overlap !== null);
    this.topics = hasTopics ? 2 ** Math.floor(Math.log2(this.#features / 4)) : 0;
  }

  /** Hidden units of a predictor. */
  get rank(): number {
    return 2 * this.#features + 1;
  }

  /** Of what blocks add to the stream. */
  readonly outputScale = OUTPUT_SCALE;

  /** Gates have deviation 1 over features of size 1. */
  get gateScale(): number {
    return Math.sqrt(this.#shape.hiddenSize / this.#features);
  }

  /** Level 1, topic, random features, nothing else. */
  readonly embeddings: RowWriter = (token, values) => {
    values.fill(ONE, 0, this.#level);
    for (let k = 0; k < this.topics; k++) values[this.#level + k] = topicSign(token % this.topics, k) * SIGN + ONE;
    values.fill(0, this.#level + this.#features);
  };

  /** Attention and router see own features alone. */
  readonly inputs: RowWriter = (_, values) => {
    values.fill(0, 0, this.#level + this.topics);
  };

  /** Blocks add to own features alone. */
  readonly outputs: RowWriter = (row, values) => {
    if (row < this.#level + this.topics || row >= this.#level + this.#features) values.fill(0);
  };

  readonly head: RowWriter = (token, values) => {
    values.fill(0, 0, this.#level);
    const sign = this.topics === 0 ? 0 : toBf16(this.#topicWeight());
    for (let k = 0; k < this.topics; k++) {
      values[this.#level + k] = sign ^ (topicSign(token % this.topics, k) * SIGN);
    }
  };

  gates(bank: Bank): RowWriter {
    return (row, values) => {
      values.fill(toBf16(-this.#thresholds(bank).gate[row] / this.#level), 0, this.#level);
      this.#writeFeatures(bank.layer, bank.gate, row, 1, values.subarray(this.#level, this.#level + this.#features));
    };
  }

  /** Their deviation over the features is that of all other weights. */
  ups(bank: Bank): RowWriter {
    const scale = 1 / this.gateScale;
    return (row, values) => {
      values.fill(toBf16((-scale * this.#thresholds(bank).up[row]) / this.#level), 0, this.#level);
      this.#writeFeatures(bank.layer, bank.up, row, scale, values.subarray(this.#level, this.#level + this.#features));
    };
  }

  readonly predictorInputs: RowWriter = (row, values) => {
    values.fill(0);
    if (row < this.#features) values[this.#level + row] = ONE;
    else if (row < 2 * this.#features) values[this.#level + row - this.#features] = MINUS_ONE;
    else values.fill(toBf16(1 / this.#level), 0, this.#level);
  };

  predictorScores(bank: Bank): RowWriter {
    return (row, values) => {
      const weights = values.subarray(0, this.#features);
      this.#writeFeatures(bank.layer, bank.gate, row, 1, weights);
      for (let k = 0; k < this.#features; k++) values[this.#features + k] = weights[k] ^ SIGN;
      values[2 * this.#features] = toBf16(-this.#thresholds(bank).gate[row]);
    };
  }

  /**
   * The share of a topic's tokens (of those routed to the expert) that a neuron fires for, of each topic; one share where there
   * are no topics.
   */
  ratesByTopic(bank: Bank, row: number): Float64Array {
    const { gate, up } = this.#thresholds(bank);
    const shares = this.#shareByTopic(bank.layer, bank.gate, row, gate[row]);
    const others = this.#shareByTopic(bank.layer, bank.up, row, up[row]);
    return shares.map((share, topic) => share * others[topic]);
  }

  /**
   * The score from which a neuron on flash is fetched, so that the fetched ones are `fetchedPerFired` times those that fire.
   * `orders`: the neurons of each expert of the layer, the hottest first; of these `kept` (a share) are in memory.
   */
  flashThreshold(layer: number, orders: readonly Uint32Array[], kept: number, fetchedPerFired: number): number {
    const size = this.#size(layer);
    let wanted = 0;
    const needed: number[] = [];
    for (const [expert, order] of orders.entries()) {
      const { gate, up } = this.#thresholds({ layer, expert });
      for (const neuron of order.subarray(Math.min(order.length - 1, Math.ceil(kept * order.length)))) {
        const threshold = gate[neuron] / size;
        needed.push(threshold);
        wanted += fetchedPerFired * normalIntegral(-threshold) * normalIntegral(-up[neuron] / size);
      }
    }
    const isTooLow = (score: number) =>
      needed.reduce((sum, threshold) => sum + normalIntegral(-threshold - score), 0) > wanted;
    return bisect(0, 8, isTooLow) * size;
  }

  /** Of an expert. */
  #thresholds({ layer, expert }: Pick<Bank, 'layer' | 'expert'>): Thresholds {
    const { neuronCount, expertCount = 1 } = this.#shape;
    const number = layer * expertCount + expert;
    let found = this.#banks.get(number);
    if (!found) {
      found = { gate: new Float64Array(neuronCount), up: new Float64Array(neuronCount) };
      const size = this.#size(layer);
      for (let i = 0; i < neuronCount; i++) {
        // A normal number of this neuron alone.
        const place = (number * neuronCount + i + 0.5) * 0.6180339887498949;
        const shares = sharesOf(rateOf(this.#models[layer], inverseNormal(place - Math.floor(place))));
        found.gate[i] = -size * inverseNormal(shares.gate);
        found.up[i] = -size * inverseNormal(shares.up);
      }
      this.#banks.set(number, found);
    }
    return found;
  }

  /** Weights of a gate or up over the features: random, topic and own scaled as the layer wants it. */
  #writeFeatures(layer: number, tensor: string, row: number, scale: number, values: Uint16Array): void {
    const from = this.#block.start(`${tensor}.weight`) + row * this.#shape.hiddenSize + this.#level;
    const { topic, own } = this.#deviations(layer);
    if (this.topics > 0) this.#block.fill(scale * topic, from, values.subarray(0, this.topics));
    this.#block.fill(scale * own, from + this.topics, values.subarray(this.topics));
  }

  #deviations(layer: number): { topic: number; own: number } {
    const { topicShare } = this.#models[layer];
    return {
      topic: Math.sqrt(topicShare / this.topics),
      own: Math.sqrt((1 - topicShare) / (this.#features - this.topics)),
    };
  }

  #shareByTopic(layer: number, tensor: string, row: number, threshold: number): Float64Array {
    const own = Math.sqrt(1 - this.#models[layer].topicShare) * this.#growth(layer);
    if (this.topics === 0) return Float64Array.of(normalIntegral(-threshold / own));
    const from = this.#block.start(`${tensor}.weight`) + row * this.#shape.hiddenSize + this.#level;
    const weights = new Uint16Array(this.topics);
    this.#block.fill(this.#deviations(layer).topic, from, weights);
    const sums = Float64Array.from(weights, fromBf16);
    sumByTopic(sums);
    return sums.map((sum) => normalIntegral((sum - threshold) / own));
  }

  /** Deviation of own features in a layer: blocks have added to them. */
  #growth(layer: number): number {
    return Math.sqrt(1 + (STREAM_GROWTH * layer) / this.#shape.layerCount);
  }

  /** Deviation of a gate over all features. */
  #size(layer: number): number {
    const { topicShare } = this.#models[layer];
    return Math.sqrt(topicShare + (1 - topicShare) * this.#growth(layer) ** 2);
  }

  /** Of the head: what makes `TOPIC_KEPT` of the probability that of tokens of the same topic, all others being alike. */
  #topicWeight(): number {
    const { hiddenSize, layerCount } = this.#shape;
    const own = this.#features - this.topics;
    const meanSquare = (this.#level + this.topics + own * this.#growth(layerCount) ** 2) / hiddenSize;
    const advantage = Math.log(((this.topics - 1) * TOPIC_KEPT) / (1 - TOPIC_KEPT));
    return (advantage / this.topics) * Math.sqrt(meanSquare);
  }
}

/** 1 where number `k` of a topic is -1, else 0: rows of a Hadamard matrix. */
function topicSign(topic: number, k: number): number {
  let bits = topic & k;
  let odd = 0;
  for (; bits !== 0; bits &= bits - 1) odd ^= 1;
  return odd;
}

/** Turns weights over the topic's numbers into their sums for each topic: a Walsh-Hadamard transform in place. */
function sumByTopic(values: Float64Array): void {
  for (let half = 1; half < values.length; half *= 2) {
    for (let i = 0; i < values.length; i++) {
      if (i & half) continue;
      const [a, b] = [values[i], values[i + half]];
      values[i] = a + b;
      values[i + half] = a - b;
    }
  }
}
