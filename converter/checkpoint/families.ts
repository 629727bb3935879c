import { Pi2Error } from '../../src/base/error.js';
import {
  FAMILIES,
  type Family,
  type Hyperparameters,
  hyperparametersSchema,
} from '../../src/format/hyperparameters.js';
import type { Config } from './config.js';
import { GATED_FAMILIES, readGated } from './families/gated.js';
import { readOpt } from './families/opt.js';
import { quoted } from './safetensors.js';

/**
 * Hyper-parameters of a checkpoint from `config.json`, and `generation_config.json` if there is one (for its end tokens).
 * Throws `E_CONFIG` for a value that cannot be, `E_UNSUPPORTED` for a model that cannot be converted.
 */
export function readHyperparameters(config: Config, generation: Config | null): Hyperparameters {
  const family = readFamily(config);
  refuseForeignKeys(config);
  const hyperparameters = {
    ...(family === 'opt' ? readOpt(config) : readGated(config, family)),
    eos_token_ids: readEndTokens(config, generation, family === 'opt' ? 2 : GATED_FAMILIES[family].eos),
  };
  const vocabSize = hyperparameters.vocab_size;
  if (hyperparameters.bos_token_id !== null && hyperparameters.bos_token_id >= vocabSize) {
    throw config.wrong('bos_token_id', `less than vocab_size ${vocabSize}`, hyperparameters.bos_token_id);
  }
  const checked = hyperparametersSchema.safeParse(hyperparameters);
  if (checked.success) return checked.data;
  const { path, message } = checked.error.issues[0];
  throw new Pi2Error('E_CONFIG', `${config.file}: ${path.join('.')} cannot be: ${message}`, undefined);
}

/** What can be converted, in one line for messages: each model_type with its activations. */
export function supportedFamilies(): string {
  return FAMILIES.map((family) => {
    const activations = family === 'opt' ? ['relu'] : Object.keys(GATED_FAMILIES[family].activations);
    return `${family} (${activations.join(', ')})`;
  }).join(', ');
}

function readFamily(config: Config): Family {
  const name = config.raw('model_type');
  if (name === undefined) throw config.wrong('model_type', `one of ${FAMILIES.join(', ')}`);
  const family = FAMILIES.find((known) => known === name);
  if (family) return family;
  throw new Pi2Error(
    'E_UNSUPPORTED',
    `${config.file}: model_type ${quoted(name)} is not supported`,
    `supported: ${supportedFamilies()}`,
  );
}

/**
 * Keys that change what a model computes in ways nobody here computes, with the values that mean "as usual".
 * They belong to other families or to patched code; a checkpoint that has one is better refused than run wrong.
 */
const FOREIGN_KEYS: Record<string, readonly unknown[]> = {
  quantization_config: [],
  compression_config: [],
  partial_rotary_factor: [1],
  rotary_pct: [1],
  rotary_percent: [1],
  rope_interleaved: [false],
  no_rope_layers: [],
  no_rope_layer_interval: [],
  alibi: [false],
  clip_qkv: [],
  qk_clip: [false],
  qk_layernorm: [false],
  use_qk_norm: [false],
  use_mrope: [false],
  attn_logit_softcapping: [],
  final_logit_softcapping: [],
  query_pre_attn_scalar: [],
  scale_attn_weights: [true],
  scale_attn_by_inverse_layer_idx: [false],
  attention_multiplier: [],
  attention_chunk_size: [],
  embedding_multiplier: [1],
  residual_multiplier: [1],
  logits_scaling: [1],
  logit_scale: [1],
  scale_emb: [1],
  scale_depth: [],
  dim_model_base: [],
  use_parallel_residual: [false],
  parallel_attn: [false],
  add_cross_attention: [false],
  is_encoder_decoder: [false],
  n_shared_experts: [0],
  shared_expert_intermediate_size: [0],
};

function refuseForeignKeys(config: Config): void {
  for (const [key, harmless] of Object.entries(FOREIGN_KEYS)) {
    if (!config.has(key) || harmless.includes(config.raw(key))) continue;
    if (key === 'quantization_config') {
      throw new Pi2Error(
        'E_UNSUPPORTED',
        `${config.file}: the checkpoint is already quantized (${key} ${quoted(config.raw(key))})`,
        'give the original checkpoint in F32, F16 or BF16: converting quantizes it',
      );
    }
    const usual = harmless.length > 0 ? quoted(harmless[0]) : 'a model without it';
    throw config.unsupported(key, usual);
  }
}

/** End tokens of both files together, those of config.json first. The family's default counts when neither names one. */
function readEndTokens(config: Config, generation: Config | null, fallback: number | null): number[] {
  const ids = new Set([...config.tokenIds('eos_token_id'), ...(generation?.tokenIds('eos_token_id') ?? [])]);
  if (ids.size === 0 && config.raw('eos_token_id') === undefined && fallback !== null) ids.add(fallback);
  return [...ids];
}
