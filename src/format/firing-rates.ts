import { createHash } from 'node:crypto';
import { type FileHandle, open } from 'node:fs/promises';
import { fileError, Pi2Error } from '../base/error.js';
import type { ModelDirectory } from './model-directory.js';
import {
  BATCH_SIZES_MOST,
  damagedProfile,
  decodeProfileHeader,
  HEADER_BYTES,
  layerNeurons,
  type ProfileLayout,
  profileLayout,
  profileShape,
} from './profile-header.js';

/** Bytes of the file in memory at once, beside the table of one layer. */
const PIECE_BYTES = 1 << 20;

/** How often neurons fire, for each bank: an expert of a layer, layer by layer. */
export interface FiringRates {
  /** Share of all tokens that are routed to the bank; 1 for a dense FFN. */
  routed: Float64Array;
  /** For each bank, the share of all tokens that its neurons fire for, in heat order: falling. */
  rates: Float32Array[];
  /**
   * For batches of 1, 2, … tokens, the share of them in which the neuron at a place of the heat order fires, in the mean over
   * banks: as far as it was asked for.
   */
  batchShares?: Float64Array[];
}

/**
 * The firing rates in the profile of a model; null when its neurons are in the order of the checkpoint. Of the file no more is
 * in memory than one table of counts of a layer. `batchSizes`: batches of up to so many tokens are read. Throws `Pi2Error`: E_MODEL when the file is not the one that the manifest
 * speaks of, or is no profile of such a model; E_IO.
 */
export async function readFiringRates(model: ModelDirectory, batchSizes = 1): Promise<FiringRates | null> {
  const { profilePath } = model;
  if (profilePath === null) return null;
  try {
    const file = await open(profilePath, 'r');
    try {
      return await readRates(file, model, profilePath, batchSizes);
    } finally {
      await file.close();
    }
  } catch (error) {
    if (!(error instanceof Pi2Error)) throw fileError(error, 'read', profilePath);
    if (error.code !== 'E_PROFILE') throw error;
    const hint = 'copy the directory again, or convert the checkpoint again';
    throw new Pi2Error('E_MODEL', error.message, hint, { cause: error });
  }
}

async function readRates(
  file: FileHandle,
  model: ModelDirectory,
  where: string,
  batchSizes: number,
): Promise<FiringRates> {
  const { heat_order, hyperparameters } = model.manifest;
  if (heat_order === 'identity') throw new Error('a model in the order of its checkpoint has no rates');
  const hash = createHash('sha256');
  const piece = Buffer.alloc(PIECE_BYTES);
  let at = 0;
  /** The next bytes of the file, into `target`. */
  const take = async <Target extends Uint8Array>(target: Target): Promise<Target> => {
    for (let done = 0; done < target.length; ) {
      const { bytesRead } = await file.read(target, done, target.length - done, at + done);
      if (bytesRead === 0) throw damagedProfile(where, `it ends at byte ${at + done}`);
      done += bytesRead;
    }
    hash.update(target);
    at += target.length;
    return target;
  };
  const passTo = async (offset: number) => {
    while (at < offset) await take(piece.subarray(0, Math.min(piece.length, offset - at)));
  };

  const shape = profileShape(hyperparameters);
  const { size } = await file.stat();
  const header = decodeProfileHeader(await take(Buffer.alloc(Math.min(HEADER_BYTES, size))), size, where);
  const [tokens] = header.batches;
  const { layers, experts, neurons } = header.shape;
  const isOfModel = layers === shape.layers && experts === shape.experts && neurons === shape.neurons;
  if (!isOfModel || tokens !== heat_order.tokens) throw damagedProfile(where, 'it is not the profile of this model');
  const layout: ProfileLayout = profileLayout(shape, header.texts);
  await passTo(layout.routed);
  const routed = new Uint32Array(layers * experts);
  await take(new Uint8Array(routed.buffer));
  const counts = new Uint32Array(layerNeurons(shape));
  const rates: Float32Array[] = [];
  const batchShares = Array.from({ length: batchSizes }, () => new Float64Array(neurons));
  for (let layer = 0; layer < layers; layer++) {
    for (const [b, shares] of batchShares.entries()) {
      const batches = header.batches[b];
      await passTo(layout.fired + (layer * BATCH_SIZES_MOST + b) * counts.byteLength);
      await take(new Uint8Array(counts.buffer));
      for (let expert = 0; expert < experts; expert++) {
        // The order of bundles is that of the counts of single tokens: sorted, they are in heat order. What fires for more of
        // them fires in more batches, so that larger batches sorted by themselves are nearly in it.
        const rising = counts.subarray(expert * neurons, (expert + 1) * neurons).sort();
        if (rising[neurons - 1] > batches) throw damagedProfile(where, 'a neuron fired more often than it could');
        const falling = new Float32Array(neurons);
        for (let i = 0; i < neurons; i++) falling[i] = rising[neurons - 1 - i] / (batches || 1);
        for (let i = 0; i < neurons; i++) shares[i] += falling[i] / (layers * experts);
        if (b === 0) rates.push(falling);
      }
    }
  }
  await passTo(layout.bytes);
  if (hash.digest('hex') !== heat_order.profile_sha256) {
    throw damagedProfile(where, 'its sha256 is not the one in the manifest');
  }
  if (routed.some((count) => count > tokens)) {
    throw damagedProfile(where, 'an expert was used by more tokens than there were');
  }
  return { routed: Float64Array.from(routed, (count) => count / tokens), rates, batchShares };
}
