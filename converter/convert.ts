import { createHash } from 'node:crypto';
import { availableParallelism } from 'node:os';
import { basename, join, resolve } from 'node:path';
import { ERROR_CODES, Pi2Error } from '../src/base/error.js';
import { peakMemoryBytes } from '../src/base/memory.js';
import { loadAddon } from '../src/engine/addon.js';
import {
  FORMAT_VERSION,
  MANIFEST_FILE,
  NEURONS_FILE,
  type NpuEntry,
  type QuantizationName,
  RESIDENT_FILE,
} from '../src/format/manifest.js';
import { NPU_WEIGHTS_FILE } from '../src/format/npu.js';
import { readTextFile } from '../src/text/text-file.js';
import { type Heat, openHeat, writeHeat } from './activation/heat.js';
import { checkpointDigest, isWeightFile, requireCheckpoint } from './activation/profile.js';
import { profileStatistics } from './activation/statistics.js';
import { Checkpoint } from './checkpoint/checkpoint.js';
import type { TensorSource } from './checkpoint/tensor-source.js';
import { makeNpu, requireInt4, requireWholeBlocks } from './graph/npu.js';
import { packBytes } from './graph/pack.js';
import { choosePredictor, type PredictorChoice, type PredictorMode, type Quality } from './predictor/choice.js';
import { makePredictor } from './predictor/predictor.js';
import { type Recipe, recipeFor } from './quantize/recipe.js';
import { bitsPerWeight, type ConvertResult } from './result.js';
import { checkUnchanged, type SourceState } from './sources.js';
import { conversionOrder, type Plan, planExtents } from './steps/extents.js';
import { divideMemory } from './steps/memory.js';
import { cutPieces, encodedBytes, type Piece } from './steps/pieces.js';
import { inReadingOrder, readingOrder } from './steps/reading-order.js';
import { runPieces, targetBuffers, type Workshop } from './steps/run-pieces.js';
import { SourceHashes } from './steps/source-hashes.js';
import { Journal, type JournalHeader, type Progress } from './write/journal.js';
import { Lock } from './write/lock.js';
import { CONVERTER, makeManifest } from './write/manifest.js';
import { checkOutputName, copySynced, JOURNAL_FILE, Output, OutputFile, writeSynced } from './write/output.js';

export interface ConvertOptions {
  /** Directory of the checkpoint. */
  checkpoint: string;
  /** `NAME.pi2`. Default: the checkpoint's name in the current directory. */
  output?: string;
  quantization: QuantizationName;
  /** Most memory that the process may have resident. */
  maxMemoryBytes: number;
  /** Replace an existing model, once the new one is whole. */
  force: boolean;
  /** File of an activation profile of this checkpoint: the neurons of an expert are sorted by it, hottest first. */
  profile?: string;
  /** A text to make such a profile of, first. Not both. */
  calibration?: string;
  /** Where the predictor comes from, if there is to be one. Default `auto`. */
  predictor?: PredictorMode;
  /** How much perplexity it may cost. Default `1%`. */
  quality?: Quality;
  /** Whether to make graphs and weights for a dense unit, too. q4 only. Default: no. */
  npu?: boolean;
}

/** What a conversion tells while it runs. */
export type ConvertEvent =
  | { type: 'note'; text: string }
  | {
      type: 'progress';
      /** Extent that is made, or what is done to finish. */
      step: string;
      /** Bytes of the checkpoint's weights that are converted, those of an earlier run included. */
      bytesDone: number;
      bytesTotal: number;
      /** Of this run; 0 before anything is converted. */
      bytesPerSecond: number;
      secondsLeft: number | null;
    };

/** Manifest, journal and the last pages of files, beyond what the plan and the text files take. */
const SPARE_DISK_BYTES = 1024 * 1024;
/** Lists of rows and columns that the pieces of a conversion in heat order hold, for each neuron. */
const PLAN_BYTES_PER_NEURON = 16;

/**
 * Converts a HuggingFace checkpoint into a model directory `NAME.pi2` (docs/FORMAT.md). Killed or interrupted at any moment,
 * the same call continues, and the result is byte for byte that of an uninterrupted run. Throws `Pi2Error`: those of
 * `Checkpoint.open` and `calibrate`, `E_PROFILE`, `E_USAGE`, `E_EXISTS`, `E_MEMORY`, `E_DISK_FULL`, `E_NOT_FINITE`, `E_CHANGED`, `E_IO`, and
 * `E_INTERRUPTED` when `signal` is aborted.
 */
export function convert(
  options: ConvertOptions,
  onEvent: (event: ConvertEvent) => void,
  signal: AbortSignal,
): Promise<ConvertResult> {
  return convertFrom(() => Checkpoint.open(options.checkpoint), options, onEvent, signal);
}

/** The same with tensors from any source: `open` is asked for it, and what it gives is closed at the end. */
export async function convertFrom(
  open: () => Promise<TensorSource>,
  options: ConvertOptions,
  onEvent: (event: ConvertEvent) => void,
  signal: AbortSignal,
): Promise<ConvertResult> {
  const path = resolve(options.output ?? `${basename(resolve(options.checkpoint)) || 'model'}.pi2`);
  await checkOutputName(path);
  if (options.npu) requireInt4(options.quantization);
  const output = new Output(path);
  const lock = await Lock.take(output.lockPath);
  try {
    await output.checkFree(options.force);
    const checkpoint = await open();
    try {
      if (options.npu) requireWholeBlocks(checkpoint.model.hyperparameters);
      const { predictor = 'auto', quality = '1%', calibration } = options;
      const choice = choosePredictor(checkpoint, predictor, quality, calibration !== undefined);
      const heat = await openHeat({
        ...options,
        checkpoint,
        output,
        convertPlain: async (plain) => {
          await convertFrom(
            open,
            { ...options, output: plain, force: true, calibration: undefined, predictor: 'none', npu: false },
            onEvent,
            signal,
          );
        },
        note: (text) => onEvent({ type: 'note', text }),
        signal,
      });
      try {
        return await convertCheckpoint(checkpoint, output, options, heat, choice, onEvent, signal);
      } catch (error) {
        // What came of a checkpoint that cannot be used is of no use either.
        if (error instanceof Pi2Error && ERROR_CODES[error.code] === 'badInput') await output.removePartial();
        throw error;
      }
    } finally {
      await checkpoint.close();
    }
  } finally {
    await lock.release();
  }
}

async function convertCheckpoint(
  checkpoint: TensorSource,
  output: Output,
  options: ConvertOptions,
  heat: Heat | null,
  choice: PredictorChoice | null,
  onEvent: (event: ConvertEvent) => void,
  signal: AbortSignal,
): Promise<ConvertResult> {
  const started = performance.now();
  const { model, directory } = checkpoint;
  const recipe = recipeFor(options.quantization, model.hyperparameters.tied_embeddings, options.npu);
  const states = await checkpoint.states();
  const textBytes = sum(
    states.filter((state) => checkpoint.textFiles.includes(state.file)).map((state) => state.bytes),
  );

  const plan = planExtents(model, recipe, heat?.order);
  const orderedNeurons = sum((heat?.order ?? []).map((order) => order.length));
  const usedBytes = process.memoryUsage.rss() + PLAN_BYTES_PER_NEURON * orderedNeurons;
  const leastBytes = packBytes(plan, model.hyperparameters);
  const limits = divideMemory(plan, options.maxMemoryBytes, usedBytes, leastBytes);
  const profileBytes = heat?.bytes.length ?? 0;
  await output.checkSpace(
    plan.residentBytes + plan.neuronsBytes + plan.npuBytes + textBytes + profileBytes + SPARE_DISK_BYTES,
  );
  const { journal, progress } = await openJournal(output, plan, recipe, directory, states, heat, choice, onEvent);
  const resumed = progress.pieces.size + progress.hashes.size > 0;
  let convertedBytes = 0;
  let npu: NpuEntry | null = null;
  try {
    const files: Workshop['files'] = {
      [RESIDENT_FILE]: await OutputFile.open(output.partial(RESIDENT_FILE)),
      [NEURONS_FILE]: await OutputFile.open(output.partial(NEURONS_FILE)),
    };
    try {
      const pieces = readingOrder(plan, checkpoint)
        .flatMap((extent) => cutPieces(extent, progress.pieces.get(extent.name)?.done ?? 0, limits))
        .map((piece) => inReadingOrder(piece, checkpoint));
      const addon = loadAddon();
      const targets = targetBuffers(addon, pieces, leastBytes);
      const hashes = new SourceHashes({ addon, checkpoint, states, progress, journal });
      const meter = new Meter(plan, pieces, onEvent);
      if (resumed) onEvent({ type: 'note', text: `continuing: ${meter.percent} % were converted before` });
      await together(signal, [
        async (stop) => {
          await runPieces(pieces, {
            addon,
            checkpoint,
            files,
            hashes,
            targets,
            journal,
            progress,
            threads: availableParallelism(),
            signal: stop,
            onLoad: (piece, bytes) => meter.count(piece, bytes),
          });
          meter.step('hashing the sources');
          await finishHashes(hashes, checkpoint, states, heat, stop);
        },
      ]);
      convertedBytes = meter.convertedBytes;
      if (options.npu) {
        meter.step('making weights and graphs for a dense unit');
        const shop = { addon, files, targets, journal, progress, threads: availableParallelism() };
        await together(signal, [
          async (stop) => {
            npu = await makeNpu(plan, model.hyperparameters, output, { ...shop, signal: stop });
          },
        ]);
      }
      meter.step('finishing');
      await writeHeat(plan, heat, files[RESIDENT_FILE], output);
      await files[RESIDENT_FILE].requireSize(plan.residentBytes);
      await files[NEURONS_FILE].requireSize(plan.neuronsBytes);
      for (const file of checkpoint.textFiles) await copySynced(join(directory, file), output.partial(file));
      await checkUnchanged(checkpoint, states);
    } finally {
      for (const file of Object.values(files)) await file.close();
    }
  } finally {
    await journal.close();
  }
  const parts = {
    name: checkpoint.name,
    hyperparameters: model.hyperparameters,
    recipe,
    plan,
    progress,
    sources: states.map(({ file, bytes }) => ({ file, bytes, sha256: progress.hashes.get(file) as string })),
    heat,
    npu,
  };
  const made =
    choice &&
    (await makePredictor({
      ...{ checkpoint, output, choice, signal, maxMemoryBytes: options.maxMemoryBytes },
      manifest: makeManifest({ ...parts, predictor: null }),
      order: heat?.order ?? null,
      text: await rereadText(options.calibration as string, heat as Heat),
      threads: availableParallelism(),
      note: (text) => onEvent({ type: 'note', text }),
    }));
  const predictor = made && 'entry' in made ? made : null;
  const manifest = makeManifest({ ...parts, predictor });
  const manifestText = `${JSON.stringify(manifest, null, 1)}\n`;
  await writeSynced(output.partial(MANIFEST_FILE), manifestText);
  if (signal.aborted) throw interrupted();
  if (options.calibration !== undefined) await output.removeCalibration();
  await output.publish();

  const npuBytes = plan.npuBytes + sum((manifest.npu?.graphs ?? []).map((graph) => graph.bytes));
  const seconds = (performance.now() - started) / 1000;
  return {
    output: output.path,
    quantization: manifest.quantization,
    bytes:
      plan.residentBytes +
      plan.neuronsBytes +
      npuBytes +
      (predictor?.bytes ?? 0) +
      textBytes +
      profileBytes +
      Buffer.byteLength(manifestText),
    residentBytes: plan.residentBytes,
    neuronsBytes: plan.neuronsBytes,
    npuBytes,
    bitsPerWeight: bitsPerWeight(plan),
    seconds,
    sourceBytes: convertedBytes,
    sourceBytesPerSecond: convertedBytes / seconds,
    peakMemoryBytes: peakMemoryBytes(),
    ignored: model.ignored.filter((name) => predictor?.entry.source !== 'checkpoint' || !name.includes('.predictor.')),
    hasTokenizer: checkpoint.textFiles.includes('tokenizer.json'),
    resumed,
    profile: heat && profileStatistics(heat.profile),
    predictor: predictor && { ...predictor.entry, bytes: predictor.bytes },
    noPredictor: made && 'reason' in made ? made.reason : null,
  };
}

/** The calibration text again: the profile was made of it. Throws `E_CHANGED` if it is another one now. */
async function rereadText(path: string, heat: Heat): Promise<string> {
  const text = await readTextFile(path);
  const sha256 = createHash('sha256').update(text, 'utf8').digest('hex');
  if (sha256 === heat.profile.texts[0].sha256) return text;
  throw new Pi2Error('E_CHANGED', `${path} has changed while it was converted`, 'run the command again');
}

/** Continues the journal of an earlier run of the same conversion, or empties the partial directory and begins one. */
async function openJournal(
  output: Output,
  plan: Plan,
  recipe: Recipe,
  directory: string,
  sources: SourceState[],
  heat: Heat | null,
  choice: PredictorChoice | null,
  onEvent: (event: ConvertEvent) => void,
): Promise<{ journal: Journal; progress: Progress }> {
  const header: JournalHeader = {
    journal: 1,
    format_version: FORMAT_VERSION,
    converter: CONVERTER,
    recipe: { ...recipe },
    profile: heat?.sha256 ?? null,
    predictor: choice && { source: choice.source, text_sha256: (heat as Heat).profile.texts[0].sha256 },
    checkpoint: resolve(directory),
    sources,
  };
  await output.makePartial();
  const journalPath = output.partial(JOURNAL_FILE);
  const found = await Journal.resume(journalPath, header);
  let reason = found.journal ? null : found.reason;
  if (found.journal) {
    if (await holdsWhatIsRecorded(output, plan, found.progress)) return found;
    await found.journal.close();
    reason = 'its files are shorter than its journal says';
  }
  if (reason) onEvent({ type: 'note', text: `starting over, ${output.partialPath} cannot be continued: ${reason}` });
  await output.clearPartial();
  return {
    journal: await Journal.create(journalPath, header),
    progress: { pieces: new Map(), hashes: new Map() },
  };
}

/** Whether every recorded byte can be there: the journal speaks of this plan, and the files are long enough. */
async function holdsWhatIsRecorded(output: Output, plan: Plan, progress: Progress): Promise<boolean> {
  const sizes = { [RESIDENT_FILE]: 0, [NEURONS_FILE]: 0, [NPU_WEIGHTS_FILE]: 0 };
  for (const file of [RESIDENT_FILE, NEURONS_FILE, NPU_WEIGHTS_FILE] as const) {
    sizes[file] = await output.partialSize(file);
  }
  const extents = new Map([...conversionOrder(plan), ...plan.npu].map((extent) => [extent.name, extent]));
  for (const { extent: name, done } of progress.pieces.values()) {
    const extent = extents.get(name);
    if (!extent || done > extent.bytes || extent.offset + done > sizes[extent.file]) return false;
  }
  return true;
}

/**
 * Hashes what conversion has left, the weights first: once they are known it is known whether the profile is theirs. Throws
 * `E_PROFILE` if it is not.
 */
async function finishHashes(
  hashes: SourceHashes,
  { directory, model }: TensorSource,
  states: SourceState[],
  heat: Heat | null,
  signal: AbortSignal,
): Promise<void> {
  const weights: { file: string; sha256: string }[] = [];
  for (const state of states) {
    if (isWeightFile(state.file)) weights.push({ file: state.file, sha256: await hashes.finish(state, signal) });
  }
  if (heat) {
    const digest = checkpointDigest(model.hyperparameters, weights);
    requireCheckpoint(heat.profile, digest, heat.path, directory);
  }
  for (const state of states) await hashes.finish(state, signal);
}

/** Runs tasks until all are done or one fails, which stops the others; returns when none runs any more. */
async function together(signal: AbortSignal, tasks: ((stop: AbortSignal) => Promise<void>)[]): Promise<void> {
  const failure = new AbortController();
  const stop = AbortSignal.any([signal, failure.signal]);
  await Promise.all(tasks.map((task) => task(stop).catch((error) => failure.abort(error))));
  if (signal.aborted) throw interrupted();
  failure.signal.throwIfAborted();
}

function interrupted(): Pi2Error {
  return new Pi2Error('E_INTERRUPTED', 'stopped before the end', 'the same command continues where this one stopped');
}

/** Counts converted bytes and tells of them. */
class Meter {
  readonly #plan: Plan;
  readonly #before: number;
  readonly #onEvent: (event: ConvertEvent) => void;
  readonly #started = performance.now();
  convertedBytes = 0;

  constructor(plan: Plan, pieces: Piece[], onEvent: (event: ConvertEvent) => void) {
    this.#plan = plan;
    this.#before = plan.sourceBytes - sum(pieces.flatMap((piece) => piece.loads.map(encodedBytes)));
    this.#onEvent = onEvent;
  }

  get percent(): number {
    return Math.floor((100 * (this.#before + this.convertedBytes)) / this.#plan.sourceBytes);
  }

  count(piece: Piece, bytes: number): void {
    this.convertedBytes += bytes;
    this.step(piece.extent.name);
  }

  step(step: string): void {
    const bytesDone = this.#before + this.convertedBytes;
    const bytesPerSecond = (1000 * this.convertedBytes) / (performance.now() - this.#started);
    const left = this.#plan.sourceBytes - bytesDone;
    const secondsLeft = bytesPerSecond > 0 ? left / bytesPerSecond : null;
    this.#onEvent({
      type: 'progress',
      step,
      bytesDone,
      bytesTotal: this.#plan.sourceBytes,
      bytesPerSecond,
      secondsLeft,
    });
  }
}

function sum(numbers: number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}
