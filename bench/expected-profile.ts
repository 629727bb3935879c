import { createHash } from 'node:crypto';
import type { ActivationProfile } from '../converter/activation/profile.js';
import { checkpointDigest, emptyProfile, isWeightFile, layerCounts } from '../converter/activation/profile.js';
import { BATCH_SIZES_MOST, profileShape } from '../src/format/profile-header.js';
import type { SparseStream } from './sparse-stream.js';
import type { SyntheticCheckpoint } from './synthetic-checkpoint.js';
import { bankOf } from './tensors.js';

/** As if so many tokens had been counted: the order of neurons that no sampling has blurred, as millions of tokens give it. */
const TOKENS = 2 ** 20;

/**
 * The profile of a synthetic sparse checkpoint on a very long text, computed from its weights: how often each neuron must fire.
 * What it fires when it is run is measured afterwards, see `reachedStatistics`. Neighbours are taken to be of one topic.
 */
export async function expectedProfile(
  checkpoint: SyntheticCheckpoint,
  signal: AbortSignal,
): Promise<ActivationProfile> {
  const { shape, model } = checkpoint;
  const stream = checkpoint.stream as SparseStream;
  const { layers, experts, neurons } = profileShape(model.hyperparameters);
  const sources = [];
  for (const { file } of await checkpoint.states()) {
    if (isWeightFile(file)) sources.push({ file, sha256: await checkpoint.hash({ file }, signal) });
  }
  const profile = emptyProfile({ layers, experts, neurons }, checkpointDigest(model.hyperparameters, sources));
  const text = createHash('sha256').update(`expected: ${checkpoint.mark}`).digest('hex');
  profile.texts = [{ sha256: text, tokens: TOKENS }];
  profile.batches = profile.batches.map((_, i) => TOKENS - i);
  const used = (shape.expertsPerToken ?? 1) / experts;
  profile.routed.fill(Math.round(used * TOKENS));
  for (let layer = 0; layer < layers; layer++) {
    const counts = profile.batches.map((_, i) => layerCounts(profile, layer, i + 1));
    for (let expert = 0; expert < experts; expert++) {
      const bank = bankOf(shape, layer, expert);
      for (let row = 0; row < neurons; row++) {
        const rates = stream.ratesByTopic(bank, row);
        const sums = new Float64Array(BATCH_SIZES_MOST);
        let shared = 0;
        for (const rate of rates) {
          let rests = 1;
          for (let b = 0; b < BATCH_SIZES_MOST; b++) {
            rests *= 1 - used * rate;
            sums[b] += 1 - rests;
          }
          shared += (used * rate) ** 2;
        }
        for (let b = 0; b < BATCH_SIZES_MOST; b++) {
          counts[b][expert * neurons + row] = Math.round((sums[b] / rates.length) * profile.batches[b]);
        }
        profile.shared[layer] += (shared / rates.length) * TOKENS;
        profile.following[layer] += (sums[0] / rates.length) * TOKENS;
      }
    }
    profile.shared[layer] = Math.round(profile.shared[layer]);
    profile.following[layer] = Math.round(profile.following[layer]);
    // Others have their turn between layers.
    await new Promise(setImmediate);
    signal.throwIfAborted();
  }
  return profile;
}
