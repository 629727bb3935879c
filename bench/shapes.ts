import type { SparseStream } from './sparse-stream.js';

/** A model's sizes without its weights: enough to make a synthetic checkpoint of the same shape. */
export interface Shape {
  name: string;
  hiddenSize: number;
  layerCount: number;
  headCount: number;
  kvHeadCount: number;
  neuronCount: number;
  vocabSize: number;
  contextLength: number;
  /** `silu` fires every neuron; `drelu` (the bamboo family) only those whose gate and up are above zero. */
  activation: 'silu' | 'drelu';
  /** `model_type` and `hidden_act` of config.json. */
  modelType: 'llama' | 'mistral' | 'bamboo';
  /** Of a mixture: experts a layer, and how many of them compute a token. */
  expertCount?: number;
  expertsPerToken?: number;
}

const TINYLLAMA = {
  hiddenSize: 2048,
  layerCount: 22,
  headCount: 32,
  kvHeadCount: 4,
  neuronCount: 5632,
  vocabSize: 32000,
  contextLength: 2048,
};

const MISTRAL = {
  hiddenSize: 4096,
  layerCount: 32,
  headCount: 32,
  kvHeadCount: 8,
  neuronCount: 14336,
  vocabSize: 32000,
  contextLength: 32768,
};

export const SHAPES: readonly Shape[] = [
  { name: 'tinyllama-1.1b', ...TINYLLAMA, activation: 'silu', modelType: 'llama' },
  { name: 'tinyllama-1.1b-drelu', ...TINYLLAMA, activation: 'drelu', modelType: 'bamboo' },
  { name: 'mistral-7b', ...MISTRAL, activation: 'silu', modelType: 'mistral' },
  { name: 'mistral-7b-drelu', ...MISTRAL, activation: 'drelu', modelType: 'bamboo' },
];

/** Writes one row of a tensor: `row` is its number, `values` holds random bf16 numbers that it may change. */
export type RowWriter = (row: number, values: Uint16Array) => void;

/** A tensor of a synthetic checkpoint. Weights are normal numbers of this deviation; norms are ones. */
export interface SyntheticTensor {
  name: string;
  shape: readonly number[];
  deviation: number | 'ones';
  /** Gives rows more than randomness. */
  writeRow?: RowWriter;
}

/** config.json of a shape, as HuggingFace writes it. */
export function configOf(shape: Shape): object {
  return {
    model_type: shape.modelType,
    hidden_act: shape.activation === 'drelu' ? 'relu' : 'silu',
    hidden_size: shape.hiddenSize,
    num_hidden_layers: shape.layerCount,
    num_attention_heads: shape.headCount,
    num_key_value_heads: shape.kvHeadCount,
    intermediate_size: shape.neuronCount,
    vocab_size: shape.vocabSize,
    max_position_embeddings: shape.contextLength,
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    ...(shape.modelType === 'llama' ? {} : { sliding_window: null }),
    tie_word_embeddings: false,
    torch_dtype: 'bfloat16',
    bos_token_id: 1,
    eos_token_id: 2,
  };
}

/**
 * All tensors of a shape. A product of inputs of size 1 with weights of deviation 1/sqrt(inputs) has size 1 again, so
 * activations stay finite through any number of layers; what the two blocks of a layer add is kept small against the stream.
 * Of a dReLU shape neurons fire as `SparseStream` says, and it brings predictors.
 */
export function tensorsOf(shape: Shape, stream: SparseStream | null): SyntheticTensor[] {
  const { hiddenSize, neuronCount, vocabSize, layerCount } = shape;
  const kvSize = (hiddenSize / shape.headCount) * shape.kvHeadCount;
  const blockScale = 1 / Math.sqrt(2 * layerCount);
  const matrix = (name: string, rows: number, columns: number, scale = 1, writeRow?: RowWriter): SyntheticTensor => ({
    name: `${name}.weight`,
    shape: [rows, columns],
    deviation: scale / Math.sqrt(columns),
    writeRow,
  });
  const norm = (name: string): SyntheticTensor => ({ name: `${name}.weight`, shape: [hiddenSize], deviation: 'ones' });
  const layers = Array.from({ length: layerCount }, (_, i) => {
    const layer = `model.layers.${i}`;
    const gate = `${layer}.mlp.gate_proj`;
    const predictor = stream && [
      matrix(`${layer}.mlp.predictor.fc1`, stream.rank, hiddenSize, 1, stream.predictorInputs),
      matrix(`${layer}.mlp.predictor.fc2`, neuronCount, stream.rank, 1, stream.predictorScores(i, `${gate}.weight`)),
    ];
    return [
      norm(`${layer}.input_layernorm`),
      matrix(`${layer}.self_attn.q_proj`, hiddenSize, hiddenSize),
      matrix(`${layer}.self_attn.k_proj`, kvSize, hiddenSize),
      matrix(`${layer}.self_attn.v_proj`, kvSize, hiddenSize),
      matrix(`${layer}.self_attn.o_proj`, hiddenSize, hiddenSize, blockScale, stream?.outputs),
      norm(`${layer}.post_attention_layernorm`),
      matrix(gate, neuronCount, hiddenSize, stream?.gateScale, stream?.gates(i)),
      matrix(`${layer}.mlp.up_proj`, neuronCount, hiddenSize),
      matrix(`${layer}.mlp.down_proj`, hiddenSize, neuronCount, blockScale, stream?.outputs),
      ...(predictor ?? []),
    ];
  });
  return [
    { ...matrix('model.embed_tokens', vocabSize, hiddenSize, Math.sqrt(hiddenSize), stream?.embeddings) },
    ...layers.flat(),
    norm('model.norm'),
    matrix('lm_head', vocabSize, hiddenSize),
  ];
}
