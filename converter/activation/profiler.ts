import { createHash } from 'node:crypto';
import { Pi2Error } from '../../src/base/error.js';
import type { Engine } from '../../src/engine/engine.js';
import { readHeatOrder } from '../../src/format/heat-order.js';
import type { ModelDirectory } from '../../src/format/model-directory.js';
import { profileShape } from '../../src/format/profile-header.js';
import { TextTokenizer } from '../../src/text/tokenizer.js';
import { FiringCounter } from './counter.js';
import { type ActivationProfile, checkpointDigest } from './profile.js';

/** Tokens of a window where nothing else is asked for; a model with a shorter context takes its own. */
export const PROFILE_CONTEXT = 512;

/** Memory for what fired in one step. */
const FIRED_BYTES_MAX = 16 * 1024 * 1024;

/** A text as the profiler reads it. */
export interface ProfileText {
  /** Of its UTF-8 bytes. */
  sha256: string;
  windows: number[][];
}

/**
 * Tokenizes a text and cuts it into windows of at most `contextLength` tokens, BOS included, one behind the other without
 * overlap; the last may be shorter. `chunks` takes the first so many; 0 is all. Throws `E_TOKENIZER`, and `E_TEXT` for a text
 * without tokens.
 */
export async function cutText(
  model: ModelDirectory,
  text: string,
  contextLength: number,
  chunks: number,
): Promise<ProfileText> {
  const tokenizer = await TextTokenizer.open(model.tokenizerPaths);
  const tokens = tokenizer.encodePlain(text);
  const { vocab_size } = model.manifest.hyperparameters;
  const unknown = tokens.find((id) => id >= vocab_size);
  if (unknown !== undefined) {
    throw new Pi2Error('E_TOKENIZER', `the tokenizer has a token ${unknown}, the model a vocabulary of ${vocab_size}`);
  }
  const bos = tokenizer.bosTokenId === null ? [] : [tokenizer.bosTokenId];
  const length = contextLength - bos.length;
  if (length < 1) throw new Pi2Error('E_USAGE', `a window of ${contextLength} has no room for a token`, 'give -c 2');
  const windows: number[][] = [];
  for (let start = 0; start < tokens.length && (chunks === 0 || windows.length < chunks); start += length) {
    windows.push([...bos, ...tokens.slice(start, start + length)]);
  }
  if (windows.length === 0) throw new Pi2Error('E_TEXT', 'the text has no tokens to profile', 'give a longer text');
  return { sha256: createHash('sha256').update(text, 'utf8').digest('hex'), windows };
}

/** What can be asked of a profiling run while it runs. */
export interface ProfileRun {
  /** Tokens counted so far. */
  readonly tokens: number;
  profile(): ActivationProfile;
}

/**
 * Runs windows through an engine and counts which neurons fire, exactly. `onStep` hears of every step: what it returns is
 * waited for, and false ends the run early. Resolves with the profile of all that was counted.
 */
export async function profileWindows(
  model: ModelDirectory,
  engine: Engine,
  text: ProfileText,
  onStep: (run: ProfileRun) => Promise<boolean>,
): Promise<ActivationProfile> {
  const { hyperparameters: h, provenance } = model.manifest;
  const shape = profileShape(h);
  const orders: (Uint32Array | null)[] = [];
  for (let layer = 0; layer < shape.layers; layer++) orders.push(await readHeatOrder(model, layer));
  const counter = new FiringCounter(shape, checkpointDigest(h, provenance.sources), orders);
  const { firedBytesPerToken, routedBytesPerToken } = engine;
  const most = Math.max(1, Math.min(engine.batchSize, Math.floor(FIRED_BYTES_MAX / firedBytesPerToken)));
  const record = {
    fired: new Uint8Array(most * firedBytesPerToken),
    routed: new Uint8Array(most * routedBytesPerToken),
  };
  const logits = new Float32Array(engine.vocabSize);
  const run: ProfileRun = {
    get tokens() {
      return counter.tokens;
    },
    profile: () => counter.profile(text.sha256),
  };
  for (const window of text.windows) {
    counter.beginWindow();
    for (let position = 0; position < window.length; position += most) {
      const tokens = Int32Array.from(window.slice(position, position + most));
      await engine.step(tokens, position, logits, { exact: true, ...record });
      for (let t = 0; t < tokens.length; t++) {
        counter.add(
          record.fired.subarray(t * firedBytesPerToken, (t + 1) * firedBytesPerToken),
          record.routed.subarray(t * routedBytesPerToken, (t + 1) * routedBytesPerToken),
        );
      }
      if (!(await onStep(run))) return run.profile();
    }
  }
  return run.profile();
}
