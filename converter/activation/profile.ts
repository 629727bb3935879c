import { createHash } from 'node:crypto';
import { Pi2Error } from '../../src/base/error.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import { BATCH_SIZES_MOST, layerNeurons, type ProfileShape, profileShape } from '../../src/format/profile-header.js';

/** Counts are stored as u32. */
export const TOKENS_MAX = 0xffffffff;

/**
 * How often neurons fired on calibration text, in the order of the checkpoint; FORMAT.md section 5. A batch of b is b
 * consecutive tokens of one window; a window of n tokens has n - b + 1 of them.
 */
export interface ActivationProfile {
  shape: ProfileShape;
  /** Hex digest of the checkpoint that was profiled; see `checkpointDigest`. */
  checkpoint: string;
  /** sha256 of each calibration text and the tokens counted of it, ascending by sha256. */
  texts: { sha256: string; tokens: number }[];
  /** `batches[b - 1]`: batches of b tokens that were counted. `batches[0]` is the number of tokens. */
  batches: number[];
  /** [layers]: neurons that fired, summed over all tokens that have a predecessor in their window. */
  following: number[];
  /** [layers]: those of them that had fired for the predecessor as well. */
  shared: number[];
  /** [layers x experts]: tokens that were routed to the expert. */
  routed: Uint32Array;
  /** [layers x batch sizes x experts x neurons]: batches for which the neuron fired at least once. */
  fired: Uint32Array;
}

/** The counts [experts x neurons] of a layer for batches of `batch` tokens. */
export function layerCounts(profile: ActivationProfile, layer: number, batch = 1): Uint32Array {
  const count = layerNeurons(profile.shape);
  const start = (layer * BATCH_SIZES_MOST + batch - 1) * count;
  return profile.fired.subarray(start, start + count);
}

/** A profile that has counted nothing. */
export function emptyProfile(shape: ProfileShape, checkpoint: string): ActivationProfile {
  const { layers, experts } = shape;
  return {
    shape,
    checkpoint,
    texts: [],
    batches: Array(BATCH_SIZES_MOST).fill(0),
    following: Array(layers).fill(0),
    shared: Array(layers).fill(0),
    routed: new Uint32Array(layers * experts),
    fired: new Uint32Array(layers * BATCH_SIZES_MOST * layerNeurons(shape)),
  };
}

/**
 * What ties a profile to a checkpoint: sha256 over shape, activation and the sha256 of the weight files, by name. How the
 * model is quantized and in which order its neurons lie has no say.
 */
export function checkpointDigest(h: Hyperparameters, sources: readonly { file: string; sha256: string }[]): string {
  const { layers, experts, neurons } = profileShape(h);
  const weights = sources.filter(({ file }) => isWeightFile(file)).sort((a, b) => (a.file < b.file ? -1 : 1));
  const lines = [
    `layers ${layers} experts ${experts} neurons ${neurons}`,
    `activation ${h.ffn.activation} threshold ${h.ffn.threshold}`,
    ...weights.map(({ sha256 }) => sha256),
  ];
  return createHash('sha256')
    .update(`${lines.join('\n')}\n`)
    .digest('hex');
}

/** Whether a source holds weights: only those have a say in `checkpointDigest`. */
export function isWeightFile(file: string): boolean {
  return file.endsWith('.safetensors');
}

/** Refuses a profile of another shape; `where` names the profile, `model` what it is wanted for. Throws `E_PROFILE`. */
export function requireShape(profile: ActivationProfile, shape: ProfileShape, where: string, model: string): void {
  if (describeShape(profile.shape) === describeShape(shape)) return;
  throw new Pi2Error(
    'E_PROFILE',
    `${where} is the profile of a model with ${describeShape(profile.shape)}; ${model} has ${describeShape(shape)}`,
    'make one with: powerinfer2 profile -m NAME.pi2 -f TEXT',
  );
}

/** Refuses a profile of another checkpoint, even of the same shape. Throws `E_PROFILE`. */
export function requireCheckpoint(profile: ActivationProfile, digest: string, where: string, model: string): void {
  if (profile.checkpoint === digest) return;
  throw new Pi2Error(
    'E_PROFILE',
    `${where} is the profile of another checkpoint than ${model}: its weights have other checksums`,
    'make one with: powerinfer2 profile -m NAME.pi2 -f TEXT',
  );
}

/**
 * One profile out of several of the same checkpoint, as if one run had read all their texts. The order of `profiles` has no
 * say in the result. `names` are for errors. Throws `E_PROFILE`.
 */
export function mergeProfiles(profiles: readonly ActivationProfile[], names: readonly string[]): ActivationProfile {
  const [first] = profiles;
  const merged = emptyProfile(first.shape, first.checkpoint);
  for (const [i, profile] of profiles.entries()) {
    requireShape(profile, first.shape, names[i], names[0]);
    requireCheckpoint(profile, first.checkpoint, names[i], names[0]);
    addTo(merged.batches, profile.batches);
    if (merged.batches[0] > TOKENS_MAX) {
      throw new Pi2Error('E_PROFILE', `together they count ${merged.batches[0]} tokens, more than ${TOKENS_MAX}`);
    }
    addTo(merged.following, profile.following);
    addTo(merged.shared, profile.shared);
    addTo(merged.routed, profile.routed);
    addTo(merged.fired, profile.fired);
    merged.texts = mergeTexts([...merged.texts, ...profile.texts]);
  }
  return merged;
}

/** One entry for each text, ascending by sha256; tokens of the same text are added up. */
function mergeTexts(texts: ActivationProfile['texts']): ActivationProfile['texts'] {
  const tokens = new Map<string, number>();
  for (const text of texts) tokens.set(text.sha256, (tokens.get(text.sha256) ?? 0) + text.tokens);
  return [...tokens]
    .map(([sha256, count]) => ({ sha256, tokens: count }))
    .sort((a, b) => (a.sha256 < b.sha256 ? -1 : 1));
}

function addTo(sums: number[] | Uint32Array, numbers: ArrayLike<number>): void {
  for (let i = 0; i < sums.length; i++) sums[i] += numbers[i];
}

function describeShape({ layers, experts, neurons }: ProfileShape): string {
  return `${layers} layers of ${experts > 1 ? `${experts} experts of ` : ''}${neurons} neurons`;
}
