import { createHash } from 'node:crypto';
import { lstat, mkdir, readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { formatBytes } from '../../src/base/bytes.js';
import { ERROR_CODES, fileError, Pi2Error } from '../../src/base/error.js';
import { Engine } from '../../src/engine/engine.js';
import { openModelDirectory } from '../../src/format/model-directory.js';
import { readTextFile } from '../../src/text/text-file.js';
import type { SourceModel } from '../checkpoint/model.js';
import type { Plan } from '../steps/extents.js';
import { writeSynced } from '../write/output.js';
import { readProfile, writeProfile } from './profile-file.js';
import { cutText, PROFILE_CONTEXT, profileWindows } from './profiler.js';

const STATE_FILE = 'calibration.json';
const MODEL = 'identity.pi2';
const PROFILE = 'profile.bin';
/** What profiling takes besides weights and KV cache: scratch of the engine, fired bits, the text as tokens. */
const OVERHEAD_BYTES = 96 * 1024 * 1024;
const NOTE_INTERVAL_MS = 10_000;

export interface CalibrationRequest {
  /** A directory of its own beside the output; what an earlier run has left there is used if it is of the same request. */
  directory: string;
  /** The calibration text. */
  textPath: string;
  model: SourceModel;
  plan: Plan;
  maxMemoryBytes: number;
  /** All that the model is made of besides the text; another one makes what is in the directory useless. */
  state: object;
  /** Makes the model in the order of the checkpoint. */
  convertPlain: (output: string) => Promise<void>;
  note: (text: string) => void;
  signal: AbortSignal;
}

/**
 * Profiles a checkpoint that is not converted yet: makes the model in the order of the checkpoint, runs it over a text, and
 * removes it. Resolves with the path of the profile. Killed at any moment, the same call continues, and the profile is the
 * same: the engine's sums depend neither on threads nor on time. Throws `E_MEMORY` with the ceiling that would do when the
 * model does not fit under the given one, `E_TEXT`, `E_EXISTS`, `E_INTERRUPTED`, and what converting throws.
 */
export async function calibrate(request: CalibrationRequest): Promise<string> {
  const { directory, textPath } = request;
  const context = Math.min(PROFILE_CONTEXT, request.model.hyperparameters.context_length);
  requireCeiling(request, context);
  const text = await readTextFile(textPath);
  const textHash = createHash('sha256').update(text, 'utf8').digest('hex');
  await openDirectory(directory, `${JSON.stringify({ ...request.state, text_sha256: textHash, context })}\n`);
  try {
    return await profileText(request, text, context);
  } catch (error) {
    // What came of a checkpoint or text that cannot be used is of no use either.
    const isBad = error instanceof Pi2Error && ERROR_CODES[error.code] === 'badInput';
    if (isBad) await rm(directory, { recursive: true, force: true });
    throw error;
  }
}

/** Does in the directory what is not done yet. */
async function profileText(request: CalibrationRequest, text: string, context: number): Promise<string> {
  const { directory, textPath } = request;
  const profilePath = join(directory, PROFILE);
  const modelPath = join(directory, MODEL);
  if (!(await isThere(profilePath))) {
    if (!(await isThere(modelPath))) {
      request.note('calibration: converting in the order of the checkpoint first');
      await request.convertPlain(modelPath);
    }
    const model = await openModelDirectory(modelPath);
    const calibration = await cutText(model, text, context, 0);
    const engine = await Engine.open(model, { context, threads: 0 });
    try {
      const total = calibration.windows.reduce((sum, window) => sum + window.length, 0);
      request.note(`calibration: counting which neurons fire on ${total} tokens of ${textPath}`);
      let noted = performance.now();
      const profile = await profileWindows(model, engine, calibration, async ({ tokens }) => {
        if (performance.now() - noted > NOTE_INTERVAL_MS) {
          noted = performance.now();
          request.note(`calibration: ${tokens} of ${total} tokens`);
        }
        if (!request.signal.aborted) return true;
        throw new Pi2Error('E_INTERRUPTED', 'stopped while profiling', 'the same command begins the profile again');
      });
      await writeProfile(profilePath, profile);
    } finally {
      await engine.close();
    }
  }
  await readProfile(profilePath);
  await rm(modelPath, { recursive: true, force: true });
  return profilePath;
}

/** The engine holds the whole model. */
function requireCeiling({ plan, model, maxMemoryBytes }: CalibrationRequest, context: number): void {
  const h = model.hyperparameters;
  const kvBytes = context * h.layer_count * 2 * h.kv_head_count * h.head_dim * 2;
  const needed = plan.residentBytes + plan.neuronsBytes + kvBytes + process.memoryUsage.rss() + OVERHEAD_BYTES;
  if (needed <= maxMemoryBytes) return;
  throw new Pi2Error(
    'E_MEMORY',
    `calibration runs the model in memory, which takes ${formatBytes(needed)}; the ceiling is ${formatBytes(maxMemoryBytes)}`,
    `give --max-ram ${Math.ceil(needed / 2 ** 20)}M, or make a profile elsewhere and give --profile FILE`,
  );
}

/** Makes the directory, or takes over one of the same request; one of another request is emptied, anything else refused. */
async function openDirectory(directory: string, state: string): Promise<void> {
  const statePath = join(directory, STATE_FILE);
  try {
    await mkdir(directory).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error;
    });
    const files = await readdir(directory);
    if (files.length > 0 && !files.includes(STATE_FILE)) {
      throw new Pi2Error(
        'E_EXISTS',
        `${directory} exists and is not of a calibration`,
        'remove it, or give another -o',
      );
    }
    if (files.length > 0 && (await readFile(statePath, 'utf8')) === state) return;
    // The state goes last: a directory without it would be refused.
    for (const file of files.filter((name) => name !== STATE_FILE))
      await rm(join(directory, file), { recursive: true });
    await writeSynced(statePath, state);
  } catch (error) {
    throw fileError(error, 'make', directory);
  }
}

function isThere(path: string): Promise<boolean> {
  return lstat(path).then(
    () => true,
    () => false,
  );
}
