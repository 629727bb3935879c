import { z } from 'zod';

/** Families of checkpoints that can be converted, by `model_type`. Frozen: these names are on disk. */
export const FAMILIES = [
  'llama',
  'mistral',
  'qwen2',
  'qwen3',
  'mixtral',
  'bamboo',
  'turbosparsemixtral',
  'sparsellama',
  'opt',
] as const;
export type Family = (typeof FAMILIES)[number];

/**
 * What makes a neuron fire and what it then contributes (architecture: "they decide correctness").
 * g and u are the products of the input with the neuron's gate and up rows. Frozen: these names are on disk.
 *
 * | name    | activation                                                  | fires when      |
 * | silu    | silu(g) * u                                                  | always          |
 * | relu    | relu(g) * u (ReGLU); without a gate: relu(u)                 | g > 0; u > 0    |
 * | drelu   | relu(g) * relu(u)                                            | g > 0 and u > 0 |
 * | fatrelu | (g if g >= threshold else 0) * u                             | g >= threshold  |
 */
export const ACTIVATIONS = ['silu', 'relu', 'drelu', 'fatrelu'] as const;
export type Activation = (typeof ACTIVATIONS)[number];

const size = (most: number) => z.number().int().min(1).max(most);
const finite = z.number().refine(Number.isFinite);

/** Limits that no model we know comes near; beyond them a number is a lie, not a model. */
export const LIMITS = {
  hidden: 65536,
  layers: 1024,
  heads: 1024,
  headDim: 1024,
  intermediate: 1 << 20,
  vocabulary: 1 << 22,
  context: 1 << 24,
  experts: 1024,
} as const;

export const ropeScalingSchema = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.literal('linear'), factor: finite.positive() }),
  z.strictObject({
    kind: z.literal('llama3'),
    factor: finite.positive(),
    low_freq_factor: finite.positive(),
    high_freq_factor: finite.positive(),
    original_context_length: size(LIMITS.context),
  }),
]);

/** Shape and semantics of a model, one schema for all families. Stored in the manifest. */
export const hyperparametersSchema = z.strictObject({
  family: z.enum(FAMILIES),
  hidden_size: size(LIMITS.hidden),
  layer_count: size(LIMITS.layers),
  head_count: size(LIMITS.heads),
  kv_head_count: size(LIMITS.heads),
  head_dim: size(LIMITS.headDim),
  /** Neurons of one FFN (of one expert, in a MoE). */
  neuron_count: size(LIMITS.intermediate),
  vocab_size: size(LIMITS.vocabulary),
  context_length: size(LIMITS.context),
  norm: z.strictObject({ kind: z.enum(['rms', 'layer']), epsilon: finite.positive().max(1) }),
  position: z.discriminatedUnion('kind', [
    z.strictObject({ kind: z.literal('rope'), theta: finite.positive(), scaling: ropeScalingSchema.nullable() }),
    z.strictObject({ kind: z.literal('learned') }),
  ]),
  attention: z.strictObject({
    qkv_bias: z.boolean(),
    output_bias: z.boolean(),
    /** RMS norms of each head's query and key, before the rotary embedding (qwen3). */
    qk_norm: z.boolean(),
    /** For each layer, how many positions back a token sees (itself included); 0 is all of them. */
    windows: z.array(z.number().int().min(0).max(LIMITS.context)),
  }),
  ffn: z.strictObject({
    gated: z.boolean(),
    activation: z.enum(ACTIVATIONS),
    /** fatrelu only, else 0. */
    threshold: finite,
    bias: z.boolean(),
  }),
  /** Null for a dense FFN. Router: softmax over the chosen experts' logits (mixtral). */
  experts: z.strictObject({ count: size(LIMITS.experts), used_per_token: size(LIMITS.experts) }).nullable(),
  tied_embeddings: z.boolean(),
  bos_token_id: z.number().int().min(0).nullable(),
  eos_token_ids: z.array(z.number().int().min(0)),
});

export type Hyperparameters = z.infer<typeof hyperparametersSchema>;

/** Number of experts of a layer; a dense FFN counts as one expert. */
export function expertCount(h: Hyperparameters): number {
  return h.experts?.count ?? 1;
}
