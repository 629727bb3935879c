import { type Activation, type Family, type Hyperparameters, LIMITS } from '../../../src/format/hyperparameters.js';
import type { Config } from '../config.js';
import { readRope } from './rope.js';
import { readWindows, type WindowRule } from './windows.js';

/** What sets one family of gated models apart from another; defaults are those of HuggingFace's config classes. */
export interface GatedFamily {
  /** Activations by `hidden_act`. The family decides what `relu` means: only gate rectified, or both (dReLU). */
  activations: Record<string, Activation>;
  /** `num_key_value_heads` when absent; undefined: as many as heads. */
  kvHeads?: number;
  /** `head_dim` when absent; undefined: hidden_size / heads. */
  headDim?: number;
  epsilon: number;
  theta: number;
  context: number;
  bos: number | null;
  eos: number | null;
  windows: WindowRule;
  /** Biases of attention: none, on q, k and v, or on all four when `attention_bias` says so. */
  attentionBias: 'never' | 'qkv' | 'by attention_bias';
  qkNorm: boolean;
  /** Mixture of experts, with these defaults; undefined: dense. */
  experts?: { count: number; used: number };
}

const SILU_OR_RELU = { silu: 'silu', swish: 'silu', relu: 'relu' } as const;
const DRELU = { relu: 'drelu' } as const;

const llama: GatedFamily = {
  activations: { ...SILU_OR_RELU, fatrelu: 'fatrelu' },
  epsilon: 1e-6,
  theta: 10000,
  context: 2048,
  bos: 1,
  eos: 2,
  windows: { kind: 'none' },
  attentionBias: 'by attention_bias',
  qkNorm: false,
};

const mistral: GatedFamily = {
  ...llama,
  activations: SILU_OR_RELU,
  kvHeads: 8,
  context: 131072,
  windows: { kind: 'all', absent: 4096 },
  attentionBias: 'never',
};

const mixtral: GatedFamily = {
  ...mistral,
  epsilon: 1e-5,
  theta: 1e6,
  windows: { kind: 'all', absent: null },
  experts: { count: 8, used: 2 },
};

const qwen2: GatedFamily = {
  ...llama,
  activations: SILU_OR_RELU,
  kvHeads: 32,
  context: 32768,
  bos: null,
  eos: null,
  windows: { kind: 'upper' },
  attentionBias: 'qkv',
};

/** Every family with RMS norms, rotary positions and a gated FFN. */
export const GATED_FAMILIES: Record<Exclude<Family, 'opt'>, GatedFamily> = {
  llama,
  sparsellama: llama,
  mistral,
  bamboo: { ...mistral, activations: DRELU },
  mixtral,
  turbosparsemixtral: { ...mixtral, activations: DRELU },
  qwen2,
  qwen3: { ...qwen2, headDim: 128, attentionBias: 'by attention_bias', qkNorm: true },
};

/** Hyper-parameters of a gated model from its `config.json`. */
export function readGated(config: Config, name: Exclude<Family, 'opt'>): Omit<Hyperparameters, 'eos_token_ids'> {
  const family = GATED_FAMILIES[name];
  const layerCount = config.size('num_hidden_layers', LIMITS.layers);
  const allBiases = family.attentionBias === 'by attention_bias' && config.boolean('attention_bias', false);
  if (config.boolean('mlp_bias', false)) throw config.unsupported('mlp_bias', 'false');
  return {
    family: name,
    ...readHeads(config, family),
    layer_count: layerCount,
    neuron_count: config.size('intermediate_size', LIMITS.intermediate),
    vocab_size: config.size('vocab_size', LIMITS.vocabulary),
    context_length: config.size('max_position_embeddings', LIMITS.context, family.context),
    norm: { kind: 'rms', epsilon: readEpsilon(config, 'rms_norm_eps', family.epsilon) },
    position: readRope(config, family.theta),
    attention: {
      qkv_bias: allBiases || family.attentionBias === 'qkv',
      output_bias: allBiases,
      qk_norm: family.qkNorm,
      windows: readWindows(config, family.windows, layerCount),
    },
    ffn: { gated: true, ...readActivation(config, family, name), bias: false },
    experts: family.experts ? readExperts(config, family.experts) : null,
    tied_embeddings: config.boolean('tie_word_embeddings', false),
    bos_token_id: config.raw('bos_token_id') === undefined ? family.bos : (config.tokenIds('bos_token_id')[0] ?? null),
  };
}

function readHeads(config: Config, family: GatedFamily) {
  const hiddenSize = config.size('hidden_size', LIMITS.hidden);
  const headCount = config.size('num_attention_heads', LIMITS.heads);
  // null asks for one key-value head per head in every family; only an absent key has the family's default.
  const kvDefault = config.raw('num_key_value_heads') === undefined ? family.kvHeads : undefined;
  const kvHeadCount = config.size('num_key_value_heads', LIMITS.heads, kvDefault ?? headCount);
  if (headCount % kvHeadCount !== 0) {
    throw config.wrong('num_key_value_heads', `a divisor of num_attention_heads ${headCount}`, kvHeadCount);
  }
  const headDefault = family.headDim ?? hiddenSize / headCount;
  if (!config.has('head_dim') && !Number.isInteger(headDefault)) {
    throw config.wrong('hidden_size', `a multiple of num_attention_heads ${headCount}, as there is no head_dim`);
  }
  const headDim = config.size('head_dim', LIMITS.headDim, headDefault);
  if (headDim % 2 !== 0) throw config.wrong('head_dim', 'an even number, as heads are rotated in pairs', headDim);
  return { hidden_size: hiddenSize, head_count: headCount, kv_head_count: kvHeadCount, head_dim: headDim };
}

/** The epsilon of a norm: above 0 and at most 1. */
function readEpsilon(config: Config, key: string, fallback: number): number {
  const epsilon = config.positive(key, fallback);
  if (epsilon > 1) throw config.wrong(key, 'a number above 0, at most 1');
  return epsilon;
}

function readActivation(config: Config, family: GatedFamily, name: Family) {
  const hiddenAct = config.text('hidden_act', 'silu');
  const activation = Object.hasOwn(family.activations, hiddenAct) ? family.activations[hiddenAct] : undefined;
  if (!activation) {
    const supported = `for model_type ${name}: ${Object.keys(family.activations).join(', ')}`;
    if (config.has('hidden_act')) throw config.unsupported('hidden_act', supported);
    throw config.wrong('hidden_act', supported);
  }
  if (activation !== 'fatrelu') return { activation, threshold: 0 };
  const threshold = config.raw('hidden_act_param');
  if (typeof threshold !== 'number' || !Number.isFinite(threshold) || threshold < 0) {
    throw config.wrong('hidden_act_param', 'the threshold of fatrelu, a number from 0 on');
  }
  return { activation, threshold };
}

function readExperts(config: Config, defaults: { count: number; used: number }) {
  const count = config.size('num_local_experts', LIMITS.experts, defaults.count);
  const used = config.size('num_experts_per_tok', LIMITS.experts, defaults.used);
  if (used > count) throw config.wrong('num_experts_per_tok', `at most num_local_experts ${count}`, used);
  return { count, used_per_token: used };
}
