import type { Engine } from '../../src/engine/engine.js';
import { expertCount, type Hyperparameters } from '../../src/format/hyperparameters.js';
import type { PredictorInput } from '../../src/format/manifest.js';
import type { SampleFile } from './samples.js';

/** Memory for what one step tells. */
const RECORD_BYTES_MAX = 16 * 1024 * 1024;

const FILE_BYTES_MOST = 16 * 1024 * 1024 * 1024;
/** Lengths vary little: these many tokens tell. */
const RESIDUAL_TOKENS = 2048;

export interface CollectRequest {
  engine: Engine;
  hyperparameters: Hyperparameters;
  /** What each window is made of, BOS included. */
  windows: readonly (readonly number[])[];
  /** What a predictor gets to see. */
  input: PredictorInput;
  /** For each bank: the norm of each neuron's down column. */
  norms: readonly Float32Array[];
  file: Pick<SampleFile, 'size' | 'append'>;
  /** Hears of every step and of the tokens so far; may throw to end early. */
  onStep: (tokens: number) => void;
}

/**
 * Runs windows through an engine, exactly, and keeps what each bank got and what its neurons contributed. Ends early when the
 * file has 16 GiB: a large model tells most about itself in some ten thousand tokens. Resolves with the tokens that were run.
 */
export async function collectSamples(request: CollectRequest): Promise<number> {
  const { engine, hyperparameters: h, windows, input, file, onStep } = request;
  const recorder = new Recorder(h, request.norms, engine.batchSize);
  const record = { ...recorder.record, routed: new Uint8Array(recorder.most * engine.routedBytesPerToken), input };
  const logits = new Float32Array(engine.vocabSize);
  let done = 0;
  for (const window of windows) {
    if (file.size >= FILE_BYTES_MOST) break;
    for (let position = 0; position < window.length; position += recorder.most) {
      const tokens = Int32Array.from(window.slice(position, position + recorder.most));
      await engine.step(tokens, position, logits, { exact: true, ...record });
      for (let bank = 0; bank < request.norms.length; bank++) {
        const { inputs, counts, neurons, contributions } = recorder.take(bank, tokens.length, record.routed);
        if (counts.length > 0) await file.append(bank, inputs, counts, neurons, contributions);
      }
      done += tokens.length;
      onStep(done);
    }
  }
  return done;
}

/** For each layer: the length of the residual stream after attention, root mean square over the first tokens of a text. */
export async function measureResidual(
  engine: Engine,
  { layer_count, hidden_size }: Hyperparameters,
  windows: readonly (readonly number[])[],
): Promise<number[]> {
  const most = Math.max(1, Math.min(engine.batchSize, Math.floor(RECORD_BYTES_MAX / (4 * layer_count * hidden_size))));
  const inputs = new Float32Array(most * layer_count * hidden_size);
  const logits = new Float32Array(engine.vocabSize);
  const squares = new Float64Array(layer_count);
  let count = 0;
  for (const window of windows) {
    if (count >= RESIDUAL_TOKENS) break;
    for (let position = 0; position < window.length; position += most) {
      const tokens = Int32Array.from(window.slice(position, position + most));
      await engine.step(tokens, position, logits, { exact: true, inputs, input: 'residual' });
      for (let i = 0; i < tokens.length * layer_count * hidden_size; i++) {
        squares[Math.floor(i / hidden_size) % layer_count] += inputs[i] * inputs[i];
      }
      count += tokens.length;
    }
  }
  return Array.from(squares, (sum) => Math.sqrt(sum / Math.max(1, count)));
}

/** Room for what one step tells, and for what one bank makes of it. */
class Recorder {
  /** Tokens of a step. */
  readonly most: number;
  readonly record: { inputs: Float32Array; activations: Float32Array };
  readonly #h: Hyperparameters;
  readonly #norms: readonly Float32Array[];
  readonly #used: number;
  readonly #inputs: Float32Array;
  readonly #counts: Uint32Array;
  readonly #neurons: Uint32Array;
  readonly #contributions: Float32Array;

  constructor(h: Hyperparameters, norms: readonly Float32Array[], batchSize: number) {
    this.#h = h;
    this.#norms = norms;
    this.#used = h.experts?.used_per_token ?? 1;
    const perToken = h.layer_count * this.#used * h.neuron_count;
    this.most = Math.max(1, Math.min(batchSize, Math.floor(RECORD_BYTES_MAX / (4 * perToken))));
    this.record = {
      inputs: new Float32Array(this.most * h.layer_count * h.hidden_size),
      activations: new Float32Array(this.most * perToken),
    };
    this.#inputs = new Float32Array(this.most * h.hidden_size);
    this.#counts = new Uint32Array(this.most);
    this.#neurons = new Uint32Array(this.most * h.neuron_count);
    this.#contributions = new Float32Array(this.most * h.neuron_count);
  }

  /** What a bank did for the tokens of the last step; overwritten by the next call. */
  take(bank: number, tokens: number, routed: Uint8Array) {
    const { layer_count, hidden_size, neuron_count } = this.#h;
    const experts = expertCount(this.#h);
    const layer = Math.floor(bank / experts);
    const expert = bank % experts;
    const routedBytes = Math.ceil(experts / 8);
    const norms = this.#norms[bank];
    let taken = 0;
    let entries = 0;
    for (let t = 0; t < tokens; t++) {
      const bits = (t * layer_count + layer) * routedBytes;
      const uses = (e: number) => (routed[bits + (e >> 3)] >> (e & 7)) & 1;
      if (!uses(expert)) continue;
      let slot = 0;
      for (let e = 0; e < expert; e++) slot += uses(e);
      const before = entries;
      const first = ((t * layer_count + layer) * this.#used + slot) * neuron_count;
      for (let i = 0; i < neuron_count; i++) {
        const activation = this.record.activations[first + i];
        if (activation === 0) continue;
        this.#neurons[entries] = i;
        this.#contributions[entries++] = Math.abs(activation) * norms[i];
      }
      const from = (t * layer_count + layer) * hidden_size;
      this.#inputs.set(this.record.inputs.subarray(from, from + hidden_size), taken * hidden_size);
      this.#counts[taken++] = entries - before;
    }
    return {
      inputs: this.#inputs.subarray(0, taken * hidden_size),
      counts: this.#counts.subarray(0, taken),
      neurons: this.#neurons.subarray(0, entries),
      contributions: this.#contributions.subarray(0, entries),
    };
  }
}
