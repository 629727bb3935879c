import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readFile, rm, statfs, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { writeProfile } from '../converter/activation/profile-file.js';
import { convertFrom } from '../converter/convert.js';
import { predictorBytes } from '../converter/predictor/encode.js';
import { PREDICTOR_ENCODINGS } from '../converter/predictor/layers.js';
import { recipeFor } from '../converter/quantize/recipe.js';
import { planExtents } from '../converter/steps/extents.js';
import { formatBytes } from '../src/base/bytes.js';
import { Pi2Error } from '../src/base/error.js';
import { MANIFEST_FILE, type QuantizationName } from '../src/format/manifest.js';
import type { Setting } from './activation-settings.js';
import { expectedProfile } from './expected-profile.js';
import { generateCheckpoint } from './generate.js';
import { describeReached, reachedStatistics } from './reached.js';
import type { Shape } from './shapes.js';
import { addSparsePredictor } from './sparse-predictor.js';
import { SyntheticCheckpoint } from './synthetic-checkpoint.js';

/** Where the program is. */
export const PACKAGE_ROOT = packageRoot();
/** Synthetic checkpoints and models. */
export const CACHE = join(PACKAGE_ROOT, 'bench', 'cache');
const DEMO = join(PACKAGE_ROOT, 'demo', 'stories-drelu');
const SEED = 1;
/** What making a model may take, beyond its predictors of a layer. */
const MEMORY_BYTES = 1024 ** 3;
/** Disk that is left to others. */
const SPARE_BYTES = 2 * 1024 ** 3;

/** Where `--save` puts results. */
export const RESULTS = join(PACKAGE_ROOT, 'bench', 'results');

/** What the `convert` command said about a conversion. */
export interface Conversion {
  seconds: number;
  sourceBytes: number;
  peakMemoryBytes: number;
}

/** Which synthetic model is wanted. */
export interface ModelRequest {
  shape: Shape;
  /** How neurons of a sparse shape fire; not given: as published. */
  setting?: Setting;
  quantization: QuantizationName;
  /** With what a dense unit needs: `convert --npu`. Default: without. */
  withGraphs?: boolean;
  /** Write the checkpoint to disk and convert it with the program, so that conversion is measured. */
  withCheckpoint: boolean;
  /** Allows large shapes. */
  isLargeAllowed: boolean;
}

export interface PreparedModel {
  /** The model directory. */
  path: string;
  /** Files and directories that were made now. */
  made: string[];
  /** Seconds to make the synthetic checkpoint; null when there was no need to. */
  generationSeconds: number | null;
  /** Null when the model was there, or was made without a checkpoint. */
  conversion: Conversion | null;
}

/**
 * A synthetic model in `directory`, made if it is not there: straight from the source of its tensors, or through a checkpoint on
 * disk, with the same bytes. A sparse one is in heat order, has predictors, and what it fires is measured and stored beside it as
 * NAME.statistics.json. Throws `Pi2Error`, of which `E_USAGE` for a large shape that is not allowed, `E_DISK_FULL`.
 */
export async function prepareSynthetic(
  request: ModelRequest,
  log: (line: string) => void,
  directory = CACHE,
): Promise<PreparedModel> {
  const { shape, quantization, withCheckpoint, withGraphs = false } = request;
  const setting = settingOf(request);
  const suffix = setting === null ? '' : `-${setting}`;
  const checkpoint = new SyntheticCheckpoint(
    { shape, setting, seed: SEED },
    join(directory, `synthetic-${shape.name}${suffix}`),
  );
  const graphs = withGraphs ? '-npu' : '';
  const name = join(directory, `synthetic-${shape.name}-${quantization}${suffix}${graphs}`);
  const path = `${name}.pi2`;
  const statisticsPath = `${name}.statistics.json`;
  if (await isThere(path, setting === null ? null : statisticsPath, checkpoint)) {
    return { path, made: [], generationSeconds: null, conversion: null };
  }
  await mkdir(directory, { recursive: true });
  await requireRoom(request, checkpoint, directory);
  const made = [path];
  const { signal } = new AbortController();
  const profile = setting === null ? null : `${name}.profile`;
  if (profile !== null) {
    log(`expecting firing rates of ${checkpoint.name}`);
    await writeProfile(profile, await expectedProfile(checkpoint, signal));
  }
  let generationSeconds = null;
  let conversion = null;
  if (withCheckpoint) {
    log(`writing the checkpoint ${checkpoint.directory}`);
    const start = performance.now();
    if (await generateCheckpoint(checkpoint)) generationSeconds = (performance.now() - start) / 1000;
    made.push(checkpoint.directory);
    log(`converting it to ${path}`);
    conversion = await runConvert(checkpoint.directory, path, quantization, profile, withGraphs);
  } else {
    log(`making ${path}`);
    const options = { checkpoint: checkpoint.directory, output: path, quantization, npu: withGraphs, force: true };
    const limits = { maxMemoryBytes: MEMORY_BYTES, predictor: 'none' as const };
    const order = profile === null ? {} : { profile };
    await convertFrom(
      async () => checkpoint,
      { ...options, ...limits, ...order },
      () => {},
      signal,
    );
  }
  if (profile !== null) {
    await rm(profile);
    log('adding predictors');
    await addSparsePredictor(path, checkpoint);
    log('measuring what fires');
    const reached = await reachedStatistics(path, checkpoint, SEED);
    await writeFile(statisticsPath, `${JSON.stringify(reached, null, 1)}\n`);
    made.push(statisticsPath);
    log(describeReached(reached));
  }
  return { path, made, generationSeconds, conversion };
}

/** How neurons of the wanted model fire; null when all of them do. */
function settingOf({ shape, setting }: ModelRequest): Setting | null {
  if (shape.activation === 'drelu') return setting ?? 'published';
  if (setting === undefined) return null;
  throw new Pi2Error('E_USAGE', `--statistics ${setting}: all neurons of ${shape.name} fire`, 'leave it out');
}

/**
 * Refuses what does not fit: large shapes that are not asked for as such (`E_USAGE`), and anything that leaves no room on the
 * disk of `directory` (`E_DISK_FULL`).
 */
export async function requireRoom(
  { shape, quantization, withCheckpoint, withGraphs, isLargeAllowed }: ModelRequest,
  checkpoint: SyntheticCheckpoint,
  directory: string,
  free: (directory: string) => Promise<number> = freeBytes,
): Promise<void> {
  const { model } = checkpoint;
  const plan = planExtents(model, recipeFor(quantization, model.hyperparameters.tied_embeddings, withGraphs));
  const { layerCount, hiddenSize, neuronCount, expertCount = 1 } = shape;
  const rank = checkpoint.stream?.rank ?? 0;
  const predictors = layerCount * expertCount * predictorBytes({ hiddenSize, neuronCount, rank }, PREDICTOR_ENCODINGS);
  const bytes =
    plan.residentBytes +
    plan.neuronsBytes +
    plan.npuBytes +
    (rank > 0 ? predictors : 0) +
    (withCheckpoint ? checkpoint.totalBytes : 0);
  const needed = `${shape.name} takes ${formatBytes(bytes)} (${bytes} bytes) of disk in ${directory}`;
  if (shape.isLarge && !isLargeAllowed) throw new Pi2Error('E_USAGE', needed, 'give --large if that is wanted');
  const available = await free(directory);
  if (bytes + SPARE_BYTES <= available) return;
  throw new Pi2Error(
    'E_DISK_FULL',
    `${needed}, and a reserve of ${formatBytes(SPARE_BYTES)}; ${formatBytes(available)} are available`,
    'free some space, or take a smaller shape',
  );
}

async function freeBytes(directory: string): Promise<number> {
  const { bavail, bsize } = await statfs(directory);
  return bavail * bsize;
}

/** Whether a model is there that was made of this checkpoint; of a model without statistics, whether it is there. */
async function isThere(path: string, statisticsPath: string | null, { mark }: SyntheticCheckpoint): Promise<boolean> {
  if (!existsSync(join(path, MANIFEST_FILE))) return false;
  if (statisticsPath === null) return true;
  const text = await readFile(statisticsPath, 'utf8').catch(() => '{}');
  return JSON.parse(text).made_of === mark;
}

/** The model of the trained checkpoint that the demo uses. */
export async function prepareDemo(quantization: QuantizationName, log: (line: string) => void): Promise<PreparedModel> {
  const path = join(CACHE, `stories-drelu-${quantization}.pi2`);
  if (existsSync(join(path, MANIFEST_FILE))) return { path, made: [], generationSeconds: null, conversion: null };
  await mkdir(CACHE, { recursive: true });
  log(`converting to ${path}`);
  const conversion = await runConvert(DEMO, path, quantization, null, false);
  return { path, made: [path], generationSeconds: null, conversion };
}

/** Runs `powerinfer2 convert` as users do, in a process of its own: its peak memory is the conversion's alone. */
async function runConvert(
  checkpoint: string,
  output: string,
  quantization: QuantizationName,
  profile: string | null,
  withGraphs: boolean,
): Promise<Conversion> {
  const program = join(PACKAGE_ROOT, 'bin', 'powerinfer2.js');
  const order = profile === null ? [] : ['--profile', profile];
  const graphs = withGraphs ? ['--npu'] : [];
  const wanted = ['-o', output, '--quant', quantization, ...order, ...graphs];
  const args = [program, 'convert', checkpoint, ...wanted, '--force', '--json'];
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
