/**
 * What a dense unit needs beside the bundles: `npu/` of a model directory, FORMAT.md section 7. The one place that knows where
 * the weights of a cluster lie; converter, `verify` and the runtime all ask it.
 */
import { BLOCK } from './encoding.js';
import type { Hyperparameters } from './hyperparameters.js';

/** Folder of a model directory, and the weights in it. */
export const NPU_FOLDER = 'npu';
export const NPU_WEIGHTS_FILE = 'npu/weights.bin';
/** The same as graphs name it: from their own folder. */
export const NPU_WEIGHTS_NAME = 'weights.bin';

/** Neurons of an expert, in heat order, that share a scale of Down with each other and 32 weights of each. */
export const DOWN_TILE = 32 as const;

/** Tokens computed together that there are graphs for: sequences decoded, and a chunk of a prompt. */
export const GRAPH_TOKENS = [1, 2, 3, 4, 128] as const;

const CLUSTERS_MAX = 8;
const CLUSTER_MULTIPLE = 128;
/** Tensors of a cluster begin on a cache line. */
const ALIGNMENT = 64;

/** A matrix as MatMulNBits has it. */
export interface NpuMatrix {
  /** Its N: rows, each a product. */
  outputs: number;
  /** Its K, a multiple of 32. */
  inputs: number;
  /** Where in the bank: u8 [outputs, inputs / 32, 16], low nibble first, a weight is (nibble - 8) * scale. */
  weights: Range;
  /** f32 [outputs, inputs / 32] */
  scales: Range;
}

/** Bytes of a bank. */
export interface Range {
  offset: number;
  bytes: number;
}

/** A run of neurons of a bank, in heat order, and where its weights are. */
export interface Cluster {
  firstNeuron: number;
  /** Neurons that there are. */
  neurons: number;
  /** The same with the zeros that fill its last tile. */
  paddedNeurons: number;
  range: Range;
  /** Null for an FFN of two matrices. */
  gate: NpuMatrix | null;
  up: NpuMatrix;
  down: NpuMatrix;
  /** f32 [paddedNeurons]; null if the FFN has no biases. */
  upBias: Range | null;
}

/** The weights of one bank (layer and expert): all banks of a model have the same. */
export interface BankLayout {
  clusters: Cluster[];
  bytes: number;
}

type Shape = Pick<Hyperparameters, 'hidden_size' | 'neuron_count' | 'ffn'>;

/** Neurons of every cluster of a bank but the last, which may have fewer: a multiple of 128, so that there are at most 8. */
export function clusterNeurons(neuronCount: number): number {
  return Math.ceil(neuronCount / CLUSTERS_MAX / CLUSTER_MULTIPLE) * CLUSTER_MULTIPLE;
}

function roundUp(bytes: number): number {
  return Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;
}

/** Where the weights of a bank's clusters lie, one behind another. */
export function bankLayout({ hidden_size, neuron_count, ffn }: Shape): BankLayout {
  const size = clusterNeurons(neuron_count);
  const clusters: Cluster[] = [];
  let end = 0;
  const take = (bytes: number): Range => {
    const offset = roundUp(end);
    end = offset + bytes;
    return { offset, bytes };
  };
  const matrix = (outputs: number, inputs: number): NpuMatrix => {
    const blocks = outputs * (inputs / BLOCK);
    return { outputs, inputs, weights: take(blocks * (BLOCK / 2)), scales: take(4 * blocks) };
  };
  for (let first = 0; first < neuron_count; first += size) {
    const neurons = Math.min(size, neuron_count - first);
    const padded = Math.ceil(neurons / DOWN_TILE) * DOWN_TILE;
    const offset = end;
    const parts = {
      gate: ffn.gated ? matrix(padded, hidden_size) : null,
      up: matrix(padded, hidden_size),
      down: matrix(hidden_size, padded),
      upBias: ffn.bias ? take(4 * padded) : null,
    };
    end = roundUp(end);
    clusters.push({
      ...{ firstNeuron: first, neurons, paddedNeurons: padded },
      range: { offset, bytes: end - offset },
      ...parts,
    });
  }
  return { clusters, bytes: end };
}

/** A static graph of a model: the first `clusters` clusters of any bank, for `tokens` tokens. */
export interface GraphShape {
  tokens: number;
  clusters: number;
}

/** Every graph of a model of this shape, in the order of the manifest. */
export function graphShapes(neuronCount: number): GraphShape[] {
  const count = Math.ceil(neuronCount / clusterNeurons(neuronCount));
  const clusters = Array.from({ length: count }, (_, i) => i + 1);
  return GRAPH_TOKENS.flatMap((tokens) => clusters.map((number) => ({ tokens, clusters: number })));
}

/** The file of a graph in its model directory. */
export function graphFile({ tokens, clusters }: GraphShape): string {
  return `${NPU_FOLDER}/t${tokens}-c${clusters}.onnx`;
}

/** Name of the extent of a bank's weights. A dense FFN is expert 0. */
export function bankExtent(layer: number, expert: number): string {
  return `layers.${layer}.experts.${expert}.npu`;
}
