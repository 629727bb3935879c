import { nearestName, Pi2Error } from '../../src/base/error.js';
import { expertCount, type Hyperparameters } from '../../src/format/hyperparameters.js';
import { SKIPPED_POSITIONS } from './families/opt.js';
import type { SourceExpert, SourceLayer, SourceModel, SourceTensor } from './model.js';
import { type HeaderTensor, quoted, WEIGHT_TYPES } from './safetensors.js';

/** A tensor of a header and the file it is in. */
export interface LocatedTensor extends HeaderTensor {
  file: string;
}

/** How many names are searched for the one nearest to a missing one: the search is slow, the hint only a hint. */
const NEAREST_AMONG_MOST = 5000;

/**
 * Finds every tensor that the model needs, checks its shape and type, and refuses what is left over: a bias that nobody
 * reads would give wrong tokens. Throws `E_TENSOR`.
 */
export function findTensors(h: Hyperparameters, tensors: ReadonlyMap<string, LocatedTensor>): SourceModel {
  const claims = new Claims(tensors);
  const model = h.family === 'opt' ? findOpt(h, claims) : findGated(h, claims);
  return { hyperparameters: h, ...model, ignored: claims.refuseRest(ignorable(h)) };
}

type FoundModel = Omit<SourceModel, 'hyperparameters' | 'ignored'>;

function findGated(h: Hyperparameters, claims: Claims): FoundModel {
  return {
    embedding: claims.take('model.embed_tokens.weight', h.vocab_size, h.hidden_size),
    layers: Array.from({ length: h.layer_count }, (_, layer) => findGatedLayer(h, claims, `model.layers.${layer}`)),
    output_norm: claims.take('model.norm.weight', h.hidden_size),
    head: h.tied_embeddings ? undefined : claims.take('lm_head.weight', h.vocab_size, h.hidden_size),
  };
}

function findGatedLayer(h: Hyperparameters, claims: Claims, layer: string): SourceLayer {
  const headBias = (name: string) =>
    h.attention.qk_norm && claims.take(`${layer}.self_attn.${name}.weight`, h.head_dim);
  return {
    attention_norm: claims.take(`${layer}.input_layernorm.weight`, h.hidden_size),
    ...findAttention(h, claims, `${layer}.self_attn`, 'o_proj'),
    q_norm: headBias('q_norm') || undefined,
    k_norm: headBias('k_norm') || undefined,
    ffn_norm: claims.take(`${layer}.post_attention_layernorm.weight`, h.hidden_size),
    router: h.experts
      ? claims.take(`${layer}.block_sparse_moe.gate.weight`, h.experts.count, h.hidden_size)
      : undefined,
    experts: Array.from({ length: expertCount(h) }, (_, expert) =>
      h.experts
        ? findExpert(h, claims, `${layer}.block_sparse_moe.experts.${expert}`, ['w1', 'w3', 'w2'])
        : findExpert(h, claims, `${layer}.mlp`, ['gate_proj', 'up_proj', 'down_proj']),
    ),
  };
}

function findExpert(h: Hyperparameters, claims: Claims, ffn: string, [gate, up, down]: string[]): SourceExpert {
  return {
    gate: claims.take(`${ffn}.${gate}.weight`, h.neuron_count, h.hidden_size),
    up: claims.take(`${ffn}.${up}.weight`, h.neuron_count, h.hidden_size),
    down: claims.take(`${ffn}.${down}.weight`, h.hidden_size, h.neuron_count),
  };
}

function findAttention(h: Hyperparameters, claims: Claims, attention: string, output: string) {
  const queries = h.head_count * h.head_dim;
  const keys = h.kv_head_count * h.head_dim;
  const bias = (has: boolean, name: string, size: number) =>
    has ? claims.take(`${attention}.${name}.bias`, size) : undefined;
  return {
    q: claims.take(`${attention}.q_proj.weight`, queries, h.hidden_size),
    k: claims.take(`${attention}.k_proj.weight`, keys, h.hidden_size),
    v: claims.take(`${attention}.v_proj.weight`, keys, h.hidden_size),
    o: claims.take(`${attention}.${output}.weight`, h.hidden_size, queries),
    q_bias: bias(h.attention.qkv_bias, 'q_proj', queries),
    k_bias: bias(h.attention.qkv_bias, 'k_proj', keys),
    v_bias: bias(h.attention.qkv_bias, 'v_proj', keys),
    o_bias: bias(h.attention.output_bias, output, h.hidden_size),
  };
}

/** OPT was published with names that begin with `model.decoder.` and with names that begin with `decoder.`. */
function findOpt(h: Hyperparameters, claims: Claims): FoundModel {
  const decoder = claims.has('decoder.embed_tokens.weight') ? 'decoder' : 'model.decoder';
  const positions = h.context_length + SKIPPED_POSITIONS;
  return {
    embedding: claims.take(`${decoder}.embed_tokens.weight`, h.vocab_size, h.hidden_size),
    position_embedding: {
      tensor: claims.take(`${decoder}.embed_positions.weight`, positions, h.hidden_size),
      skippedRows: SKIPPED_POSITIONS,
    },
    layers: Array.from({ length: h.layer_count }, (_, layer) => findOptLayer(h, claims, `${decoder}.layers.${layer}`)),
    output_norm: claims.take(`${decoder}.final_layer_norm.weight`, h.hidden_size),
    output_norm_bias: claims.take(`${decoder}.final_layer_norm.bias`, h.hidden_size),
    head: h.tied_embeddings ? undefined : claims.take('lm_head.weight', h.vocab_size, h.hidden_size),
  };
}

function findOptLayer(h: Hyperparameters, claims: Claims, layer: string): SourceLayer {
  return {
    attention_norm: claims.take(`${layer}.self_attn_layer_norm.weight`, h.hidden_size),
    attention_norm_bias: claims.take(`${layer}.self_attn_layer_norm.bias`, h.hidden_size),
    ...findAttention(h, claims, `${layer}.self_attn`, 'out_proj'),
    ffn_norm: claims.take(`${layer}.final_layer_norm.weight`, h.hidden_size),
    ffn_norm_bias: claims.take(`${layer}.final_layer_norm.bias`, h.hidden_size),
    up_bias: h.ffn.bias ? claims.take(`${layer}.fc1.bias`, h.neuron_count) : undefined,
    down_bias: h.ffn.bias ? claims.take(`${layer}.fc2.bias`, h.hidden_size) : undefined,
    experts: [
      {
        up: claims.take(`${layer}.fc1.weight`, h.neuron_count, h.hidden_size),
        down: claims.take(`${layer}.fc2.weight`, h.hidden_size, h.neuron_count),
      },
    ],
  };
}

/** Names of tensors that are known to say nothing new about a model: stored tables, masks, copies, predictors. */
function ignorable(h: Hyperparameters): RegExp[] {
  const patterns: RegExp[] = [];
  if (h.tied_embeddings) patterns.push(/^lm_head\.weight$/);
  if (h.family === 'opt') return [...patterns, /^(model\.)?decoder\.version$/];
  patterns.push(
    /^model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$/,
    /^model\.layers\.\d+\.self_attn\.masked_bias$/,
  );
  // The predictors that TurboSparse models ship guess which neurons fire; without them the FFN is exact.
  if (h.family === 'bamboo') patterns.push(/^model\.layers\.\d+\.mlp\.predictor\./);
  if (h.family === 'turbosparsemixtral') {
    patterns.push(/^model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.predictor\./);
  }
  return patterns;
}

/** The tensors of a checkpoint, each of which may be taken by one part of the model. */
class Claims {
  readonly #tensors: ReadonlyMap<string, LocatedTensor>;
  readonly #taken = new Set<string>();

  constructor(tensors: ReadonlyMap<string, LocatedTensor>) {
    this.#tensors = tensors;
  }

  has(name: string): boolean {
    return this.#tensors.has(name);
  }

  /** Takes a tensor that must be there with exactly this shape. */
  take(name: string, ...shape: number[]): SourceTensor {
    const tensor = this.#tensors.get(name);
    if (!tensor) throw this.#missing(name, shape);
    if (tensor.shape.length !== shape.length || tensor.shape.some((size, i) => size !== shape[i])) {
      throw new Pi2Error(
        'E_TENSOR',
        `${tensor.file}: tensor ${quoted(name)} has shape ${asShape(tensor.shape)}; config.json says ${asShape(shape)}`,
        'config.json and the weights do not belong together: get both from the same checkpoint',
      );
    }
    const type = WEIGHT_TYPES.find((known) => known === tensor.type);
    if (!type) {
      throw new Pi2Error(
        'E_SAFETENSORS',
        `${tensor.file}: tensor ${quoted(name)} has number type ${tensor.type}; weights may be ${WEIGHT_TYPES.join(', ')}`,
        'give the checkpoint as it was trained, not a quantized copy',
      );
    }
    this.#taken.add(name);
    return { name, type, shape: tensor.shape };
  }

  /** Refuses tensors that nobody took, unless one of the patterns knows them; returns the names of those. */
  refuseRest(ignorable: RegExp[]): string[] {
    const rest = [...this.#tensors.keys()].filter((name) => !this.#taken.has(name)).sort();
    const unknown = rest.filter((name) => !ignorable.some((pattern) => pattern.test(name)));
    if (unknown.length === 0) return rest;
    const more = unknown.length > 3 ? ` and ${unknown.length - 3} more` : '';
    throw new Pi2Error(
      'E_TENSOR',
      `${this.#tensors.get(unknown[0])?.file}: no part of the model uses tensor ${unknown.slice(0, 3).map(quoted).join(', ')}${more}`,
      'leaving weights out would give wrong tokens: check model_type, num_hidden_layers and the bias keys of config.json',
    );
  }

  #missing(name: string, shape: number[]): Pi2Error {
    const free = [...this.#tensors.keys()].filter((known) => !this.#taken.has(known)).slice(0, NEAREST_AMONG_MOST);
    const nearest = nearestName(name, free);
    return new Pi2Error(
      'E_TENSOR',
      `the checkpoint has no tensor ${quoted(name)} of shape ${asShape(shape)}${nearest ? `; the nearest name is ${quoted(nearest)}` : ''}`,
      'check that all shards are there and that model_type and num_hidden_layers of config.json are right',
    );
  }
}

function asShape(shape: readonly number[]): string {
  return `[${shape.join(', ')}]`;
}
