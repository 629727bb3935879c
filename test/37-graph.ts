// What a dense unit gets: weights in MatMulNBits' order, which must be the numbers of the bundles and no others; graphs, which
// ONNX Runtime must compute as the equations say; and the lint that keeps out what an NPU would not take.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { expertCount, type Hyperparameters } from '../src/format/hyperparameters.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import { bankExtent, bankLayout, type Cluster, graphShapes, type NpuMatrix } from '../src/format/npu.js';
import { decodedWeights } from './support/decoded-weights.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { makeModel } from './support/models.js';
import { Random } from './support/numbers.js';

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

const models: Record<string, Promise<string>> = {};
function modelOf(name: string): Promise<string> {
  models[name] ??= makeModel(join(scratch, name), MODELS[name], 'q4', true);
  return models[name];
}

t.test('the weights of a unit are the numbers of the bundles', async (t) => {
  for (const name of Object.keys(MODELS)) {
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
async function checkGraphs(t: Test, directory: string, only?: number[]): Promise<void> {
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
  for (const name of Object.keys(MODELS)) await t.test(name, async (t) => checkGraphs(t, await modelOf(name)));
});
