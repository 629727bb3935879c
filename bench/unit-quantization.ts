import { mkdtemp, rm } from 'node:fs/promises';
import os from 'node:os';
import { basename, join, resolve } from 'node:path';
import { Command, Option } from 'commander';
import { cutText } from '../converter/activation/profiler.js';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import type { SourceExpert, SourceModel, SourceTensor } from '../converter/checkpoint/model.js';
import type { TensorSource } from '../converter/checkpoint/tensor-source.js';
import { convertFrom } from '../converter/convert.js';
import { collectSamples } from '../converter/predictor/collect.js';
import { rowPlacement } from '../converter/steps/pieces.js';
import { parseBytes } from '../src/base/bytes.js';
import { parseInteger } from '../src/cli/options.js';
import { loadAddon } from '../src/engine/addon.js';
import { Engine } from '../src/engine/engine.js';
import { cutWindows, evaluateSequence, negativeLogLikelihood } from '../src/engine/evaluate.js';

import { expertCount, type Hyperparameters } from '../src/format/hyperparameters.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { readTextFile } from '../src/text/text-file.js';
import { TextTokenizer } from '../src/text/tokenizer.js';
import { chooseOutliers, type FloatMatrix, quantizeChannels } from './channel-quantizer.js';
import { log, runProgram, saveOption, saveResult } from './program.js';
import { conditions, describeConditions, markdownTable } from './report.js';

interface Flags {
  checkpoint: string[];
  file: string;
  calibration: string;
  ctxSize: number;
  tokens: number;
  save?: string;
}

/** How the neurons that a unit would have are stored; the others are int4 in groups, as the CPU has them. */
interface Scheme {
  name: string;
  kind: 'float' | 'groups' | 'tiles' | 'channels';
  /** Of channels: inputs kept as int8. */
  outliers: number;
  /** Of the neurons of each bank, the hottest. */
  hot: number;
}

const OUTLIERS = [0, 0.01, 0.03];
const HOT = [0.5, 1];
const SCHEMES: readonly Scheme[] = [
  { name: 'float', kind: 'float', outliers: 0, hot: 0 },
  { name: 'int4 in groups of 32', kind: 'groups', outliers: 0, hot: 0 },
  { name: 'the same, Down in tiles (stored)', kind: 'tiles', outliers: 0, hot: 1 },
  ...OUTLIERS.flatMap((outliers) =>
    HOT.map((hot): Scheme => {
      const kept = outliers > 0 ? `, ${100 * outliers} % of the inputs int8` : '';
      return { name: `int4 per channel${kept}: ${100 * hot} % of the neurons`, kind: 'channels', outliers, hot };
    }),
  ),
];

/** Memory for the logits of the float model that others are compared with: those of the first tokens. */
const REFERENCE_BYTES_MAX = 128 * 1024 * 1024;

/** Of one checkpoint in one of the ways. */
interface Result {
  checkpoint: string;
  scheme: string;
  perplexity: number;
  /**
   * How far the distribution of the next token is from that of the float model: the mean Kullback-Leibler divergence. Errors of weights
   * move perplexity up or down, this only up: it tells ways apart that perplexity does not.
   */
  divergence: number;
}

/** `npm run bench:quantization`: perplexity of FFNs quantized in the ways that units take. */
function buildProgram(): Command {
  const number = (flags: string, help: string, value: number) =>
    new Option(flags, help).argParser(parseInteger(0, 2 ** 31)).default(value);
  return new Command('bench:quantization')
    .description(
      'perplexity of checkpoints whose FFNs are quantized in the ways that dense units take, everything else f16',
    )
    .requiredOption('--checkpoint <dir...>', 'HuggingFace checkpoints, as convert takes them')
    .requiredOption('-f, --file <TEXT>', 'text that perplexity is measured on')
    .requiredOption('--calibration <TEXT>', 'text that tells which neurons are hot and which inputs are large')
    .addOption(number('-c, --ctx-size <n>', 'tokens in a window', 256))
    .addOption(number('--tokens <n>', 'of the text, so many tokens; 0 is all', 0))
    .addOption(saveOption())
    .action(bench);
}

async function bench(flags: Flags): Promise<void> {
  const loadBefore = os.loadavg()[0];
  const results: Result[] = [];
  for (const checkpoint of flags.checkpoint) {
    const scratch = await mkdtemp(join(os.tmpdir(), 'powerinfer2-quantization-'));
    try {
      const moments = await calibrate(checkpoint, join(scratch, 'float.pi2'), flags);
      const reference: Float32Array[] = [];
      for (const scheme of SCHEMES) {
        const found = await measure(checkpoint, join(scratch, 'quantized.pi2'), scheme, moments, reference, flags);
        const { perplexity, divergence } = found;
        log(
          `${basename(checkpoint)}, ${scheme.name}: ${perplexity.toFixed(4)}, ${(1000 * divergence).toFixed(2)} mnat`,
        );
        results.push({ checkpoint: basename(checkpoint), scheme: scheme.name, ...found });
      }
    } finally {
      await rm(scratch, { recursive: true, force: true });
    }
  }
  const names = [...new Set(results.map(({ checkpoint }) => checkpoint))];
  const rows = SCHEMES.map(({ name }) => [name, ...names.map((checkpoint) => cell(results, checkpoint, name))]);
  const facts = conditions(['npm run bench:quantization --', ...process.argv.slice(2)].join(' '), loadBefore);
  process.stdout.write(`${describeConditions(facts)}\n\n${markdownTable(['FFN', ...names], rows)}\n`);
  if (flags.save !== undefined) {
    await saveResult(flags.save, [facts, ...results].map((row) => `${JSON.stringify(row)}\n`).join(''));
  }
}

function cell(results: readonly Result[], checkpoint: string, name: string): string {
  const of = (scheme: string) =>
    results.find((found) => found.checkpoint === checkpoint && found.scheme === scheme) as Result;
  const [float, { perplexity, divergence }] = [of(SCHEMES[0].name), of(name)];
  if (name === SCHEMES[0].name) return perplexity.toFixed(4);
  const more = 100 * (perplexity / float.perplexity - 1);
  return `${perplexity.toFixed(4)} (+${more.toFixed(2)} %), ${(1000 * divergence).toFixed(2)}`;
}

/** What one bank's inputs and neurons were like on calibration text. */
class Moments {
  readonly inputs: Float64Array;
  readonly neurons: Float64Array;
  readonly fired: Float64Array;
  #tokens = 0;

  constructor(h: Hyperparameters) {
    this.inputs = new Float64Array(h.hidden_size);
    this.neurons = new Float64Array(h.neuron_count);
    this.fired = new Float64Array(h.neuron_count);
  }

  add(inputs: Float32Array, tokens: number, neurons: Uint32Array, activations: Float32Array): void {
    this.#tokens += tokens;
    for (let i = 0; i < inputs.length; i++) this.inputs[i % this.inputs.length] += inputs[i] ** 2;
    for (let i = 0; i < neurons.length; i++) {
      this.neurons[neurons[i]] += activations[i] ** 2;
      this.fired[neurons[i]]++;
    }
  }

  /** Neurons, those that fire most first; ties by number. */
  get order(): Uint32Array {
    return Uint32Array.from(this.fired, (_, i) => i).sort((a, b) => this.fired[b] - this.fired[a] || a - b);
  }

  /** Mean squares of inputs, and of what neurons contribute. */
  get meanSquares(): { inputs: Float64Array; neurons: Float64Array } {
    const mean = (sums: Float64Array) => sums.map((sum) => sum / Math.max(1, this.#tokens));
    return { inputs: mean(this.inputs), neurons: mean(this.neurons) };
  }
}

/** Converts the checkpoint as it is and runs calibration text through it. */
async function calibrate(directory: string, output: string, { calibration, ctxSize }: Flags): Promise<Moments[]> {
  await convertF16(() => Checkpoint.open(directory), output);
  const model = await openModelDirectory(output);
  const { hyperparameters: h } = model.manifest;
  const banks = h.layer_count * expertCount(h);
  const moments = Array.from({ length: banks }, () => new Moments(h));
  const { windows } = await cutText(model, await readTextFile(calibration), ctxSize, 0);
  const engine = await Engine.open(model, { context: ctxSize, threads: os.availableParallelism() });
  try {
    const ones = new Float32Array(h.neuron_count).fill(1);
    const file = {
      size: 0,
      append: async (
        bank: number,
        inputs: Float32Array,
        counts: Uint32Array,
        neurons: Uint32Array,
        values: Float32Array,
      ) => moments[bank].add(inputs, counts.length, neurons, values),
    };
    const norms = moments.map(() => ones);
    await collectSamples({ engine, hyperparameters: h, windows, input: 'ffn_norm', norms, file, onStep: () => {} });
  } finally {
    await engine.close();
  }
  return moments;
}

/** Runs the text through the checkpoint with its FFNs in one of the ways. The first, float, fills `reference` with logits. */
async function measure(
  directory: string,
  output: string,
  scheme: Scheme,
  moments: readonly Moments[],
  reference: Float32Array[],
  { file, ctxSize, tokens }: Flags,
): Promise<Pick<Result, 'perplexity' | 'divergence'>> {
  await convertF16(async () => new QuantizedSource(await Checkpoint.open(directory), scheme, moments), output);
  const model = await openModelDirectory(output);
  const tokenizer = await TextTokenizer.open(model.tokenizerPaths);
  const text = tokenizer.encodePlain(await readTextFile(file));
  const engine = await Engine.open(model, { context: ctxSize, threads: os.availableParallelism() });
  try {
    const windows = cutWindows(tokens > 0 ? text.slice(0, tokens) : text, ctxSize, tokenizer.bosTokenId);
    const most = scheme.kind === 'float' ? REFERENCE_BYTES_MAX / (4 * engine.vocabSize) : reference.length;
    let [nll, divergence, count] = [0, 0, 0];
    for (const { inputs, targets } of windows) {
      await evaluateSequence(engine, inputs, (rows, first) => {
        for (let i = 0; i * engine.vocabSize < rows.length; i++) {
          const row = rows.subarray(i * engine.vocabSize, (i + 1) * engine.vocabSize);
          nll += negativeLogLikelihood(row, targets[first + i]);
          if (count < most && scheme.kind === 'float') reference.push(row.slice());
          if (count < most) divergence += divergenceOf(reference[count], row);
          count++;
        }
      });
    }
    return { perplexity: Math.exp(nll / count), divergence: divergence / Math.min(count, most) };
  } finally {
    await engine.close();
  }
}

/** Of the distribution of `found` from that of `wanted`, both logits; in nats. */
function divergenceOf(wanted: Float32Array, found: Float32Array): number {
  const [p, q] = [logSum(wanted), logSum(found)];
  let sum = 0;
  for (let i = 0; i < wanted.length; i++) sum += Math.exp(wanted[i] - p) * (wanted[i] - p - found[i] + q);
  return sum;
}

function logSum(logits: Float32Array): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (const logit of logits) largest = Math.max(largest, logit);
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - largest);
  return largest + Math.log(sum);
}

async function convertF16(open: () => Promise<TensorSource>, output: string): Promise<void> {
  const options = {
    checkpoint: '',
    output,
    quantization: 'f16',
    maxMemoryBytes: parseBytes('64G'),
    force: true,
  } as const;
  await convertFrom(open, { ...options, predictor: 'none' }, () => {}, new AbortController().signal);
}

/** A checkpoint whose FFN matrices are quantized and decoded again: their numbers are floats, of which f16 keeps 11 bits. */
class QuantizedSource implements TensorSource {
  readonly model: SourceModel;
  readonly name: string;
  readonly directory: string;
  readonly textFiles: readonly string[];
  /** What to do with a tensor of that name. */
  readonly #experts = new Map<string, { expert: SourceExpert; bank: number }>();
  readonly #done = new Map<string, Uint8Array>();

  constructor(
    readonly source: Checkpoint,
    private readonly scheme: Scheme,
    private readonly moments: readonly Moments[],
  ) {
    this.name = source.name;
    this.directory = resolve(source.directory);
    this.textFiles = source.textFiles;
    const experts = expertCount(source.model.hyperparameters);
    const layers = source.model.layers.map((layer, l) => ({
      ...layer,
      experts: layer.experts.map((expert, e) => {
        for (const tensor of [expert.gate, expert.up, expert.down]) {
          if (tensor) this.#experts.set(tensor.name, { expert, bank: l * experts + e });
        }
        const float = (tensor: SourceTensor): SourceTensor => ({ ...tensor, type: 'F32' });
        return { ...(expert.gate ? { gate: float(expert.gate) } : {}), up: float(expert.up), down: float(expert.down) };
      }),
    }));
    this.model = { ...source.model, layers };
  }

  bytes(tensor: SourceTensor): number {
    return this.#experts.has(tensor.name) ? 4 * tensor.shape.reduce((a, b) => a * b, 1) : this.source.bytes(tensor);
  }

  async read(tensor: SourceTensor, byteOffset: number, target: Uint8Array): Promise<void> {
    if (!this.#experts.has(tensor.name)) return this.source.read(tensor, byteOffset, target);
    if (!this.#done.has(tensor.name)) this.#done.set(tensor.name, await this.#quantized(tensor.name));
    target.set((this.#done.get(tensor.name) as Uint8Array).subarray(byteOffset, byteOffset + target.length));
  }

  place() {
    return null;
  }

  predictors() {
    return null;
  }

  states() {
    return this.source.states();
  }

  hash(...args: Parameters<TensorSource['hash']>) {
    return this.source.hash(...args);
  }

  close() {
    return this.source.close();
  }

  async #quantized(name: string): Promise<Uint8Array> {
    const { expert, bank } = this.#experts.get(name) as { expert: SourceExpert; bank: number };
    const tensor = [expert.gate, expert.up, expert.down].find((found) => found?.name === name) as SourceTensor;
    const values = await this.#floats(tensor);
    const isDown = name === expert.down.name;
    if (this.scheme.kind !== 'float') await quantize(values, isDown, this.scheme, this.moments[bank]);
    return new Uint8Array(values.buffer);
  }

  /** A tensor's numbers, through the encoder, which knows every type. */
  async #floats(tensor: SourceTensor): Promise<Float32Array> {
    const [rows, columns] = tensor.shape;
    const source = new Uint8Array(this.source.bytes(tensor));
    await this.source.read(tensor, 0, source);
    const target = new Uint8Array(4 * rows * columns);
    const placement = rowPlacement('f32', columns);
    const request = { source, sourceType: tensor.type, rows, columns, encoding: 'f32', target, placement } as const;
    await loadAddon().encodeRows({ ...request, firstVector: 0, threads: os.availableParallelism() });
    return new Float32Array(target.buffer);
  }
}

/** Quantizes gate or up [neurons x hidden], or down [hidden x neurons], in place. */
async function quantize(values: Float32Array, isDown: boolean, scheme: Scheme, moments: Moments): Promise<void> {
  const neurons = moments.neurons.length;
  const hidden = values.length / neurons;
  const { order, meanSquares } = moments;
  const hot = order.subarray(0, Math.round(scheme.hot * neurons));
  // Rows are neurons in heat order, of down as well: a bundle has its column.
  const bundles = new Float32Array(values.length);
  const at = (i: number, k: number) => (isDown ? k * neurons + order[i] : order[i] * hidden + k);
  for (let i = 0; i < neurons; i++) for (let k = 0; k < hidden; k++) bundles[i * hidden + k] = values[at(i, k)];
  const tiled = isDown && scheme.kind === 'tiles';
  const stored = await encodeAndDecode(bundles, neurons, hidden, tiled);
  if (scheme.kind === 'channels') {
    const matrix: FloatMatrix = isDown
      ? { rows: hidden, columns: hot.length, values: new Float32Array(hidden * hot.length) }
      : { rows: hot.length, columns: hidden, values: bundles.slice(0, hot.length * hidden) };
    if (isDown) {
      for (let k = 0; k < hidden; k++) {
        for (let i = 0; i < hot.length; i++) matrix.values[k * hot.length + i] = bundles[i * hidden + k];
      }
    }
    const squares = isDown ? Float64Array.from(hot, (neuron) => meanSquares.neurons[neuron]) : meanSquares.inputs;
    quantizeChannels(matrix, scheme.outliers > 0 ? chooseOutliers(matrix, squares, scheme.outliers) : new Set());
    for (let i = 0; i < hot.length; i++) {
      for (let k = 0; k < hidden; k++) {
        stored[i * hidden + k] = matrix.values[isDown ? k * hot.length + i : i * hidden + k];
      }
    }
  }
  for (let i = 0; i < neurons; i++) for (let k = 0; k < hidden; k++) values[at(i, k)] = stored[i * hidden + k];
}

/** Vectors of hidden numbers as convert stores them in q4, decoded: each with its own scales, or 32 with the same. */
async function encodeAndDecode(
  bundles: Float32Array,
  neurons: number,
  hidden: number,
  tiled: boolean,
): Promise<Float32Array> {
  const addon = loadAddon();
  const placement = rowPlacement('q4', hidden);
  const target = new Uint8Array(neurons * placement.unitBytes);
  const common = { sourceType: 'F32', encoding: 'q4', target, placement, firstVector: 0, threads: 1 } as const;
  if (tiled) {
    const columns = new Float32Array(bundles.length);
    for (let i = 0; i < neurons; i++)
      for (let k = 0; k < hidden; k++) columns[k * neurons + i] = bundles[i * hidden + k];
    const shape = { rows: hidden, columns: neurons, firstElement: 0, tiles: true };
    await addon.encodeColumns({ ...common, ...shape, source: new Uint8Array(columns.buffer) });
  } else {
    await addon.encodeRows({ ...common, rows: neurons, columns: hidden, source: new Uint8Array(bundles.buffer) });
  }
  return addon.decodeRows({ source: target, rows: neurons, columns: hidden, encoding: 'q4', placement });
}

await runProgram(buildProgram());
