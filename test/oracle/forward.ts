import type { Checkpoint } from '../../converter/checkpoint/checkpoint.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import { type ExpertWeights, loadWeights, type Matrix, type Transform, type Weights } from './load.js';

/*
 * The forward pass as the equations have it, one token at a time, nothing skipped, nothing shared with the engine. Sums are
 * float64, weights and stored activations float32. Every fast path is compared with this one.
 *
 * Sizes in comments: hidden, heads, kvHeads, headDim, neurons, experts, vocab.
 */

export class Oracle {
  readonly hyperparameters: Hyperparameters;
  readonly #weights: Weights;
  readonly #frequencies: Float64Array;

  constructor(hyperparameters: Hyperparameters, weights: Weights) {
    this.hyperparameters = hyperparameters;
    this.#weights = weights;
    this.#frequencies = rotaryFrequencies(hyperparameters);
  }

  /** Loads an open checkpoint; `transform` may change each matrix on its way in. */
  static async load(checkpoint: Checkpoint, transform?: Transform): Promise<Oracle> {
    return new Oracle(checkpoint.model.hyperparameters, await loadWeights(checkpoint, transform));
  }

  /** A new, empty sequence; with a chooser only chosen neurons are computed. */
  sequence(chooser?: Chooser): Sequence {
    return new Sequence(this.hyperparameters, this.#weights, this.#frequencies, chooser);
  }

  /** The logits [vocab] after every token of a new sequence. */
  logits(tokens: readonly number[]): Float32Array[] {
    const sequence = this.sequence();
    return tokens.map((token) => sequence.step(token));
  }

  /** The `count` tokens that follow when the likeliest is always taken. */
  greedy(tokens: readonly number[], count: number): number[] {
    const sequence = this.sequence();
    let logits = tokens.map((token) => sequence.step(token)).at(-1) as Float32Array;
    const generated: number[] = [];
    while (generated.length < count) {
      const token = indexOfMaximum(logits);
      generated.push(token);
      if (generated.length < count) logits = sequence.step(token);
    }
    return generated;
  }
}

/** What a layer did with the last token, for tests of sparsity and routing. */
export interface LayerTrace {
  /** Experts that were used, likeliest first, and their weights; expert 0 with weight 1 in a dense FFN. */
  experts: number[];
  weights: number[];
  /** For each expert used, how many of its neurons had an activation other than zero. */
  fired: number[];
  /** For each expert used, which neurons those are. */
  neurons: number[][];
}

/**
 * Which neurons of an expert are computed: those for which it returns true. `x` is what the FFN gets, `residual` the stream
 * that is normed for it.
 */
export type Chooser = (
  layer: number,
  expert: number,
  x: Float32Array,
  residual: Float32Array,
) => (neuron: number) => boolean;

/** Tokens seen so far: keys and values of every layer, one row a position. */
export class Sequence {
  /** What each layer did with the last token. */
  trace: LayerTrace[] = [];
  readonly #h: Hyperparameters;
  readonly #weights: Weights;
  readonly #frequencies: Float64Array;
  readonly #keys: Float32Array[][];
  readonly #values: Float32Array[][];
  readonly #chooser?: Chooser;

  constructor(h: Hyperparameters, weights: Weights, frequencies: Float64Array, chooser?: Chooser) {
    this.#chooser = chooser;
    this.#h = h;
    this.#weights = weights;
    this.#frequencies = frequencies;
    this.#keys = weights.layers.map(() => []);
    this.#values = weights.layers.map(() => []);
  }

  /** Appends one token; returns the logits [vocab] of the next. */
  step(token: number): Float32Array {
    const h = this.#h;
    const w = this.#weights;
    const position = this.#keys[0].length;
    this.trace = [];

    // x = embedding of the token, plus that of the position if positions are learned. [hidden]
    let x: Float32Array = row(w.embedding, token).slice();
    if (w.position_embedding) x = add(x, row(w.position_embedding, position));

    for (const [index, layer] of w.layers.entries()) {
      // x += Attention(Norm(x))
      x = add(x, this.#attention(index, norm(h, x, layer.attention_norm, layer.attention_norm_bias), position));
      // x += FFN(Norm(x))
      x = add(x, this.#ffn(index, norm(h, x, layer.ffn_norm, layer.ffn_norm_bias), x));
    }
    return multiply(w.head, norm(h, x, w.output_norm, w.output_norm_bias));
  }

  /** softmax(q k / sqrt(headDim)) v over the positions that this layer's window lets the token see. [hidden] -> [hidden] */
  #attention(index: number, x: Float32Array, position: number): Float32Array {
    const h = this.#h;
    const layer = this.#weights.layers[index];
    const q = multiply(layer.q, x, layer.q_bias); // [heads * headDim]
    const k = multiply(layer.k, x, layer.k_bias); // [kvHeads * headDim]
    const v = multiply(layer.v, x, layer.v_bias); // [kvHeads * headDim]
    for (const head of eachHead(q, h.head_dim)) this.#prepareHead(head, position, layer.q_norm);
    for (const head of eachHead(k, h.head_dim)) this.#prepareHead(head, position, layer.k_norm);
    this.#keys[index].push(k);
    this.#values[index].push(v);

    const window = h.attention.windows[index];
    const first = window === 0 ? 0 : Math.max(0, position - window + 1);
    const mixed = new Float32Array(q.length);
    for (let head = 0; head < h.head_count; head++) {
      // Heads in a row share a key-value head.
      const from = Math.floor(head / (h.head_count / h.kv_head_count)) * h.head_dim;
      const query = q.subarray(head * h.head_dim, (head + 1) * h.head_dim);
      const scores = new Float64Array(position + 1 - first); // [positions seen]
      for (let p = first; p <= position; p++) {
        const key = this.#keys[index][p].subarray(from, from + h.head_dim);
        scores[p - first] = dot(query, key) / Math.sqrt(h.head_dim);
      }
      const share = softmax(scores);
      for (let i = 0; i < h.head_dim; i++) {
        let sum = 0;
        for (let p = first; p <= position; p++) sum += share[p - first] * this.#values[index][p][from + i];
        mixed[head * h.head_dim + i] = sum;
      }
    }
    return multiply(layer.o, mixed, layer.o_bias);
  }

  /** Norm (if the model has one for heads) and rotation (unless positions are learned) of one query or key, in place. */
  #prepareHead(head: Float32Array, position: number, headNorm?: Matrix): void {
    if (headNorm) head.set(rmsNorm(head, headNorm.values, this.#h.norm.epsilon));
    if (this.#h.position.kind === 'rope') rotate(head, position, this.#frequencies);
  }

  /** The FFN, or the weighted sum of the chosen experts' FFNs. [hidden] -> [hidden] */
  #ffn(index: number, x: Float32Array, residual: Float32Array): Float32Array {
    const layer = this.#weights.layers[index];
    const chosen = layer.router
      ? route(multiply(layer.router, x), this.#h.experts?.used_per_token as number)
      : { experts: [0], weights: [1] };
    const trace: LayerTrace = { ...chosen, fired: [], neurons: [] };
    let sum: Float32Array = new Float32Array(x.length);
    for (const [i, expert] of chosen.experts.entries()) {
      const isChosen = this.#chooser?.(index, expert, x, residual) ?? (() => true);
      const activations = activate(this.#h, layer.experts[expert], x, layer.up_bias) // [neurons]
        .map((activation, neuron) => (isChosen(neuron) ? activation : 0));
      const neurons = [...activations.keys()].filter((neuron) => activations[neuron] !== 0);
      trace.neurons.push(neurons);
      trace.fired.push(neurons.length);
      sum = add(sum, scale(multiply(layer.experts[expert].down, activations, layer.down_bias), chosen.weights[i]));
    }
    this.trace.push(trace);
    return sum;
  }
}

/** What each neuron contributes: its activation. [hidden] -> [neurons] */
export function activate(h: Hyperparameters, ffn: ExpertWeights, x: Float32Array, upBias?: Matrix): Float32Array {
  const up = multiply(ffn.up, x, upBias);
  if (!ffn.gate) return up.map(relu);
  const gate = multiply(ffn.gate, x);
  switch (h.ffn.activation) {
    case 'silu':
      return up.map((u, i) => silu(gate[i]) * u);
    case 'relu':
      return up.map((u, i) => relu(gate[i]) * u);
    case 'drelu':
      return up.map((u, i) => relu(gate[i]) * relu(u));
    case 'fatrelu':
      return up.map((u, i) => (gate[i] >= h.ffn.threshold ? gate[i] : 0) * u);
  }
}

const relu = (x: number): number => Math.max(0, x);
const silu = (x: number): number => x / (1 + Math.exp(-x));

/** The `used` experts of greatest router logit and their weights: softmax over the logits of those alone. */
export function route(logits: Float32Array, used: number): { experts: number[]; weights: number[] } {
  const experts = Array.from(logits.keys())
    .sort((a, b) => logits[b] - logits[a] || a - b)
    .slice(0, used);
  return { experts, weights: [...softmax(Float64Array.from(experts, (expert) => logits[expert]))] };
}

function norm(h: Hyperparameters, x: Float32Array, weight: Matrix, bias?: Matrix): Float32Array {
  if (h.norm.kind === 'rms') return rmsNorm(x, weight.values, h.norm.epsilon);
  return layerNorm(x, weight.values, (bias as Matrix).values, h.norm.epsilon);
}

/** x / sqrt(mean(x²) + epsilon) * weight */
export function rmsNorm(x: Float32Array, weight: Float32Array, epsilon: number): Float32Array {
  const factor = 1 / Math.sqrt(dot(x, x) / x.length + epsilon);
  return x.map((value, i) => value * factor * weight[i]);
}

/** (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias */
export function layerNorm(x: Float32Array, weight: Float32Array, bias: Float32Array, epsilon: number): Float32Array {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  const factor = 1 / Math.sqrt(variance + epsilon);
  return x.map((value, i) => (value - mean) * factor * weight[i] + bias[i]);
}

/** The angle per position of every pair of a head: theta^(-2i / headDim), then the model's scaling. [headDim / 2] */
export function rotaryFrequencies(h: Hyperparameters): Float64Array {
  const position = h.position;
  if (position.kind !== 'rope') return new Float64Array(0);
  const plain = Float64Array.from({ length: h.head_dim / 2 }, (_, i) => position.theta ** ((-2 * i) / h.head_dim));
  const scaling = position.scaling;
  if (!scaling) return plain;
  if (scaling.kind === 'linear') return plain.map((frequency) => frequency / scaling.factor);
  return plain.map((frequency) => {
    // How often the pair turned within the context the model was first trained on: pairs that turned often stay, pairs that
    // turned seldom are slowed down by the factor, those between are blended.
    const turns = (scaling.original_context_length * frequency) / (2 * Math.PI);
    if (turns < scaling.low_freq_factor) return frequency / scaling.factor;
    if (turns > scaling.high_freq_factor) return frequency;
    const kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
    return (1 - kept) * (frequency / scaling.factor) + kept * frequency;
  });
}

/** Turns each pair (i, i + headDim / 2) of a head by position * frequency[i], in place. */
export function rotate(head: Float32Array, position: number, frequencies: Float64Array): void {
  const half = frequencies.length;
  for (let i = 0; i < half; i++) {
    const cos = Math.cos(position * frequencies[i]);
    const sin = Math.sin(position * frequencies[i]);
    const a = head[i];
    const b = head[i + half];
    head[i] = a * cos - b * sin;
    head[i + half] = a * sin + b * cos;
  }
}

function softmax(scores: Float64Array): Float64Array {
  const greatest = scores.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const powers = scores.map((score) => Math.exp(score - greatest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** matrix [rows x columns] times x [columns], plus bias [rows]. Four sums at a time: one would wait for itself. */
function multiply({ rows, columns, values }: Matrix, x: Float32Array, bias?: Matrix): Float32Array {
  const y = new Float32Array(rows);
  const whole = columns - (columns % 4);
  for (let r = 0; r < rows; r++) {
    const start = r * columns;
    let [a, b, c, d] = [bias ? bias.values[r] : 0, 0, 0, 0];
    for (let i = 0; i < whole; i += 4) {
      a += values[start + i] * x[i];
      b += values[start + i + 1] * x[i + 1];
      c += values[start + i + 2] * x[i + 2];
      d += values[start + i + 3] * x[i + 3];
    }
    for (let i = whole; i < columns; i++) a += values[start + i] * x[i];
    y[r] = a + b + (c + d);
  }
  return y;
}

function dot(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

const add = (a: Float32Array, b: Float32Array): Float32Array => a.map((value, i) => value + b[i]);
const scale = (a: Float32Array, factor: number): Float32Array => a.map((value) => value * factor);

function row(matrix: Matrix, index: number): Float32Array {
  if (index >= matrix.rows) throw new RangeError(`row ${index} of a table with ${matrix.rows}`);
  return matrix.values.subarray(index * matrix.columns, (index + 1) * matrix.columns);
}

function* eachHead(heads: Float32Array, headDim: number): Iterable<Float32Array> {
  for (let start = 0; start < heads.length; start += headDim) yield heads.subarray(start, start + headDim);
}

/** The first index of the greatest number. */
export function indexOfMaximum(numbers: Float32Array): number {
  let best = 0;
  for (let i = 1; i < numbers.length; i++) if (numbers[i] > numbers[best]) best = i;
  return best;
}
