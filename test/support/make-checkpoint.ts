import { copyFileSync, existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Family } from '../../src/format/hyperparameters.js';
import { encode, type NumberType, Random } from './numbers.js';
import { type RawTensor, safetensors } from './safetensors.js';

/** What to make. Everything but the family has a small, odd default. */
export interface CheckpointOptions {
  family: Family;
  hidden?: number;
  layers?: number;
  heads?: number;
  kvHeads?: number;
  headDim?: number;
  neurons?: number;
  vocab?: number;
  context?: number;
  /** MoE families only. */
  experts?: number;
  expertsPerToken?: number;
  hiddenAct?: string;
  /** Default: the family's. */
  tied?: boolean;
  /** Number type of all weights. Default BF16. */
  type?: NumberType;
  /** 1 writes `model.safetensors`, more write shards and an index. */
  shards?: number;
  seed?: number;
  /** bamboo and turbosparsemixtral: adds the predictors that the public checkpoints have. */
  predictors?: boolean;
  /** Gated families: gates and ups have only this rank, so that a small predictor can know which neurons fire. */
  gateRank?: number;
  /** opt: what tensor names begin with. Default `model.decoder`. */
  decoder?: 'model.decoder' | 'decoder';
  /** Keys of config.json to add or replace; `undefined` takes a key out. Biases follow `attention_bias`. */
  config?: Record<string, unknown>;
  /** A directory whose tokenizer files are copied. */
  tokenizerFrom?: string;
}

const TOKENIZER_FILES = [
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'generation_config.json',
];

const ARCHITECTURES: Record<Family, string> = {
  llama: 'LlamaForCausalLM',
  mistral: 'MistralForCausalLM',
  qwen2: 'Qwen2ForCausalLM',
  qwen3: 'Qwen3ForCausalLM',
  mixtral: 'MixtralForCausalLM',
  bamboo: 'BambooForCausalLM',
  turbosparsemixtral: 'TurboSparseMixtralForCausalLM',
  sparsellama: 'SparseLlamaForCausalLM',
  opt: 'OPTForCausalLM',
};

/**
 * Writes a HuggingFace checkpoint with random weights, scaled so that activations stay near 1 and logits near 3. The same
 * options give the same bytes. Creates the directory and returns it.
 */
export function makeCheckpoint(directory: string, options: CheckpointOptions): string {
  const shape = withDefaults(options);
  const config = makeConfig(shape, options);
  mkdirSync(directory, { recursive: true });
  writeFileSync(join(directory, 'config.json'), `${JSON.stringify(config, null, 2)}\n`);
  const weights = new Weights(shape.type, shape.seed);
  if (shape.family === 'opt') addOpt(weights, shape, options.decoder ?? 'model.decoder', config);
  else addGated(weights, shape, options.predictors ?? false, config);
  writeShards(directory, weights.tensors, options.shards ?? 1);
  for (const file of TOKENIZER_FILES) {
    const from = options.tokenizerFrom && join(options.tokenizerFrom, file);
    if (from && existsSync(from)) copyFileSync(from, join(directory, file));
  }
  return directory;
}

type Config = Record<string, unknown>;
type Shape = ReturnType<typeof withDefaults>;

function withDefaults(options: CheckpointOptions) {
  const hidden = options.hidden ?? 96;
  const heads = options.heads ?? 3;
  const relu = ['bamboo', 'turbosparsemixtral', 'opt'].includes(options.family);
  return {
    family: options.family,
    hidden,
    heads,
    layers: options.layers ?? 2,
    kvHeads: options.kvHeads ?? (options.family === 'opt' ? heads : 1),
    headDim: options.headDim ?? hidden / heads,
    neurons: options.neurons ?? 176,
    vocab: options.vocab ?? 131,
    context: options.context ?? 128,
    moe: options.family === 'mixtral' || options.family === 'turbosparsemixtral',
    experts: options.experts ?? 4,
    expertsPerToken: options.expertsPerToken ?? 2,
    hiddenAct: options.hiddenAct ?? (relu ? 'relu' : options.family === 'sparsellama' ? 'fatrelu' : 'silu'),
    tied: options.tied ?? options.family === 'opt',
    type: options.type ?? ('BF16' as NumberType),
    seed: options.seed ?? 1,
    gateRank: options.gateRank,
  };
}

function makeConfig(shape: Shape, options: CheckpointOptions): Config {
  const common = {
    architectures: [ARCHITECTURES[shape.family]],
    model_type: shape.family,
    hidden_size: shape.hidden,
    num_hidden_layers: shape.layers,
    num_attention_heads: shape.heads,
    vocab_size: shape.vocab,
    max_position_embeddings: shape.context,
    tie_word_embeddings: shape.tied,
    bos_token_id: 1,
    eos_token_id: 2,
    torch_dtype: { F32: 'float32', F16: 'float16', BF16: 'bfloat16' }[shape.type],
  };
  const opt = { activation_function: shape.hiddenAct, ffn_dim: shape.neurons, word_embed_proj_dim: shape.hidden };
  const gated = {
    hidden_act: shape.hiddenAct,
    intermediate_size: shape.neurons,
    num_key_value_heads: shape.kvHeads,
    head_dim: shape.headDim === shape.hidden / shape.heads && shape.family !== 'qwen3' ? undefined : shape.headDim,
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    hidden_act_param: shape.hiddenAct === 'fatrelu' ? 0.1 : undefined,
    num_local_experts: shape.moe ? shape.experts : undefined,
    num_experts_per_tok: shape.moe ? shape.expertsPerToken : undefined,
    sliding_window: shape.moe || shape.family === 'mistral' || shape.family === 'bamboo' ? null : undefined,
  };
  return { ...common, ...(shape.family === 'opt' ? opt : gated), ...options.config };
}

/** Makes tensors one after another from one stream of random numbers. */
class Weights {
  readonly tensors: RawTensor[] = [];
  readonly #type: NumberType;
  readonly #random: Random;

  constructor(type: NumberType, seed: number) {
    this.#type = type;
    this.#random = new Random(seed);
  }

  #add(name: string, shape: number[], number: () => number): void {
    const values = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, number);
    this.tensors.push({ name, dtype: this.#type, shape, bytes: encode(values, this.#type) });
  }

  /** [outputs x inputs] of deviation gain / sqrt(inputs): an input near 1 gives an output near `gain`. */
  matrix(name: string, outputs: number, inputs: number, gain = 1): void {
    const deviation = gain / Math.sqrt(inputs);
    this.#add(name, [outputs, inputs], () => deviation * this.#random.normal());
  }

  /** As `matrix`, a product of two that have `rank` in between. */
  thinMatrix(name: string, outputs: number, inputs: number, rank: number): void {
    const normal = () => this.#random.normal();
    const left = Float32Array.from({ length: outputs * rank }, normal);
    const right = Float32Array.from({ length: rank * inputs }, normal);
    let at = 0;
    this.#add(name, [outputs, inputs], () => {
      const row = Math.floor(at / inputs);
      const column = at++ % inputs;
      let sum = 0;
      for (let k = 0; k < rank; k++) sum += left[row * rank + k] * right[k * inputs + column];
      return sum / Math.sqrt(rank * inputs);
    });
  }

  table(name: string, rows: number, columns: number, deviation: number): void {
    this.#add(name, [rows, columns], () => deviation * this.#random.normal());
  }

  norm(name: string, size: number): void {
    this.#add(name, [size], () => 1 + 0.2 * this.#random.normal());
  }

  bias(name: string, size: number): void {
    this.#add(name, [size], () => 0.1 * this.#random.normal());
  }
}

/** Logits are near 3 for an input near 1. */
const HEAD_GAIN = 3;

function addGated(weights: Weights, shape: Shape, predictors: boolean, config: Config): void {
  const { hidden } = shape;
  addEmbedding(weights, 'model.embed_tokens.weight', shape);
  for (let index = 0; index < shape.layers; index++) {
    const layer = `model.layers.${index}`;
    const everyBias = config.attention_bias === true;
    weights.norm(`${layer}.input_layernorm.weight`, hidden);
    addAttention(weights, `${layer}.self_attn`, 'o_proj', shape, everyBias || shape.family === 'qwen2', everyBias);
    if (shape.family === 'qwen3') {
      weights.norm(`${layer}.self_attn.q_norm.weight`, shape.headDim);
      weights.norm(`${layer}.self_attn.k_norm.weight`, shape.headDim);
    }
    weights.norm(`${layer}.post_attention_layernorm.weight`, hidden);
    if (!shape.moe) {
      addFfn(weights, `${layer}.mlp`, ['gate_proj', 'up_proj', 'down_proj'], shape, predictors);
      continue;
    }
    weights.matrix(`${layer}.block_sparse_moe.gate.weight`, shape.experts, hidden);
    for (let expert = 0; expert < shape.experts; expert++) {
      addFfn(weights, `${layer}.block_sparse_moe.experts.${expert}`, ['w1', 'w3', 'w2'], shape, predictors);
    }
  }
  weights.norm('model.norm.weight', hidden);
  if (!shape.tied) weights.matrix('lm_head.weight', shape.vocab, hidden, HEAD_GAIN);
}

function addFfn(weights: Weights, ffn: string, names: string[], shape: Shape, predictors: boolean): void {
  const [gate, up, down] = names;
  for (const matrix of [gate, up]) {
    const name = `${ffn}.${matrix}.weight`;
    if (shape.gateRank === undefined) weights.matrix(name, shape.neurons, shape.hidden);
    else weights.thinMatrix(name, shape.neurons, shape.hidden, shape.gateRank);
  }
  weights.matrix(`${ffn}.${down}.weight`, shape.hidden, shape.neurons);
  if (predictors) {
    weights.matrix(`${ffn}.predictor.fc1.weight`, 8, shape.hidden);
    weights.matrix(`${ffn}.predictor.fc2.weight`, shape.neurons, 8);
  }
}

function addAttention(
  weights: Weights,
  attention: string,
  output: string,
  shape: Shape,
  qkv: boolean,
  o: boolean,
): void {
  const queries = shape.heads * shape.headDim;
  const keys = shape.kvHeads * shape.headDim;
  const sizes: [string, number][] = [
    ['q_proj', queries],
    ['k_proj', keys],
    ['v_proj', keys],
  ];
  for (const [name, size] of sizes) {
    weights.matrix(`${attention}.${name}.weight`, size, shape.hidden);
    if (qkv) weights.bias(`${attention}.${name}.bias`, size);
  }
  weights.matrix(`${attention}.${output}.weight`, shape.hidden, queries);
  if (o) weights.bias(`${attention}.${output}.bias`, shape.hidden);
}

function addOpt(weights: Weights, shape: Shape, decoder: string, config: Config): void {
  const bias = config.enable_bias !== false;
  addEmbedding(weights, `${decoder}.embed_tokens.weight`, shape);
  weights.table(`${decoder}.embed_positions.weight`, shape.context + 2, shape.hidden, 0.5);
  for (let index = 0; index < shape.layers; index++) {
    const layer = `${decoder}.layers.${index}`;
    weights.norm(`${layer}.self_attn_layer_norm.weight`, shape.hidden);
    weights.bias(`${layer}.self_attn_layer_norm.bias`, shape.hidden);
    addAttention(weights, `${layer}.self_attn`, 'out_proj', shape, bias, bias);
    weights.norm(`${layer}.final_layer_norm.weight`, shape.hidden);
    weights.bias(`${layer}.final_layer_norm.bias`, shape.hidden);
    weights.matrix(`${layer}.fc1.weight`, shape.neurons, shape.hidden);
    if (bias) weights.bias(`${layer}.fc1.bias`, shape.neurons);
    weights.matrix(`${layer}.fc2.weight`, shape.hidden, shape.neurons);
    if (bias) weights.bias(`${layer}.fc2.bias`, shape.hidden);
  }
  weights.norm(`${decoder}.final_layer_norm.weight`, shape.hidden);
  weights.bias(`${decoder}.final_layer_norm.bias`, shape.hidden);
  if (!shape.tied) weights.matrix('lm_head.weight', shape.vocab, shape.hidden, HEAD_GAIN);
}

/** A tied embedding is the head as well, so it has the head's scale. */
function addEmbedding(weights: Weights, name: string, shape: Shape): void {
  weights.table(name, shape.vocab, shape.hidden, shape.tied ? HEAD_GAIN / Math.sqrt(shape.hidden) : 1);
}

function writeShards(directory: string, tensors: RawTensor[], shards: number): void {
  if (shards === 1) {
    writeFileSync(join(directory, 'model.safetensors'), safetensors(tensors));
    return;
  }
  const weightMap: Record<string, string> = {};
  for (let shard = 0; shard < shards; shard++) {
    const number = (n: number) => String(n).padStart(5, '0');
    const file = `model-${number(shard + 1)}-of-${number(shards)}.safetensors`;
    const first = Math.floor((shard * tensors.length) / shards);
    const part = tensors.slice(first, Math.floor(((shard + 1) * tensors.length) / shards));
    for (const { name } of part) weightMap[name] = file;
    writeFileSync(join(directory, file), safetensors(part));
  }
  const bytes = tensors.reduce((sum, tensor) => sum + tensor.bytes.length, 0);
  const index = { metadata: { total_size: bytes }, weight_map: weightMap };
  writeFileSync(join(directory, 'model.safetensors.index.json'), JSON.stringify(index, null, 2));
}
