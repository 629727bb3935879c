import { type Hyperparameters, LIMITS } from '../../../src/format/hyperparameters.js';
import type { Config } from '../config.js';

/** PyTorch's LayerNorm default, which OPT uses and its config does not mention. */
const LAYER_NORM_EPSILON = 1e-5;

/** Rows of OPT's position table that stand before position 0 (a leftover of padding in fairseq). */
export const SKIPPED_POSITIONS = 2;

/** Hyper-parameters of an OPT model from its `config.json`: learned positions, LayerNorm, relu(up) without a gate. */
export function readOpt(config: Config): Omit<Hyperparameters, 'eos_token_ids'> {
  const hiddenSize = config.size(config.has('d_model') ? 'd_model' : 'hidden_size', LIMITS.hidden);
  const headCount = config.size('num_attention_heads', LIMITS.heads);
  const layerCount = config.size('num_hidden_layers', LIMITS.layers);
  if (hiddenSize % headCount !== 0) {
    throw config.wrong('hidden_size', `a multiple of num_attention_heads ${headCount}`, hiddenSize);
  }
  if (hiddenSize / headCount > LIMITS.headDim) {
    throw config.wrong(
      'hidden_size',
      `at most ${LIMITS.headDim} for each of num_attention_heads ${headCount}`,
      hiddenSize,
    );
  }
  if (config.text('activation_function', 'relu') !== 'relu') {
    throw config.unsupported('activation_function', 'for model_type opt: relu');
  }
  if (!config.boolean('do_layer_norm_before', true)) throw config.unsupported('do_layer_norm_before', 'true');
  if (config.boolean('_remove_final_layer_norm', false)) throw config.unsupported('_remove_final_layer_norm', 'false');
  if (!config.boolean('layer_norm_elementwise_affine', true)) {
    throw config.unsupported('layer_norm_elementwise_affine', 'true');
  }
  if (config.size('word_embed_proj_dim', LIMITS.hidden, hiddenSize) !== hiddenSize) {
    throw config.unsupported('word_embed_proj_dim', `${hiddenSize}, as hidden_size`);
  }
  const bias = config.boolean('enable_bias', true);
  return {
    family: 'opt',
    hidden_size: hiddenSize,
    layer_count: layerCount,
    head_count: headCount,
    kv_head_count: headCount,
    head_dim: hiddenSize / headCount,
    neuron_count: config.size('ffn_dim', LIMITS.intermediate),
    vocab_size: config.size('vocab_size', LIMITS.vocabulary),
    context_length: config.size('max_position_embeddings', LIMITS.context, 2048),
    norm: { kind: 'layer', epsilon: LAYER_NORM_EPSILON },
    position: { kind: 'learned' },
    attention: { qkv_bias: bias, output_bias: bias, qk_norm: false, windows: new Array(layerCount).fill(0) },
    ffn: { gated: false, activation: 'relu', threshold: 0, bias },
    experts: null,
    tied_embeddings: config.boolean('tie_word_embeddings', true),
    bos_token_id: config.raw('bos_token_id') === undefined ? 2 : (config.tokenIds('bos_token_id')[0] ?? null),
  };
}
