// What a dense unit gets: weights in MatMulNBits' order, which must be the numbers of the bundles and no others; graphs, which
// ONNX Runtime must compute as the equations say; and the lint that keeps out what an NPU would not take.
import { createHash } from 'node:crypto';
import { cpSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import onnxProto from 'onnx-proto';
import t, { type Test } from 'tap';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { type ConvertOptions, convert } from '../converter/convert.js';
import { checkGraphs } from '../converter/graph/check.js';
import { lintGraph } from '../converter/graph/lint.js';
import { makeGraph } from '../converter/graph/onnx.js';
import { recipeFor } from '../converter/quantize/recipe.js';
import { planExtents } from '../converter/steps/extents.js';
import { bundlePlacement, cutPieces, type Load, leastLimits, loadBytes } from '../converter/steps/pieces.js';
import { loadAddon } from '../src/engine/addon.js';
import { SKIPPED } from '../src/engine/contract.js';
import { nativeLayout } from '../src/engine/engine-request.js';
import { verifyModel } from '../src/engine/verify.js';
import { scaleBytes, weightBytes } from '../src/format/encoding.js';
import { expertCount, type Hyperparameters } from '../src/format/hyperparameters.js';
import { chooseBundleLayout, expertBytes } from '../src/format/layout.js';
import { type ModelDirectory, openModelDirectory, parseManifest } from '../src/format/model-directory.js';
import { bankExtent, bankLayout, type Cluster, DOWN_TILE, graphShapes, type NpuMatrix } from '../src/format/npu.js';
import { buildProgram, jsonLines, runCli } from './support/cli.js';
import { decodedWeights } from './support/decoded-weights.js';
import { type CheckpointOptions, makeCheckpoint } from './support/make-checkpoint.js';
import { makeModel } from './support/models.js';
import { Random } from './support/numbers.js';
import { writeRandomProfile } from './support/profiles.js';
import { needsShared, SHARED_MODEL_NAMES, sharedModel } from './support/shared.js';

const scratch = t.testdir({});
const ort = await import('onnxruntime-node').catch(() => null);
const noRuntime = ort === null && 'not installed: onnxruntime-node';

/** Every kind of FFN, in shapes whose last cluster, tile and unit are cut off. */
const MODELS: Record<string, CheckpointOptions> = {
  drelu: { family: 'bamboo', hidden: 96, neurons: 177, layers: 2 },
  relu: { family: 'llama', hidden: 64, heads: 2, neurons: 1100, hiddenAct: 'relu', layers: 2 },
  silu: { family: 'qwen2', hidden: 288, heads: 9, neurons: 300, layers: 1, type: 'F32' },
  fatrelu: { family: 'sparsellama', hidden: 320, heads: 5, neurons: 129, layers: 1 },
  moe: { family: 'turbosparsemixtral', hidden: 64, heads: 2, experts: 3, neurons: 50, layers: 2 },
  opt: { family: 'opt', hidden: 160, heads: 5, neurons: 333, layers: 2, type: 'F16' },
};

/** The weights of a bank, decoded from its bundles: rows are neurons. */
interface Bank {
  gate: Float32Array | null;
  up: Float32Array;
  /** [hidden x neurons] */
  down: Float32Array;
  upBias: Float32Array | null;
}

async function readBanks(model: ModelDirectory): Promise<Bank[]> {
  const { hyperparameters: h } = model.manifest;
  const decoded = await decodedWeights(model.path);
  const experts = expertCount(h);
  return Array.from({ length: h.layer_count * experts }, (_, bank) => {
    const [layer, expert] = [Math.floor(bank / experts), bank % experts];
    const neurons = { rows: h.neuron_count, columns: h.hidden_size, values: new Float32Array() };
    const part = (name: string) => decoded(`layers.${layer}.experts.${expert}.${name}`, neurons);
    return {
      gate: h.ffn.gated ? part('gate') : null,
      up: part('up'),
      down: part('down'),
      upBias: h.ffn.bias ? decoded(`layers.${layer}.up_bias`, { ...neurons, rows: 1, columns: h.neuron_count }) : null,
    };
  });
}

/** The bytes of a bank in `npu/weights.bin`. */
function bankBytes(model: ModelDirectory, bank: number): Uint8Array {
  const experts = expertCount(model.manifest.hyperparameters);
  const { offset, bytes } = model.extent(bankExtent(Math.floor(bank / experts), bank % experts));
  return readFileSync(model.npuWeightsPath).subarray(offset, offset + bytes);
}

/** Weight (n, k) of a matrix as MatMulNBits has it. */
function packedWeight(bytes: Uint8Array, { inputs, weights, scales }: NpuMatrix, n: number, k: number): number {
  const blocks = inputs / 32;
  const byte = bytes[weights.offset + n * (inputs / 2) + (k >> 1)];
  const view = new DataView(bytes.buffer, bytes.byteOffset + scales.offset, scales.bytes);
  return ((k % 2 === 0 ? byte & 15 : byte >> 4) - 8) * view.getFloat32(4 * (n * blocks + Math.floor(k / 32)), true);
}

/** How many numbers of a cluster are not those of the bundles, or not zero where there is no neuron. */
function differences(bytes: Uint8Array, bank: Bank, cluster: Cluster, h: Hyperparameters): number {
  const { gate, up, down, upBias, firstNeuron, neurons, paddedNeurons } = cluster;
  let wrong = 0;
  for (let j = 0; j < paddedNeurons; j++) {
    const neuron = firstNeuron + j;
    const want = (matrix: Float32Array, at: number) => (j < neurons ? matrix[at] : 0);
    for (let k = 0; k < h.hidden_size; k++) {
      const row = neuron * h.hidden_size + k;
      if (packedWeight(bytes, up, j, k) !== want(bank.up, row)) wrong++;
      if (gate && packedWeight(bytes, gate, j, k) !== want(bank.gate as Float32Array, row)) wrong++;
      if (packedWeight(bytes, down, k, j) !== want(bank.down, k * h.neuron_count + neuron)) wrong++;
    }
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    if (upBias && view.getFloat32(upBias.offset + 4 * j, true) !== want(bank.upBias as Float32Array, neuron)) wrong++;
  }
  return wrong;
}

/** Sums of an FFN and how far off a unit may be that rounds inputs of products to int8. */
interface Expected {
  sums: Float64Array;
  tolerances: Float64Array;
}

/**
 * The equations, in double precision, for the first `count` neurons of a bank. A product of inputs x that are rounded to int8
 * with a scale of at least max |x| / 127 for a row is off by at most max |x| / 254 * sum |w|, for rounding is off by half a step; units may
 * round with one scale a row, and then to 255 steps between the least and the largest, so a whole 1 / 254 is allowed. Errors of
 * gate and up pass through the activation, whose slope is at most 1.1 (silu's), and then come with those of h's own rounding.
 */
function expectedSums(h: Hyperparameters, bank: Bank, count: number, x: Float32Array): Expected {
  const { hidden_size: hidden, neuron_count: total, ffn } = h;
  const largest = x.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const product = (matrix: Float32Array, neuron: number) => {
    let sum = 0;
    let size = 0;
    for (let k = 0; k < hidden; k++) {
      const w = matrix[neuron * hidden + k];
      sum += w * x[k];
      size += Math.abs(w);
    }
    return { value: sum, error: (size * largest) / 254 };
  };
  const values = new Float64Array(count);
  const errors = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const up = product(bank.up, i);
    up.value += bank.upBias?.[i] ?? 0;
    if (!bank.gate || ffn.activation === 'drelu') up.value = Math.max(up.value, 0);
    if (!bank.gate) {
      [values[i], errors[i]] = [up.value, up.error];
      continue;
    }
    const gate = product(bank.gate, i);
    const fired = activate(h, gate.value);
    // A gate that may be on either side of the threshold: all or nothing.
    const jumps = ffn.activation === 'fatrelu' && Math.abs(gate.value - ffn.threshold) <= gate.error;
    const error = jumps ? Math.abs(gate.value) + gate.error : 1.1 * gate.error;
    values[i] = fired * up.value;
    errors[i] = error * Math.abs(up.value) + Math.abs(fired) * up.error + error * up.error;
  }
  const most = values.reduce((size, value, i) => Math.max(size, Math.abs(value) + errors[i]), 0);
  const sums = new Float64Array(hidden);
  const tolerances = new Float64Array(hidden);
  for (let k = 0; k < hidden; k++) {
    for (let i = 0; i < count; i++) {
      const weight = bank.down[k * total + i];
      sums[k] += weight * values[i];
      tolerances[k] += Math.abs(weight) * (errors[i] + most / 254);
    }
    tolerances[k] += 1e-5 * (1 + Math.abs(sums[k]));
  }
  return { sums, tolerances };
}

function activate({ ffn }: Hyperparameters, gate: number): number {
  switch (ffn.activation) {
    case 'silu':
      return gate / (1 + Math.exp(-gate));
    case 'fatrelu':
      return gate >= ffn.threshold ? gate : 0;
    default:
      return Math.max(gate, 0);
  }
}

/** Models in an order of heat, and those in the order of the checkpoint that they are made of. */
const ORDERED: Record<string, string> = { 'silu by heat': 'silu', 'moe by heat': 'moe', 'opt by heat': 'opt' };

const models: Record<string, Promise<string>> = {};
function modelOf(name: string): Promise<string> {
  models[name] ??=
    name in ORDERED ? reordered(ORDERED[name]) : makeModel(join(scratch, name), MODELS[name], 'q4', true);
  return models[name];
}

/** The model once more, its neurons in a random order. */
async function reordered(name: string): Promise<string> {
  const plain = await modelOf(name);
  const profile = await writeRandomProfile(plain, join(scratch, `${name}.profile`), 3);
  return convertAgain(plain, { profile });
}

let converted = 0;

/** Converts the checkpoint of a model that `makeModel` made, again. Resolves with the path of the new model. */
async function convertAgain(path: string, options: Partial<ConvertOptions> = {}): Promise<string> {
  const output = join(scratch, `again-${converted++}.pi2`);
  const request = {
    checkpoint: path.replace(/\.pi2$/, ''),
    output,
    quantization: 'q4',
    maxMemoryBytes: 2 ** 31,
  } as const;
  const signal = new AbortController().signal;
  return (await convert({ ...request, force: true, npu: true, ...options }, () => {}, signal)).output;
}

t.test('the weights of a unit are the numbers of the bundles, in any order', async (t) => {
  for (const name of [...Object.keys(MODELS), ...Object.keys(ORDERED)]) {
    const model = await openModelDirectory(await modelOf(name));
    const { hyperparameters: h } = model.manifest;
    const banks = await readBanks(model);
    const { clusters } = bankLayout(h);
    const wrong = banks.map((bank, b) => clusters.map((c) => differences(bankBytes(model, b), bank, c, h)));
    t.strictSame(
      wrong,
      banks.map(() => clusters.map(() => 0)),
      name,
    );
  }
});

/** Runs every graph of a model on every bank, or on those given, and compares with the equations. */
async function runGraphs(t: Test, directory: string, only?: number[]): Promise<void> {
  if (!ort) return;
  const model = await openModelDirectory(directory);
  const { hyperparameters: h, npu } = model.manifest;
  const { clusters } = bankLayout(h);
  const random = new Random(7);
  const banks = await readBanks(model);
  for (const shape of graphShapes(h.neuron_count)) {
    for (const [b, bank] of banks.entries()) {
      if (only && !only.includes(b)) continue;
      const session = await ort.InferenceSession.create(model.graphPath(shape), {
        externalData: [{ path: 'weights.bin', data: bankBytes(model, b) }],
        ...{ intraOpNumThreads: 1, interOpNumThreads: 1 },
      });
      const { tokens } = shape;
      const x = Float32Array.from({ length: tokens * h.hidden_size }, () => random.normal());
      const { y } = await session.run({ x: new ort.Tensor('float32', x, [tokens, h.hidden_size]) });
      await session.release();
      const found = y.data as Float32Array;
      const last = clusters[shape.clusters - 1];
      const count = last.firstNeuron + last.neurons;
      let wrong = 0;
      let [error, size] = [0, 0];
      // A few tokens of a long prompt tell of all.
      for (let token = 0; token < tokens; token += tokens > 4 ? 31 : 1) {
        const at = token * h.hidden_size;
        const { sums, tolerances } = expectedSums(h, bank, count, x.subarray(at, at + h.hidden_size));
        for (let k = 0; k < h.hidden_size; k++) {
          const off = found[at + k] - sums[k];
          if (!(Math.abs(off) <= tolerances[k])) wrong++;
          error += off * off;
          size += sums[k] * sums[k];
        }
      }
      const where = `t${tokens}-c${shape.clusters}, bank ${b}`;
      if (wrong > 0) t.fail(`${where}: ${wrong} sums are off by more than int8 inputs explain`);
      // The bound is for the worst case; errors that are independent of each other come to far less.
      if (!(Math.sqrt(error / size) < 0.03)) t.fail(`${where}: error of ${Math.sqrt(error / size)}`);
    }
  }
  t.pass(`${npu?.graphs.length} graphs`);
}

t.test('ONNX Runtime computes every graph as the equations say', { skip: noRuntime }, async (t) => {
  for (const name of [...Object.keys(MODELS), ...Object.keys(ORDERED)]) {
    await t.test(name, async (t) => runGraphs(t, await modelOf(name)));
  }
});

for (const name of SHARED_MODEL_NAMES) {
  const skip = noRuntime || needsShared(name).skip;
  t.test(`and those of the trained checkpoint ${name}`, { skip }, async (t) => {
    const output = join(scratch, `${name}.pi2`);
    await convertAgain(sharedModel(name) as string, { output });
    // The first bank and the last: that all are what the bundles say is tested above, in less time.
    const { hyperparameters: h } = (await openModelDirectory(output)).manifest;
    await runGraphs(t, output, [0, h.layer_count * expertCount(h) - 1]);
  });
}

t.test('bundles are those of a model without a unit, but for Down, whose 32 neurons share their scales', async (t) => {
  for (const name of ['relu', 'silu by heat', 'opt']) {
    const path = await modelOf(name);
    const model = await openModelDirectory(path);
    const profile = model.profilePath ?? undefined;
    const source = name in ORDERED ? await modelOf(ORDERED[name]) : path;
    const plain = await openModelDirectory(await convertAgain(source, { npu: false, profile }));
    const { hyperparameters: h, layout } = model.manifest;
    t.same(layout, plain.manifest.layout, `${name}: the layout`);
    const [tiled, own] = [readFileSync(model.neuronsPath), readFileSync(plain.neuronsPath)];
    const weights = weightBytes('q4', h.hidden_size);
    const scales = scaleBytes('q4', h.hidden_size);
    const before = weights + (layout.matrices - 1) * scales;
    let [same, shared] = [true, true];
    for (let bank = 0; bank < h.layer_count * expertCount(h); bank++) {
      const begin = model.expertOffset(Math.floor(bank / expertCount(h)), bank % expertCount(h));
      const part = (file: Buffer, i: number, offset: number, bytes: number) => {
        const unit = begin + Math.floor(i / layout.neurons_per_unit) * layout.unit_bytes;
        const at = unit + (i % layout.neurons_per_unit) * layout.part1_stride + offset;
        return file.subarray(at, at + bytes);
      };
      for (let i = 0; i < h.neuron_count; i++) {
        if (!part(tiled, i, 0, before).equals(part(own, i, 0, before))) same = false;
        const first = i - (i % DOWN_TILE);
        if (!part(tiled, i, before, scales).equals(part(tiled, first, before, scales))) shared = false;
      }
    }
    t.ok(same, `${name}: gate and up`);
    t.ok(shared, `${name}: scales of Down`);
    t.notOk(tiled.equals(own), `${name}: and Down is another`);
  }
});

t.test('however memory cuts a conversion, tiles are read whole', async (t) => {
  for (const name of ['relu', 'moe', 'opt']) {
    const path = (await modelOf(name)).replace(/\.pi2$/, '');
    const checkpoint = await Checkpoint.open(path);
    await checkpoint.close();
    const { hyperparameters: h } = checkpoint.model;
    const random = new Random(5);
    const shuffled = Uint32Array.from({ length: expertCount(h) * h.neuron_count }, (_, i) => i % h.neuron_count);
    for (let e = 0; e < expertCount(h); e++) {
      const keys = Array.from({ length: h.neuron_count }, () => random.uniform());
      shuffled.subarray(e * h.neuron_count, (e + 1) * h.neuron_count).sort((a, b) => keys[a] - keys[b]);
    }
    for (const order of [null, Array.from({ length: h.layer_count }, () => shuffled)]) {
      const [extent] = planExtents(checkpoint.model, recipeFor('q4', h.tied_embeddings, true), order).neurons;
      const least = leastLimits(extent);
      const more = fc.double({ min: 1, max: 30, noNaN: true });
      fc.assert(
        fc.property(more, more, (pieceFactor, chunkFactor) => {
          const limits = {
            pieceBytes: Math.floor(least.pieceBytes * pieceFactor),
            chunkBytes: Math.floor(least.chunkBytes * chunkFactor),
          };
          const pieces = cutPieces(extent, 0, limits);
          return pieces.every((piece) =>
            piece.loads.every((load) => loadBytes(load) <= limits.chunkBytes && readsTiles(load)),
          );
        }),
        { numRuns: 30 },
      );
      t.throws(() => cutPieces(extent, extent.layout.unit_bytes, least), RangeError, 'not from within a tile on');
    }
  }
});

/** Whether a load of Down has whole tiles: from a multiple of 32 on, none of the last missing but at the end of the expert. */
function readsTiles(load: Load): boolean {
  if (load.vectors === 'rows') return !load.tiles;
  if (!load.tiles) return false;
  const neurons = load.source.shape[1];
  if (load.order) {
    const vectors = [...load.order].filter((vector) => vector !== SKIPPED).sort((a, b) => a - b);
    return load.columns === neurons && vectors.every((vector, i) => vector === i);
  }
  const isLast = load.firstColumn + load.columns === neurons;
  return (
    load.firstVector % DOWN_TILE === 0 &&
    load.firstColumn % DOWN_TILE === 0 &&
    (isLast || load.columns % DOWN_TILE === 0)
  );
}

const { onnx } = onnxProto;
type Model = onnxProto.onnx.ModelProto;

/** The shape of a small model, for graphs that nobody runs. */
const SHAPE = {
  hidden_size: 64,
  neuron_count: 200,
  ffn: { gated: true, activation: 'drelu', threshold: 0, bias: false },
} as Hyperparameters;
const BESIDE = new Map([['weights.bin', bankLayout(SHAPE).bytes]]);

/** What the lint says of a graph of two clusters, after a change to it. */
function problemsOf(change: (model: Model) => void, beside = BESIDE): string[] {
  const model = onnx.ModelProto.decode(makeGraph(SHAPE, { tokens: 2, clusters: 2 }));
  change(model);
  return lintGraph(onnx.ModelProto.encode(model).finish(), beside).problems;
}

const graphOf = (model: Model) => model.graph as onnxProto.onnx.GraphProto;
const nodeOf = (model: Model, op: string) =>
  graphOf(model).node.find(({ opType }) => opType === op) as onnxProto.onnx.INodeProto;
const tensorOf = (model: Model, name: string) =>
  graphOf(model).initializer.find((tensor) => tensor.name === name) as onnxProto.onnx.ITensorProto;
const dimsOf = (model: Model) =>
  graphOf(model).input[0].type?.tensorType?.shape?.dim as { dimParam?: string; dimValue?: number }[];

function setAttribute(model: Model, name: string, i: number): void {
  const attribute = nodeOf(model, 'MatMulNBits').attribute?.find((found) => found.name === name);
  (attribute as onnxProto.onnx.IAttributeProto).i = i;
}

function setExternal(model: Model, key: string, value: string): void {
  const entry = tensorOf(model, 'c0.gate.weights').externalData?.find((found) => found.key === key);
  (entry as onnxProto.onnx.IStringStringEntryProto).value = value;
}

t.test('the lint takes what convert makes, and counts it', (t) => {
  for (const activation of ['drelu', 'relu', 'silu', 'fatrelu'] as const) {
    const h = { ...SHAPE, ffn: { ...SHAPE.ffn, activation, threshold: 0.1 } };
    for (const shape of graphShapes(h.neuron_count)) {
      const { problems, facts } = lintGraph(makeGraph(h, shape), BESIDE);
      t.strictSame(problems, [], `${activation}, ${shape.tokens} tokens, ${shape.clusters} clusters`);
      const { clusters } = bankLayout(h);
      const parts = clusters.slice(0, shape.clusters).flatMap(({ gate, up, down }) => [gate as NpuMatrix, up, down]);
      const weightBytes = parts.reduce((sum, { weights, scales }) => sum + weights.bytes + scales.bytes, 0);
      t.match(facts, { tokens: shape.tokens, weightBytes });
    }
  }
  t.strictSame(makeGraph(SHAPE, { tokens: 3, clusters: 1 }), makeGraph(SHAPE, { tokens: 3, clusters: 1 }));
  t.end();
});

t.test('the lint refuses what an NPU would not take, by name', (t) => {
  const cases: [string, (model: Model) => void, RegExp][] = [
    ['a named dimension', (m) => (dimsOf(m)[0] = { dimParam: 'batch' }), /"x": dimension 0 is dynamic \("batch"\)/],
    ['a dimension of no size', (m) => (dimsOf(m)[1] = {}), /"x": dimension 1 is dynamic/],
    ['no shape', (m) => (graphOf(m).output[0].type = { tensorType: { elemType: 1 } }), /"y" has no shape/],
    ['an unknown shape on the way', (m) => graphOf(m).valueInfo.shift(), /"sequence" has no shape/],
    ['a foreign op', (m) => (nodeOf(m, 'Relu').opType = 'Softplus'), /foreign op "Softplus"/],
    ['an op of the other domain', (m) => (nodeOf(m, 'Mul').domain = 'com.microsoft'), /foreign op "Mul"/],
    ['a foreign domain', (m) => (nodeOf(m, 'Mul').domain = 'ai.evil'), /foreign domain "ai.evil"/],
    ['a domain imported', (m) => m.opsetImport.push({ domain: '__proto__', version: 1 }), /domain "__proto__"/],
    ['a newer opset', (m) => (m.opsetImport[0].version = 99), /version 99 of "", above 21/],
    ['a newer format', (m) => (m.irVersion = 11), /IR version 11 is above 10/],
    ['a foreign type', (m) => (tensorOf(m, 'c0.gate.scales').dataType = 11), /foreign type double/],
    ['blocks of 64', (m) => setAttribute(m, 'block_size', 64), /"c0.gate" has blocks of 64 weights, not 32/],
    ['8 bits', (m) => setAttribute(m, 'bits', 8), /"c0.gate" has weights of 8 bits, not 4/],
    ['rows of no whole blocks', (m) => setAttribute(m, 'K', 63), /no whole blocks/],
    ['zero points', (m) => nodeOf(m, 'MatMulNBits').input?.push('c0.gate.scales'), /not symmetric/],
    ['a bias', (m) => nodeOf(m, 'MatMulNBits').input?.push('', '', 'c0.gate.scales'), /group index or a bias/],
    [
      'two dimensions',
      (m) => (nodeOf(m, 'MatMulNBits').input as string[]).splice(0, 1, 'x'),
      /multiplies 2 dimensions/,
    ],
    ['other sizes', (m) => setAttribute(m, 'N', 64), /its weights are uint8 \[128,2,16\], not uint8 \[64,2,16\]/],
    ['a shape that is computed', (m) => (nodeOf(m, 'Reshape').input = ['x', 'x']), /a shape that is computed/],
    ['attributes', (m) => (nodeOf(m, 'Relu').attribute = [{ name: 'then_branch', g: {} }]), /has attributes/],
    [
      'weights elsewhere',
      (m) => setExternal(m, 'location', '../weights.bin'),
      /leave the directory: "..\/weights.bin"/,
    ],
    ['weights anywhere', (m) => setExternal(m, 'location', '/etc/passwd'), /leave the directory/],
    ['weights above', (m) => setExternal(m, 'location', '..'), /leave the directory/],
    ['weights of another', (m) => setExternal(m, 'location', 'other.bin'), /"other.bin", which is not beside/],
    ['weights beyond the end', (m) => setExternal(m, 'offset', '10000000'), /lie outside of weights.bin/],
    ['weights of no place', (m) => setExternal(m, 'offset', '-64'), /lie outside of weights.bin/],
    ['weights of another size', (m) => setExternal(m, 'length', '64'), /have 64 bytes, their shape takes 4096/],
    ['an input that is not there', (m) => (nodeOf(m, 'Relu').input = ['ghost']), /reads "ghost", which is not there/],
    ['a name twice', (m) => graphOf(m).initializer.push(tensorOf(m, 'c0.gate.scales')), /is there twice/],
    ['an output that nobody makes', (m) => (graphOf(m).output[0].name = 'z'), /output "z" is not computed/],
    ['two inputs', (m) => graphOf(m).input.push(graphOf(m).input[0]), /2 inputs and 1 outputs/],
    ['no graph', (m) => (m.graph = null), /no graph/],
    ['functions', (m) => m.functions.push({ name: 'f' }), /functions of its own/],
  ];
  for (const [name, change, message] of cases) {
    const problems = problemsOf(change);
    if (!problems.some((problem) => message.test(problem))) t.fail(`${name}: ${problems.join('; ')}`);
  }
  t.strictSame(
    problemsOf(() => {}),
    [],
  );
  const huge = { ...SHAPE, hidden_size: 65536, neuron_count: 65536 } as Hyperparameters;
  const beside = new Map([['weights.bin', bankLayout(huge).bytes]]);
  t.match(lintGraph(makeGraph(huge, { tokens: 1, clusters: 8 }), beside).problems, [
    /bytes of weights, more than 2 GiB/,
  ]);
  t.strictSame(lintGraph(makeGraph(huge, { tokens: 1, clusters: 1 }), beside).problems, []);
  t.match(lintGraph(new Uint8Array(2 ** 21), BESIDE).problems, [/more than any graph/]);
  t.match(lintGraph(Buffer.from('{"graph": 1}'), BESIDE).problems, [/./]);
  const many = problemsOf((m) => {
    for (let i = 0; i < 100; i++) graphOf(m).node.push({ opType: 'Loop', name: `loop${i}` });
  });
  t.equal(many.length, 21, 'not more words than anybody reads');
  t.equal(many.at(-1), 'and 80 more');
  t.end();
});

t.test('whatever bytes a graph has, the lint says something or takes it', (t) => {
  const bytes = makeGraph(SHAPE, { tokens: 1, clusters: 2 });
  const change = fc.tuple(fc.nat(bytes.length - 1), fc.nat(255));
  fc.assert(
    fc.property(fc.array(change, { minLength: 1, maxLength: 8 }), fc.nat(bytes.length), (changes, length) => {
      const damaged = bytes.slice(0, Math.max(length, bytes.length >> 1));
      for (const [at, byte] of changes) damaged[at % damaged.length] = byte;
      const { problems, facts } = lintGraph(damaged, BESIDE);
      return problems.length > 0 === (facts === null);
    }),
    { numRuns: 2000 },
  );
  fc.assert(fc.property(fc.uint8Array({ maxLength: 200 }), (noise) => lintGraph(noise, BESIDE).problems.length > 0));
  t.end();
});

t.test('verify finds what is wrong with weights, graphs and their manifest', async (t) => {
  const good = await modelOf('opt');
  const copies = { count: 0 };
  const copyOf = () => {
    const copy = join(scratch, `copy-${copies.count++}.pi2`);
    cpSync(good, copy, { recursive: true });
    return copy;
  };
  const verify = async (path: string) => {
    const model = await openModelDirectory(path);
    const wrong = await verifyModel(model, loadAddon(), { threads: 1, progress: () => {} });
    const graphs = (await checkGraphs(model)).filter(({ problems }) => problems.length > 0);
    return [...wrong, ...graphs].map(({ file, problems }) => `${file}: ${problems.join('; ')}`);
  };
  const damage = (file: string, at: number) => {
    const bytes = readFileSync(file);
    bytes[at] ^= 1;
    writeFileSync(file, bytes);
  };
  t.strictSame(await verify(good), []);
  let copy = copyOf();
  damage(join(copy, 'npu/weights.bin'), 5000);
  t.match(await verify(copy), [/^npu\/weights.bin: checksum is/]);
  copy = copyOf();
  damage(join(copy, 'npu/t2-c1.onnx'), 40);
  t.match((await verify(copy))[0], /^npu\/t2-c1.onnx: sha256 is/);
  copy = copyOf();
  // Another graph of the model's, well made and registered, that names more weights than there are.
  const graph = makeGraph(
    { ...(await openModelDirectory(copy)).manifest.hyperparameters, hidden_size: 3200 },
    { tokens: 1, clusters: 1 },
  );
  writeFileSync(join(copy, 'npu/t1-c1.onnx'), graph);
  const edited = JSON.parse(readFileSync(join(copy, 'model.json'), 'utf8'));
  edited.npu.graphs[0].bytes = graph.length;
  edited.npu.graphs[0].sha256 = createHash('sha256').update(graph).digest('hex');
  writeFileSync(join(copy, 'model.json'), JSON.stringify(edited));
  t.match(await verify(copy), [/^npu\/t1-c1.onnx: .*lie outside of weights.bin/]);
  copy = copyOf();
  rmSync(join(copy, 'npu/t1-c2.onnx'));
  await t.rejects(verify(copy), { code: 'E_MODEL', message: /not whole: npu\/t1-c2.onnx is missing/ });
  copy = copyOf();
  renameSync(join(copy, 'npu'), join(scratch, 'elsewhere'));
  symlinkSync(join(scratch, 'elsewhere'), join(copy, 'npu'));
  await t.rejects(verify(copy), { code: 'E_MODEL', message: /no folder npu/ });

  const manifest = readFileSync(join(good, 'model.json'), 'utf8');
  const cases: [(m: ReturnType<typeof JSON.parse>) => void, RegExp][] = [
    [(m) => delete m.npu, /both or neither/],
    [(m) => delete m.quantization.down_tiles, /both or neither/],
    [(m) => (m.quantization.down_tiles = 64), /down_tiles/],
    [(m) => (m.npu.cluster_neurons = 256), /cluster_neurons is 256, the model needs 128/],
    [(m) => m.npu.graphs.pop(), /14 entries, the model needs 15/],
    [(m) => m.npu.graphs.reverse(), /npu.graphs.0 is of 128 tokens/],
    [(m) => (m.npu.graphs[3].bytes = 2 ** 30), /more than any graph/],
    [(m) => (m.npu.graphs[3].sha256 = 'x'), /npu.graphs.3.sha256/],
    [(m) => (m.npu.colour = 1), /colour/],
    [(m) => m.extents.pop(), /extent layers.1.experts.0.npu is missing/],
    [(m) => (m.extents.at(-1).bytes -= 64), /its clusters take/],
    [(m) => (m.extents.at(-1).file = 'neurons.bin'), /is in neurons.bin/],
  ];
  for (const [change, message] of cases) {
    const lie = JSON.parse(manifest);
    change(lie);
    t.throws(() => parseManifest(JSON.stringify(lie), 'model.json'), { code: 'E_MODEL', message });
  }
});

t.test('what a unit cannot take is refused before anything is converted', async (t) => {
  const path = await modelOf('drelu');
  for (const quantization of ['q8', 'f16'] as const) {
    await t.rejects(convertAgain(path, { quantization }), {
      code: 'E_USAGE',
      message: /--npu with --quant/,
      hint: /q4/,
    });
  }
  const odd = makeCheckpoint(join(scratch, 'odd'), { family: 'llama', hidden: 80, heads: 2 });
  await t.rejects(convertAgain(`${odd}.pi2`), {
    code: 'E_UNSUPPORTED',
    message: /hidden size 80 is not a multiple of 32/,
  });
});

t.test('the commands: convert --npu, inspect, verify', async (t) => {
  buildProgram();
  const model = await modelOf('silu by heat');
  const words = await runCli('inspect', model);
  t.match(words.stdout, /Down in tiles.*dense unit +[\d.]+ KiB.*clusters 3 of 128 neurons or fewer, .* a bank/s);
  t.match(words.stdout, /npu\/t128-c3\.onnx +tokens 128, clusters 3, nodes 22, +[\d.]+ KiB, weights [\d.]+ KiB\n/);
  const [facts] = jsonLines((await runCli('inspect', model, '--json')).stdout);
  t.match(facts.npu, { cluster_neurons: 128, bank_bytes: Number, graphs: { length: 15 } });
  t.match(facts.npu.graphs[1], { tokens: 1, clusters: 2, file: 'npu/t1-c2.onnx', nodes: 15, problems: [] });
  t.match(await runCli('verify', model), { status: 0, stdout: /and 15 graphs/ });
  const lines = jsonLines((await runCli('verify', model, '--json')).stdout);
  t.match(lines.at(-1), { ok: true, graphs: 15, wrong_extents: 0 });

  const checkpoint = (await modelOf('drelu')).replace(/\.pi2$/, '');
  const output = join(scratch, 'command.pi2');
  const made = await runCli('convert', checkpoint, '-o', output, '--npu');
  t.match(made, { status: 0, stderr: /neurons, [\d.]+ KiB for a dense unit/ });
  t.match(await runCli('convert', checkpoint, '-o', output, '--npu', '--quant', 'q8'), {
    status: 2,
    stderr: /--npu with --quant q8.*4-bit.*\n.*--quant q4/,
  });
});

t.test('the addon packs nothing that is not there', async (t) => {
  const model = await openModelDirectory(await modelOf('drelu'));
  const { hyperparameters: h, layout } = model.manifest;
  const [cluster] = bankLayout(h).clusters;
  const place = ({ weights, scales }: NpuMatrix) => ({ weights: weights.offset, scales: scales.offset });
  const parts = {
    ...{ gate: place(cluster.gate as NpuMatrix), up: place(cluster.up), down: place(cluster.down) },
    ...{ neurons: cluster.paddedNeurons, hiddenSize: h.hidden_size },
  };
  const target = new Uint8Array(cluster.range.bytes);
  const neurons = cluster.neurons;
  const units = readFileSync(model.neuronsPath).subarray(0, expertBytes(layout, neurons));
  const counts = { slot: 0, neurons, paddedNeurons: neurons, first: 0, threads: 2 };
  const request = { units, layout: nativeLayout(layout), ...counts, target, parts };
  const { packCluster, encodeColumns } = loadAddon();
  await packCluster(request);
  t.ok(Buffer.from(target).equals(bankBytes(model, 0).subarray(0, cluster.range.bytes)), 'what convert made');
  const lies: object[] = [
    { units: units.subarray(0, units.length - 1) },
    { slot: layout.neurons_per_unit },
    { slot: 1 },
    { neurons: neurons + 1 },
    { paddedNeurons: neurons + 1 },
    { paddedNeurons: neurons + 32 },
    { first: 32 },
    { first: 1 },
    { target: target.subarray(0, -64) },
    { parts: { ...parts, gate: undefined } },
    { parts: { ...parts, hiddenSize: h.hidden_size + 32 } },
    { parts: { ...parts, hiddenSize: 2 ** 52 } },
    { parts: { ...parts, neurons: 0 } },
    { parts: { ...parts, up: { weights: 2 ** 52, scales: 0 } } },
    { parts: { ...parts, down: { weights: 0, scales: target.length } } },
    { layout: { ...request.layout, part2Bytes: 1 } },
  ];
  for (const lie of lies) {
    await t.rejects(packCluster({ ...request, ...lie }), { code: 'NATIVE_ARGUMENT' }, JSON.stringify(lie).slice(0, 80));
  }
  const plain = await openModelDirectory(await convertAgain(model.path, { npu: false }));
  const untiled = readFileSync(plain.neuronsPath).subarray(0, units.length);
  await t.rejects(packCluster({ ...request, units: untiled }), { message: /Down is not in tiles/ });

  const source = new Uint8Array(4 * 32 * 64);
  const placement = {
    perUnit: 1,
    unitBytes: 144,
    weightsOffset: 0,
    weightsStride: 144,
    scalesOffset: 128,
    scalesStride: 144,
  };
  const band = {
    source,
    sourceType: 'F32',
    rows: 32,
    columns: 64,
    encoding: 'q4',
    target: new Uint8Array(64 * 144),
  } as const;
  const columns = { ...band, placement, firstVector: 0, threads: 1, firstElement: 0, tiles: true };
  const order = Uint32Array.from({ length: 64 }, (_, i) => i);
  t.equal(await encodeColumns({ ...columns, order }), null);
  const twice = order.slice().fill(3, 4, 5);
  const gap = order.slice().fill(SKIPPED, 4, 5);
  const far = order.slice().fill(64, 4, 5);
  for (const lie of [
    { order: twice },
    { order: gap },
    { order: far },
    { firstVector: 16 },
    { encoding: 'q8' as const },
  ]) {
    await t.rejects(
      encodeColumns({ ...columns, ...lie }),
      { code: 'NATIVE_ARGUMENT' },
      JSON.stringify(lie).slice(0, 80),
    );
  }
});

t.test('whatever the shape, and however a cluster is cut, packing keeps every number', async () => {
  const { encodeRows, encodeColumns, decodeRows, packCluster } = loadAddon();
  const shapes = fc.record({
    blocks: fc.integer({ min: 1, max: 11 }),
    neurons: fc.integer({ min: 1, max: 300 }),
    gated: fc.boolean(),
    tilesAtOnce: fc.integer({ min: 1, max: 5 }),
    threads: fc.integer({ min: 1, max: 3 }),
    seed: fc.nat(),
  });
  await fc.assert(
    fc.asyncProperty(shapes, async ({ blocks, neurons, gated, tilesAtOnce, threads, seed }) => {
      const ffn = { gated, activation: 'relu', threshold: 0, bias: false } as const;
      const h = { hidden_size: 32 * blocks, neuron_count: neurons, ffn } as Hyperparameters;
      const layout = chooseBundleLayout('q4', h.hidden_size, gated ? 3 : 2);
      const bundles = new Uint8Array(expertBytes(layout, neurons));
      const random = new Random(seed);
      const common = { sourceType: 'F32', encoding: 'q4', target: bundles, firstVector: 0, threads: 1 } as const;
      const matrices: Float32Array[] = [];
      for (let m = 0; m < layout.matrices; m++) {
        const source = Float32Array.from({ length: neurons * h.hidden_size }, () => random.normal());
        const request = {
          ...common,
          placement: bundlePlacement(layout, 'q4', h.hidden_size, m),
          source: new Uint8Array(source.buffer),
        };
        const isDown = m === layout.matrices - 1;
        if (isDown)
          await encodeColumns({ ...request, rows: h.hidden_size, columns: neurons, firstElement: 0, tiles: true });
        else await encodeRows({ ...request, rows: neurons, columns: h.hidden_size });
        const { placement } = request;
        matrices.push(
          decodeRows({ source: bundles, rows: neurons, columns: h.hidden_size, encoding: 'q4', placement }),
        );
      }
      const vectors = matrices.at(-1) as Float32Array;
      const down = new Float32Array(vectors.length);
      for (let i = 0; i < down.length; i++)
        down[(i % h.hidden_size) * neurons + Math.floor(i / h.hidden_size)] = vectors[i];
      const bank: Bank = { gate: gated ? matrices[0] : null, up: matrices[gated ? 1 : 0], down, upBias: null };
      const { clusters, bytes } = bankLayout(h);
      const packed = new Uint8Array(bytes);
      for (const cluster of clusters) {
        const { range, gate, up, paddedNeurons } = cluster;
        const place = ({ weights, scales }: NpuMatrix) => ({
          weights: weights.offset - range.offset,
          scales: scales.offset - range.offset,
        });
        const parts = { ...(gate ? { gate: place(gate) } : {}), up: place(up), down: place(cluster.down) };
        for (let first = 0; first < paddedNeurons; first += 32 * tilesAtOnce) {
          const padded = Math.min(32 * tilesAtOnce, paddedNeurons - first);
          const start = cluster.firstNeuron + first;
          await packCluster({
            units: bundles.subarray(Math.floor(start / layout.neurons_per_unit) * layout.unit_bytes),
            layout: nativeLayout(layout),
            slot: start % layout.neurons_per_unit,
            neurons: Math.min(padded, cluster.neurons - first),
            paddedNeurons: padded,
            first,
            target: packed.subarray(range.offset, range.offset + range.bytes),
            parts: { ...parts, neurons: paddedNeurons, hiddenSize: h.hidden_size },
            threads,
          });
        }
      }
      return clusters.every((cluster) => differences(packed, bank, cluster, h) === 0);
    }),
    { numRuns: 60 },
  );
});
