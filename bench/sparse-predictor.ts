import { rename, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { encodeLayer } from '../converter/predictor/encode.js';
import { readPredictor } from '../converter/predictor/from-checkpoint.js';
import { PREDICTOR_ENCODINGS } from '../converter/predictor/layers.js';
import { OutputFile } from '../converter/write/output.js';
import { loadAddon } from '../src/engine/addon.js';
import { readHeatOrder } from '../src/format/heat-order.js';
import { roundUpToPage } from '../src/format/layout.js';
import { MANIFEST_FILE, type Manifest, type OperatingPoint, PREDICTOR_FILE } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import type { SparseStream } from './sparse-stream.js';
import type { SyntheticCheckpoint } from './synthetic-checkpoint.js';

const KEPT_SHARES = [0, 0.25, 0.5, 0.75, 1];
/**
 * Of the neurons that fire and are on flash, so many are fetched as trained models need within 1 % of perplexity with half of
 * the neurons in memory; PREDICTORS.md. Neurons in memory are computed where the gate's features say that it fires.
 */
const FETCHED_PER_FIRED = 1;

/**
 * Gives a model in heat order the predictors of its synthetic checkpoint, with thresholds by the statistics it was made with:
 * there is no text to judge perplexity on, so the manifest says 1 everywhere. The predictors of one layer are in memory at a time.
 */
export async function addSparsePredictor(modelPath: string, checkpoint: SyntheticCheckpoint): Promise<void> {
  const model = await openModelDirectory(modelPath);
  const { manifest } = model;
  const addon = loadAddon();
  const stream = checkpoint.stream as SparseStream;
  const thresholds: number[][] = [];
  let offset = 0;
  const file = await OutputFile.create(join(modelPath, PREDICTOR_FILE));
  try {
    for (const [layer, sources] of (checkpoint.predictors() ?? []).entries()) {
      const order = (await readHeatOrder(model, layer)) as Uint32Array;
      const size = order.length / sources.length;
      const orders = sources.map((_, expert) => order.subarray(expert * size, (expert + 1) * size));
      const numbers = [];
      for (const [expert, source] of sources.entries()) {
        numbers.push(await readPredictor(addon, checkpoint, source, orders[expert], source.rank));
      }
      const { bytes, tensors } = await encodeLayer(addon, layer, numbers, PREDICTOR_ENCODINGS, 2);
      const padded = new Uint8Array(roundUpToPage(bytes.length));
      padded.set(bytes);
      await file.write(padded, offset);
      const checksum = crc32(bytes).toString(16).padStart(8, '0');
      const place = { file: PREDICTOR_FILE, offset, bytes: bytes.length } as const;
      manifest.extents.push({ name: tensors[0].extent, ...place, crc32: checksum });
      manifest.tensors.push(...tensors);
      offset += padded.length;
      thresholds.push(KEPT_SHARES.map((kept) => stream.flashThreshold(layer, orders, kept, FETCHED_PER_FIRED)));
    }
    await file.sync();
  } finally {
    await file.close();
  }
  manifest.predictor = predictorEntry(manifest, thresholds, stream);
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
