import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Pi2Error } from '../src/base/error.js';
import { MANIFEST_FILE, PREDICTOR_FILE, type QuantizationName } from '../src/format/manifest.js';
import { generateCheckpoint } from './generate.js';
import type { Shape } from './shapes.js';
import { addSparsePredictor, profileRandomTokens } from './sparse-model.js';

/** Where the program is. */
export const PACKAGE_ROOT = packageRoot();
/** Synthetic checkpoints and models. */
export const CACHE = join(PACKAGE_ROOT, 'bench', 'cache');
const DEMO = join(PACKAGE_ROOT, 'demo', 'stories-drelu');
const SEED = 1;

/** Where `--save` puts results. */
export const RESULTS = join(PACKAGE_ROOT, 'bench', 'results');

/** What the `convert` command said about a conversion. */
export interface Conversion {
  seconds: number;
  sourceBytes: number;
  peakMemoryBytes: number;
}

export interface PreparedModel {
  /** The model directory. */
  path: string;
  /** Seconds to make the synthetic checkpoint; null when it was there. */
  generationSeconds: number | null;
  /** Null when the model was there. */
  conversion: Conversion | null;
}

/** The model of a synthetic checkpoint, both made if they are not in the cache. */
export async function prepareSynthetic(
  shape: Shape,
  quantization: QuantizationName,
  log: (line: string) => void,
): Promise<PreparedModel> {
  const checkpoint = join(CACHE, `synthetic-${shape.name}`);
  log(`synthetic checkpoint ${checkpoint}`);
  const start = performance.now();
  const made = await generateCheckpoint(shape, SEED, checkpoint);
  const generationSeconds = made ? (performance.now() - start) / 1000 : null;
  const name = `synthetic-${shape.name}`;
  const plain = await prepareModel(checkpoint, name, quantization, made, log);
  if (shape.activation !== 'drelu') return { generationSeconds, ...plain };
  const profile = join(CACHE, `${name}-${quantization}.profile`);
  const path = join(CACHE, `${name}-${quantization}-sparse.pi2`);
  if (plain.conversion !== null || !existsSync(join(path, PREDICTOR_FILE))) {
    log(`profiling ${plain.path} on random tokens`);
    await profileRandomTokens(plain.path, profile, SEED);
    log(`converting to ${path}, in heat order`);
    await runConvert(checkpoint, path, quantization, '--profile', profile);
    log(`adding the predictors of ${checkpoint}`);
    await addSparsePredictor(path, checkpoint, shape);
  }
  return { generationSeconds, path, conversion: plain.conversion };
}

/** The model of the trained checkpoint that the demo uses. */
export async function prepareDemo(quantization: QuantizationName, log: (line: string) => void): Promise<PreparedModel> {
  return { generationSeconds: null, ...(await prepareModel(DEMO, 'stories-drelu', quantization, false, log)) };
}

/** Removes checkpoints and models. */
export async function clearCache(): Promise<void> {
  await rm(CACHE, { recursive: true, force: true });
}

async function prepareModel(
  checkpoint: string,
  name: string,
  quantization: QuantizationName,
  isNew: boolean,
  log: (line: string) => void,
): Promise<Pick<PreparedModel, 'path' | 'conversion'>> {
  const path = join(CACHE, `${name}-${quantization}.pi2`);
  if (!isNew && existsSync(join(path, MANIFEST_FILE))) return { path, conversion: null };
  await mkdir(CACHE, { recursive: true });
  log(`converting to ${path}`);
  return { path, conversion: await runConvert(checkpoint, path, quantization) };
}

/** Runs `powerinfer2 convert` as users do, in a process of its own: its peak memory is the conversion's alone. */
async function runConvert(
  checkpoint: string,
  output: string,
  quantization: QuantizationName,
  ...options: string[]
): Promise<Conversion> {
  const program = join(PACKAGE_ROOT, 'bin', 'powerinfer2.js');
  const args = [program, 'convert', checkpoint, '-o', output, '--quant', quantization, '--force', '--json', ...options];
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  let text = '';
  child.stdout.setEncoding('utf8').on('data', (piece: string) => {
    text += piece;
  });
  const status = await new Promise((resolve, reject) => child.on('error', reject).on('close', resolve));
  if (status !== 0) throw new Pi2Error('E_IO', `the conversion of ${checkpoint} failed`, 'its message is above');
  const result = JSON.parse(text.trimEnd().split('\n').at(-1) as string);
  return {
    seconds: result.seconds,
    sourceBytes: result.source_bytes,
    peakMemoryBytes: result.peak_memory_bytes,
  };
}

function packageRoot(): string {
  let folder = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(folder, 'package.json'))) folder = dirname(folder);
  return folder;
}
