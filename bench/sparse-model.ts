/** What a synthetic sparse model needs besides its weights: a profile of its own, and the predictors that it brings. */
import { createHash } from 'node:crypto';
import { rename, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { writeProfile } from '../converter/activation/profile-file.js';
import { profileWindows } from '../converter/activation/profiler.js';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { encodeLayer } from '../converter/predictor/encode.js';
import { readPredictor } from '../converter/predictor/from-checkpoint.js';
import { PREDICTOR_ENCODINGS } from '../converter/predictor/layers.js';
import { loadAddon } from '../src/engine/addon.js';
import { Engine } from '../src/engine/engine.js';
import { seededRandom } from '../src/engine/random.js';
import { readHeatOrder } from '../src/format/heat-order.js';
import { roundUpToPage } from '../src/format/layout.js';
import { MANIFEST_FILE, type Manifest, type OperatingPoint, PREDICTOR_FILE } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import type { Shape } from './shapes.js';
import { SparseStream } from './sparse-stream.js';

/** Random tokens that firing rates are counted on. */
const WINDOWS = 8;
const WINDOW_TOKENS = 256;
const KEPT_SHARES = [0, 0.25, 0.5, 0.75, 1];
/**
 * Of the neurons that fire and are on flash, so many are fetched as trained models need within 1 % of perplexity with half of
 * the neurons in memory; PREDICTORS.md. Neurons in memory are computed where the gate's features say that it fires.
 */
const FETCHED_PER_FIRED = 1;

/** Profiles a model on random tokens; writes the profile to `path`. */
export async function profileRandomTokens(modelPath: string, path: string, seed: number): Promise<void> {
  const model = await openModelDirectory(modelPath);
  const random = seededRandom(seed);
  const windows = Array.from({ length: WINDOWS }, () =>
    Array.from({ length: WINDOW_TOKENS }, () => Math.floor(random() * model.manifest.hyperparameters.vocab_size)),
  );
  const engine = await Engine.open(model, { context: WINDOW_TOKENS, threads: 0, exact: true });
  try {
    const sha256 = createHash('sha256').update(JSON.stringify(windows)).digest('hex');
    await writeProfile(path, await profileWindows(model, engine, { sha256, windows }, async () => true));
  } finally {
    await engine.close();
  }
}

/**
 * Gives a model the predictors of its synthetic checkpoint, with thresholds by the statistics it was made with: there is no
 * text to judge perplexity on, so the manifest says 1 everywhere.
 */
export async function addSparsePredictor(modelPath: string, checkpointPath: string, shape: Shape): Promise<void> {
  const model = await openModelDirectory(modelPath);
  const { manifest } = model;
  const addon = loadAddon();
  const checkpoint = await Checkpoint.open(checkpointPath);
  const stream = new SparseStream(shape, () => new Uint16Array());
  const pieces: Uint8Array[] = [];
  const thresholds: number[][] = [];
  let offset = 0;
  try {
    for (const [layer, [source]] of (checkpoint.predictors() ?? []).entries()) {
      const order = await readHeatOrder(model, layer);
      const numbers = await readPredictor(addon, checkpoint, source, order, source.rank);
      const { bytes, tensors } = await encodeLayer(addon, layer, [numbers], PREDICTOR_ENCODINGS, 2);
      const padded = new Uint8Array(roundUpToPage(bytes.length));
      padded.set(bytes);
      pieces.push(padded);
      const checksum = crc32(bytes).toString(16).padStart(8, '0');
      manifest.extents.push({
        name: tensors[0].extent,
        file: PREDICTOR_FILE,
        offset,
        bytes: bytes.length,
        crc32: checksum,
      });
      manifest.tensors.push(...tensors);
      offset += padded.length;
      const neurons = order ?? Uint32Array.from({ length: shape.neuronCount }, (_, i) => i);
      thresholds.push(KEPT_SHARES.map((kept) => stream.flashThreshold(layer, neurons, kept, FETCHED_PER_FIRED)));
    }
  } finally {
    await checkpoint.close();
  }
  manifest.predictor = predictorEntry(manifest, thresholds, stream);
  await writeFile(join(modelPath, PREDICTOR_FILE), Buffer.concat(pieces));
  const next = join(modelPath, `${MANIFEST_FILE}.next`);
  await writeFile(next, `${JSON.stringify(manifest, null, 1)}\n`);
  await rename(next, join(modelPath, MANIFEST_FILE));
}

function predictorEntry(manifest: Manifest, thresholds: number[][], stream: SparseStream): Manifest['predictor'] {
  const layers = manifest.hyperparameters.layer_count;
  const points = KEPT_SHARES.map((kept_share, i): OperatingPoint => {
    const flash_thresholds = thresholds.map((ofLayer) => ofLayer[i]);
    const memory_thresholds = new Array<number>(layers).fill(0);
    return {
      kept_share,
      memory_thresholds,
      flash_thresholds,
      computed_share: 0,
      fetched_share: 0,
      magnitude_share: 0,
      perplexity: 1,
    };
  });
  return {
    ...{ source: 'checkpoint', input: 'residual', ...PREDICTOR_ENCODINGS },
    ranks: new Array<number>(layers).fill(stream.rank),
    quality: { budget: 0.01, text_sha256: '0'.repeat(64), tokens: 1, exact_perplexity: 1 },
    points,
    curve: [],
  };
}
