/** Graphs of a dense unit with random weights, as docs/FORMAT.md section 7 has them, and what they are to compute. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import onnxProto from 'onnx-proto';
import { Random } from './numbers.js';

const { onnx } = onnxProto;
const BLOCK = 32;

export interface DenseGraphs {
  hidden: number;
  clusterNeurons: number;
  clusters: number;
  banks: number;
  /** Numbers of tokens to write graphs for, each for one cluster up to all. */
  tokens: readonly number[];
  /** 4: inputs as int8, as on an NPU. 0: products of floats. */
  accuracyLevel?: 0 | 4;
}

/** One matrix: rows of outputs, and its numbers as they are after quantization. */
interface Matrix {
  rows: number;
  columns: number;
  values: Float32Array;
}

/** A bank's clusters, each gate, up and down: [neurons, hidden], [neurons, hidden], [hidden, neurons]. */
export type Bank = [Matrix, Matrix, Matrix][];

/** Writes `t{tokens}-c{clusters}.onnx` and `weights.bin` into `directory`; returns what is in them, and the bytes of a bank. */
export function writeDenseGraphs(directory: string, options: DenseGraphs): { banks: Bank[]; bankBytes: number } {
  const { hidden, clusterNeurons, clusters } = options;
  mkdirSync(directory, { recursive: true });
  const random = new Random(clusters * 1000 + hidden);
  const parts: Uint8Array[] = [];
  const matrix = (rows: number, columns: number): Matrix => {
    const packed = new Uint8Array((rows * columns) / 2);
    for (let i = 0; i < packed.length; i++) packed[i] = Math.floor(random.uniform() * 256);
    const scales = new Float32Array((rows * columns) / BLOCK);
    for (let i = 0; i < scales.length; i++) scales[i] = (0.5 + random.uniform()) / (4 * Math.sqrt(columns));
    const values = new Float32Array(rows * columns);
    for (let i = 0; i < values.length; i++) {
      values[i] = (((packed[i >> 1] >> (i % 2 === 0 ? 0 : 4)) & 15) - 8) * scales[Math.floor(i / BLOCK)];
    }
    parts.push(packed, new Uint8Array(scales.buffer));
    return { rows, columns, values };
  };
  const banks = Array.from({ length: options.banks }, () =>
    Array.from({ length: clusters }, (): Bank[number] => [
      matrix(clusterNeurons, hidden),
      matrix(clusterNeurons, hidden),
      matrix(hidden, clusterNeurons),
    ]),
  );
  writeFileSync(join(directory, 'weights.bin'), Buffer.concat(parts));
  for (const tokens of options.tokens) {
    for (let c = 1; c <= clusters; c++) {
      writeFileSync(join(directory, `t${tokens}-c${c}.onnx`), encodeGraph(options, tokens, c));
    }
  }
  return { banks, bankBytes: parts.reduce((sum, part) => sum + part.length, 0) / options.banks };
}

function encodeGraph(options: DenseGraphs, tokens: number, clusters: number): Uint8Array {
  const { hidden, clusterNeurons, accuracyLevel = 4 } = options;
  const node: object[] = [];
  const initializer: object[] = [];
  let offset = 0;
  const external = (name: string, dataType: number, dims: number[], bytes: number) => {
    const externalData = [
      { key: 'location', value: 'weights.bin' },
      { key: 'offset', value: String(offset) },
      { key: 'length', value: String(bytes) },
    ];
    initializer.push({ name, dataType, dims, externalData, dataLocation: 1 });
    offset += bytes;
  };
  const product = (name: string, input: string, rows: number, columns: number) => {
    const blocks = columns / BLOCK;
    external(`${name}_weights`, 2, [rows, blocks, BLOCK / 2], (rows * columns) / 2);
    external(`${name}_scales`, 1, [rows * blocks], rows * blocks * 4);
    const attributes = { K: columns, N: rows, bits: 4, block_size: BLOCK, accuracy_level: accuracyLevel };
    const attribute = Object.entries(attributes).map(([key, i]) => ({ name: key, type: 2, i }));
    const inputs = [input, `${name}_weights`, `${name}_scales`];
    node.push({ opType: 'MatMulNBits', domain: 'com.microsoft', input: inputs, output: [name], attribute });
  };
  for (let c = 0; c < clusters; c++) {
    product(`gate_${c}`, 'x', clusterNeurons, hidden);
    product(`up_${c}`, 'x', clusterNeurons, hidden);
    node.push({ opType: 'Relu', input: [`gate_${c}`], output: [`fired_${c}`] });
    node.push({ opType: 'Mul', input: [`fired_${c}`, `up_${c}`], output: [`h_${c}`] });
    product(c === 0 && clusters === 1 ? 'y' : `y_${c}`, `h_${c}`, hidden, clusterNeurons);
    if (c === 0) continue;
    const before = c === 1 ? 'y_0' : `sum_${c - 1}`;
    node.push({ opType: 'Add', input: [before, `y_${c}`], output: [c === clusters - 1 ? 'y' : `sum_${c}`] });
  }
  return encodeModel(`t${tokens}-c${clusters}`, node, initializer, [tokens, hidden]);
}

/** A graph of nodes from x to y, both floats of `dims`. */
export function encodeModel(name: string, node: object[], initializer: object[], dims: number[]): Uint8Array {
  const shape = { dim: dims.map((dimValue) => ({ dimValue })) };
  const tensor = (of: string) => ({ name: of, type: { tensorType: { elemType: 1, shape } } });
  const model = onnx.ModelProto.fromObject({
    irVersion: 10,
    opsetImport: [{ version: 21 }, { domain: 'com.microsoft', version: 1 }],
    graph: { name, node, initializer, input: [tensor('x')], output: [tensor('y')] },
  });
  return onnx.ModelProto.encode(model).finish();
}

/** sums[t] = sum of down * (relu(gate . x) * (up . x)) of the first clusters of a bank, in doubles. */
export function computeDensely(bank: Bank, clusters: number, x: Float32Array): Float64Array {
  const hidden = bank[0][0].columns;
  const sums = new Float64Array(x.length);
  for (let t = 0; t < x.length / hidden; t++) {
    const input = x.subarray(t * hidden, (t + 1) * hidden);
    for (const [gate, up, down] of bank.slice(0, clusters)) {
      for (let i = 0; i < gate.rows; i++) {
        const fired = Math.max(0, dot(gate, i, input)) * dot(up, i, input);
        for (let j = 0; j < hidden; j++) sums[t * hidden + j] += fired * down.values[j * down.columns + i];
      }
    }
  }
  return sums;
}

function dot(matrix: Matrix, row: number, x: Float32Array): number {
  let sum = 0;
  for (let j = 0; j < matrix.columns; j++) sum += matrix.values[row * matrix.columns + j] * x[j];
  return sum;
}
