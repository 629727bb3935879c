import { nearestName, Pi2Error } from '../src/base/error.js';

/** A model's sizes without its weights: enough to make a synthetic model of the same shape. */
export interface Shape {
  name: string;
  hiddenSize: number;
  layerCount: number;
  headCount: number;
  kvHeadCount: number;
  neuronCount: number;
  vocabSize: number;
  contextLength: number;
  /** `silu` fires every neuron; `drelu` only those whose gate and up are above zero. */
  activation: 'silu' | 'drelu';
  /** `model_type` and `hidden_act` of config.json. */
  modelType: 'llama' | 'mistral' | 'bamboo' | 'mixtral' | 'turbosparsemixtral';
  /** Of a mixture: experts a layer, and how many of them compute a token. */
  expertCount?: number;
  expertsPerToken?: number;
  /** Tens of gigabytes: made only where that is asked for. */
  isLarge?: boolean;
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

const MIXTRAL = { ...MISTRAL, expertCount: 8, expertsPerToken: 2, isLarge: true };

export const SHAPES: readonly Shape[] = [
  { name: 'tinyllama-1.1b', ...TINYLLAMA, activation: 'silu', modelType: 'llama' },
  { name: 'tinyllama-1.1b-drelu', ...TINYLLAMA, activation: 'drelu', modelType: 'bamboo' },
  { name: 'mistral-7b', ...MISTRAL, activation: 'silu', modelType: 'mistral' },
  { name: 'mistral-7b-drelu', ...MISTRAL, activation: 'drelu', modelType: 'bamboo' },
  { name: 'mixtral-47b', ...MIXTRAL, activation: 'silu', modelType: 'mixtral' },
  { name: 'mixtral-47b-drelu', ...MIXTRAL, activation: 'drelu', modelType: 'turbosparsemixtral' },
];

/** The shape of this name. Throws `E_USAGE` with the nearest one. */
export function shapeOf(name: string): Shape {
  const found = SHAPES.find((shape) => shape.name === name);
  if (found) return found;
  const names = SHAPES.map((shape) => shape.name);
  const nearest = nearestName(name, names);
  const known = `known: ${names.join(', ')}`;
  throw new Pi2Error('E_USAGE', `no shape is called ${name}`, nearest ? `did you mean ${nearest}? ${known}` : known);
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
    ...(shape.expertCount ? { num_local_experts: shape.expertCount, num_experts_per_tok: shape.expertsPerToken } : {}),
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
