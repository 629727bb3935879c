import type { Shape } from './shapes.js';
import type { Bank, SparseStream } from './sparse-stream.js';

/** Changes one row of a tensor: `row` is its number, `values` holds random bf16 numbers. */
export type RowWriter = (row: number, values: Uint16Array) => void;

/** A tensor of a synthetic checkpoint, in bf16. Weights are normal numbers of this deviation; norms are ones. */
export interface SyntheticTensor {
  name: string;
  shape: readonly number[];
  deviation: number | 'ones';
  /** Gives rows more than randomness. */
  writeRow?: RowWriter;
}

/** What the tensors of an expert are called, without the `.weight` at the end. */
export function bankOf(shape: Shape, layer: number, expert: number): Bank & { down: string; predictor: string } {
  const isMixture = shape.expertCount !== undefined;
  const prefix = `model.layers.${layer}.${isMixture ? `block_sparse_moe.experts.${expert}` : 'mlp'}`;
  const [gate, up, down] = (isMixture ? ['w1', 'w3', 'w2'] : ['gate_proj', 'up_proj', 'down_proj']).map(
    (part) => `${prefix}.${part}`,
  );
  return { layer, expert, gate, up, down, predictor: `${prefix}.predictor` };
}

/**
 * All tensors of a shape. A product of inputs of size 1 with weights of deviation 1/sqrt(inputs) has size 1 again, so
 * activations stay finite through any number of layers; what the two blocks of a layer add is kept small against the stream.
 * Of a dReLU shape neurons fire as `SparseStream` says, and it brings predictors.
 */
export function tensorsOf(shape: Shape, stream: SparseStream | null): SyntheticTensor[] {
  const { hiddenSize, neuronCount, vocabSize, layerCount, expertCount = 1 } = shape;
  const kvSize = (hiddenSize / shape.headCount) * shape.kvHeadCount;
  const blockScale = (stream?.outputScale ?? 1) / Math.sqrt(2 * layerCount);
  const matrix = (name: string, rows: number, columns: number, scale = 1, writeRow?: RowWriter): SyntheticTensor => ({
    name: `${name}.weight`,
    shape: [rows, columns],
    deviation: scale / Math.sqrt(columns),
    writeRow,
  });
  const norm = (name: string): SyntheticTensor => ({ name: `${name}.weight`, shape: [hiddenSize], deviation: 'ones' });
  const ffn = (layer: number, expert: number): SyntheticTensor[] => {
    const { down, predictor: prefix, ...bank } = bankOf(shape, layer, expert);
    const predictor = stream && [
      matrix(`${prefix}.fc1`, stream.rank, hiddenSize, 1, stream.predictorInputs),
      matrix(`${prefix}.fc2`, neuronCount, stream.rank, 1, stream.predictorScores(bank)),
    ];
    return [
      matrix(bank.gate, neuronCount, hiddenSize, stream?.gateScale, stream?.gates(bank)),
      matrix(bank.up, neuronCount, hiddenSize, 1, stream?.ups(bank)),
      matrix(down, hiddenSize, neuronCount, blockScale, stream?.outputs),
      ...(predictor ?? []),
    ];
  };
  const layers = Array.from({ length: layerCount }, (_, i) => {
    const layer = `model.layers.${i}`;
    const router = matrix(`${layer}.block_sparse_moe.gate`, expertCount, hiddenSize, 1, stream?.inputs);
    return [
      norm(`${layer}.input_layernorm`),
      matrix(`${layer}.self_attn.q_proj`, hiddenSize, hiddenSize, 1, stream?.inputs),
      matrix(`${layer}.self_attn.k_proj`, kvSize, hiddenSize, 1, stream?.inputs),
      matrix(`${layer}.self_attn.v_proj`, kvSize, hiddenSize, 1, stream?.inputs),
      matrix(`${layer}.self_attn.o_proj`, hiddenSize, hiddenSize, blockScale, stream?.outputs),
      norm(`${layer}.post_attention_layernorm`),
      ...(shape.expertCount === undefined ? [] : [router]),
      ...Array.from({ length: expertCount }, (_, expert) => ffn(i, expert)).flat(),
    ];
  });
  return [
    matrix('model.embed_tokens', vocabSize, hiddenSize, Math.sqrt(hiddenSize), stream?.embeddings),
    ...layers.flat(),
    norm('model.norm'),
    matrix('lm_head', vocabSize, hiddenSize, 1, stream?.head),
  ];
}
