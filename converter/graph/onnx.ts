/**
 * Graphs for a dense unit (docs/DENSE_UNIT.md): the FFN of the first clusters of a bank, dense, for a fixed number of tokens.
 * Weights are named by where they lie in `npu/weights.bin` and never pass through protobuf. The same model gives the same bytes.
 */
import onnxProto from 'onnx-proto';
import { BLOCK } from '../../src/format/encoding.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import {
  bankLayout,
  type Cluster,
  type GraphShape,
  NPU_WEIGHTS_NAME,
  type NpuMatrix,
  type Range,
} from '../../src/format/npu.js';

const { onnx } = onnxProto;
const { FLOAT, UINT8, BOOL, INT64 } = onnx.TensorProto.DataType;

/** Versions that graphs are written for: ONNX Runtime 1.20 and newer read them. */
export const IR_VERSION = 10;
export const OPSET_VERSION = 21;
/** The domain of MatMulNBits, and its version. */
export const CONTRIB_DOMAIN = 'com.microsoft';
export const CONTRIB_VERSION = 1;

/** Bits of a weight. */
export const WEIGHT_BITS = 4;
/** What products are made in: int8, with a scale for each 32 inputs. */
const ACCURACY_LEVEL = 4;

/** HTP multiplies three dimensions only: one sequence of tokens. */
const SEQUENCES = 1;

/** Names of the input [tokens, hidden] and of the output [tokens, hidden]. */
export const INPUT_NAME = 'x';
export const OUTPUT_NAME = 'y';

/** The bytes of the graph of a shape, which names the weights of bank 0. */
export function makeGraph(h: Hyperparameters, shape: GraphShape): Uint8Array {
  const graph = new GraphMaker(h, shape.tokens);
  const clusters = bankLayout(h).clusters.slice(0, shape.clusters);
  const input = graph.reshape(INPUT_NAME, 'sequence', [SEQUENCES, shape.tokens, h.hidden_size]);
  const sums = clusters.map((cluster, c) => graph.addCluster(`c${c}`, cluster, input));
  for (let c = 1; c < sums.length; c++) {
    sums[c] = graph.add('Add', `sum${c}`, [sums[c - 1], sums[c]], h.hidden_size);
  }
  graph.reshape(sums[sums.length - 1], OUTPUT_NAME, [shape.tokens, h.hidden_size]);
  return graph.bytes(`t${shape.tokens}-c${shape.clusters}`);
}

class GraphMaker {
  readonly #nodes: onnxProto.onnx.INodeProto[] = [];
  readonly #weights: onnxProto.onnx.ITensorProto[] = [];
  readonly #values: onnxProto.onnx.IValueInfoProto[] = [];
  readonly #constants = new Set<string>();

  constructor(
    private readonly h: Hyperparameters,
    private readonly tokens: number,
  ) {}

  /** The FFN of a cluster for an input [1, tokens, hidden]. Returns the name of its sum. */
  addCluster(name: string, cluster: Cluster, input: string): string {
    const { gate, up, down, upBias, paddedNeurons } = cluster;
    const gates = gate && this.#product(`${name}.gate`, input, gate);
    let ups = this.#product(`${name}.up`, input, up);
    if (upBias) {
      const bias = this.#external(`${name}.up_bias`, FLOAT, [paddedNeurons], upBias);
      ups = this.add('Add', `${name}.biased`, [ups, bias], paddedNeurons);
    }
    const active = this.#activate(name, gates, ups, paddedNeurons);
    return this.#product(`${name}.down`, active, down);
  }

  /** The same numbers in another shape. Returns the name of it. */
  reshape(input: string, output: string, dims: number[]): string {
    const shape = `${output}.shape`;
    this.#weights.push({ name: shape, dataType: INT64, dims: [dims.length], int64Data: dims });
    this.#nodes.push({ opType: 'Reshape', name: output, input: [input, shape], output: [output] });
    if (output !== OUTPUT_NAME) this.#values.push(valueInfo(output, dims));
    return output;
  }

  /** A node of one output [1, tokens, columns]; returns its name. */
  add(opType: string, output: string, input: string[], columns: number, elemType: number = FLOAT): string {
    this.#nodes.push({ opType, name: output, input, output: [output] });
    this.#values.push(valueInfo(output, [SEQUENCES, this.tokens, columns], elemType));
    return output;
  }

  bytes(name: string): Uint8Array {
    const matrix = (value: string) => valueInfo(value, [this.tokens, this.h.hidden_size]);
    const model = onnx.ModelProto.create({
      irVersion: IR_VERSION,
      producerName: 'powerinfer2',
      opsetImport: [
        { domain: '', version: OPSET_VERSION },
        { domain: CONTRIB_DOMAIN, version: CONTRIB_VERSION },
      ],
      graph: {
        name,
        node: this.#nodes,
        initializer: this.#weights,
        input: [matrix(INPUT_NAME)],
        output: [matrix(OUTPUT_NAME)],
        valueInfo: this.#values,
      },
    });
    return onnx.ModelProto.encode(model).finish();
  }

  /** What neurons contribute (`ACTIVATIONS` of hyperparameters.ts), with ops that HTP has. */
  #activate(name: string, gates: string | null, ups: string, columns: number): string {
    const { activation, threshold } = this.h.ffn;
    const op = (opType: string, value: string, input: string[]) => this.add(opType, `${name}.${value}`, input, columns);
    if (gates === null) return op('Relu', 'active', [ups]);
    const product = (left: string, right: string) => op('Mul', 'active', [left, right]);
    switch (activation) {
      case 'relu':
        return product(op('Relu', 'fired', [gates]), ups);
      case 'drelu':
        return product(op('Relu', 'fired', [gates]), op('Relu', 'positive', [ups]));
      case 'silu':
        return product(op('Mul', 'fired', [gates, op('Sigmoid', 'sigmoid', [gates])]), ups);
      case 'fatrelu': {
        const limits = [gates, this.#constant('threshold', threshold)];
        const fires = this.add('GreaterOrEqual', `${name}.fires`, limits, columns, BOOL);
        return product(op('Where', 'fired', [fires, gates, this.#constant('zero', 0)]), ups);
      }
    }
  }

  /** input [1, tokens, K] times a matrix [N, K], transposed. Its name is that of its output. */
  #product(name: string, input: string, { outputs, inputs, weights, scales }: NpuMatrix): string {
    const blocks = inputs / BLOCK;
    const parts = [
      this.#external(`${name}.weights`, UINT8, [outputs, blocks, BLOCK / 2], weights),
      this.#external(`${name}.scales`, FLOAT, [outputs, blocks], scales),
    ];
    const numbers = { K: inputs, N: outputs, bits: WEIGHT_BITS, block_size: BLOCK, accuracy_level: ACCURACY_LEVEL };
    this.#nodes.push({
      opType: 'MatMulNBits',
      domain: CONTRIB_DOMAIN,
      name,
      input: [input, ...parts],
      output: [name],
      attribute: Object.entries(numbers).map(([key, i]) => {
        return { name: key, type: onnx.AttributeProto.AttributeType.INT, i };
      }),
    });
    this.#values.push(valueInfo(name, [SEQUENCES, this.tokens, outputs]));
    return name;
  }

  /** A tensor in the file of weights. */
  #external(name: string, dataType: number, dims: number[], { offset, bytes }: Range): string {
    const entries = { location: NPU_WEIGHTS_NAME, offset, length: bytes };
    this.#weights.push({
      name,
      dataType,
      dims,
      dataLocation: onnx.TensorProto.DataLocation.EXTERNAL,
      externalData: Object.entries(entries).map(([key, value]) => ({ key, value: String(value) })),
    });
    return name;
  }

  /** A number that the graph itself holds. */
  #constant(name: string, value: number): string {
    if (!this.#constants.has(name)) this.#weights.push({ name, dataType: FLOAT, dims: [1], floatData: [value] });
    this.#constants.add(name);
    return name;
  }
}

function valueInfo(name: string, dims: number[], elemType: number = FLOAT) {
  const dim = dims.map((dimValue) => ({ dimValue }));
  return { name, type: { tensorType: { elemType, shape: { dim } } } };
}
