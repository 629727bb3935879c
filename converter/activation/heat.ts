import { createHash } from 'node:crypto';
import { resolve } from 'node:path';
import { Pi2Error } from '../../src/base/error.js';
import { roundUpToPage } from '../../src/format/layout.js';
import { FORMAT_VERSION, PROFILE_FILE, type QuantizationName } from '../../src/format/manifest.js';
import { profileShape } from '../../src/format/profile-header.js';
import type { TensorSource } from '../checkpoint/tensor-source.js';
import { recipeFor } from '../quantize/recipe.js';
import { type HeatOrderExtent, type Plan, planExtents } from '../steps/extents.js';
import { CONVERTER } from '../write/manifest.js';
import { type Output, type OutputFile, writeSynced } from '../write/output.js';
import { calibrate } from './calibrate.js';
import { type HeatOrder, heatOrder } from './heat-order.js';
import { type ActivationProfile, requireShape } from './profile.js';
import { decodeProfile, readProfileBytes } from './profile-file.js';

/** What the heat order of a conversion is made of. */
export interface Heat {
  profile: ActivationProfile;
  order: HeatOrder;
  /** The profile's file, and what it holds. */
  path: string;
  bytes: Buffer;
  sha256: string;
}

/** A heat order as it is stored. */
export function orderBytes({ order }: HeatOrderExtent): Uint8Array {
  return new Uint8Array(order.buffer, order.byteOffset, order.byteLength);
}

/** Where a conversion gets its heat order from. */
export interface HeatRequest {
  checkpoint: TensorSource;
  output: Output;
  quantization: QuantizationName;
  maxMemoryBytes: number;
  /** File of a profile, or a text to make one of; neither for the order of the checkpoint. */
  profile?: string;
  calibration?: string;
  /** Makes the model in the order of the checkpoint, for calibration. */
  convertPlain: (output: string) => Promise<void>;
  note: (text: string) => void;
  signal: AbortSignal;
}

/**
 * The heat order that is asked for, from a profile that is there or is made now; null for the order of the checkpoint. Whether
 * the profile is of these very weights is not known before they are hashed: see `requireCheckpoint`. Throws `E_PROFILE`, and
 * what `calibrate` throws.
 */
export async function openHeat(request: HeatRequest): Promise<Heat | null> {
  const { checkpoint, profile: given, calibration } = request;
  const path = given ?? (calibration === undefined ? null : await makeProfile(request, calibration));
  if (path === null) return null;
  const bytes = await readProfileBytes(path);
  const profile = decodeProfile(bytes, path);
  requireShape(profile, profileShape(checkpoint.model.hyperparameters), path, checkpoint.directory);
  return { profile, order: heatOrder(profile), bytes, path, sha256: createHash('sha256').update(bytes).digest('hex') };
}

/** Profiles the checkpoint on a text. Resolves with the path of the profile. */
async function makeProfile(request: HeatRequest, textPath: string): Promise<string> {
  const { checkpoint, output, quantization, maxMemoryBytes, convertPlain, note, signal } = request;
  const { model, directory, textFiles } = checkpoint;
  if (!textFiles.includes('tokenizer.json')) {
    throw new Pi2Error(
      'E_TOKENIZER',
      `${directory} has no tokenizer.json, so no text can be read for calibration`,
      'copy it from the original checkpoint, or convert without --calibration',
    );
  }
  const recipe = recipeFor(quantization, model.hyperparameters.tied_embeddings);
  const state = {
    converter: CONVERTER,
    format_version: FORMAT_VERSION,
    recipe,
    checkpoint: resolve(directory),
    sources: await checkpoint.states(),
  };
  const plan = planExtents(model, recipe);
  const own = output.calibrationPath;
  return calibrate({ directory: own, textPath, model, plan, maxMemoryBytes, state, convertPlain, note, signal });
}

/** Writes what heat order adds to a model: the order of each layer, and the profile it was made of. */
export async function writeHeat(plan: Plan, heat: Heat | null, resident: OutputFile, output: Output): Promise<void> {
  if (!heat) return;
  for (const extent of plan.resident) {
    if (extent.kind === 'heat_order') await resident.write(paddedOrder(extent), extent.offset);
  }
  await resident.sync();
  await writeSynced(output.partial(PROFILE_FILE), heat.bytes);
}

/** A heat order with the zeros that fill its last page. */
function paddedOrder(extent: HeatOrderExtent): Uint8Array {
  const page = new Uint8Array(roundUpToPage(extent.bytes));
  page.set(orderBytes(extent));
  return page;
}
