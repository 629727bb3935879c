import type { StepEngine } from './engine.js';
import { noLogits } from './sampler.js';

/** Memory for logits of several positions at once. */
const LOGITS_BYTES_MAX = 16 * 1024 * 1024;

/**
 * Computes the logits of every position of one sequence, from an empty cache on, in pieces of bounded memory. `receive` gets the
 * rows of positions `first`, `first + 1`, …, vocab_size numbers each; they are overwritten when it is done.
 */
export async function evaluateSequence(
  engine: StepEngine,
  tokens: readonly number[],
  receive: (rows: Float32Array, first: number) => void | Promise<void>,
): Promise<void> {
  const rowsMost = Math.floor(LOGITS_BYTES_MAX / (4 * engine.vocabSize));
  const pieceLength = Math.max(1, Math.min(engine.batchSize, rowsMost, tokens.length));
  const logits = new Float32Array(pieceLength * engine.vocabSize);
  for (let first = 0; first < tokens.length; first += pieceLength) {
    const piece = Int32Array.from(tokens.slice(first, first + pieceLength));
    const rows = logits.subarray(0, piece.length * engine.vocabSize);
    await engine.step(piece, first, rows, { all: true });
    await receive(rows, first);
  }
}

/** -log of the probability of `target` under the softmax of `logits`, in double precision. */
export function negativeLogLikelihood(logits: Float32Array, target: number): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < logits.length; i++) if (logits[i] > largest) largest = logits[i];
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i] - largest);
  const nll = largest + Math.log(sum) - logits[target];
  if (!Number.isFinite(nll)) throw noLogits();
  return nll;
}

/** A piece of a text whose tokens are predicted from one another. */
export interface Window {
  /** What the model reads. */
  inputs: number[];
  /** `targets[i]` follows `inputs[i]`. */
  targets: number[];
}

/**
 * Cuts a text into windows that fit `contextLength`, one behind the other without overlap; the last may be shorter. With a BOS
 * token each window is contextLength - 1 tokens behind a BOS and every one is predicted. Without, a window is contextLength
 * tokens and its first is not predicted.
 *
 * Worked example: 5 tokens a b c d e, context 3: with BOS `<s> a b`, `<s> c d`, `<s> e`; without `a b c`, `d e`.
 */
export function* cutWindows(tokens: readonly number[], contextLength: number, bos: number | null): Generator<Window> {
  const length = bos === null ? contextLength : contextLength - 1;
  for (let start = 0; start < tokens.length; start += length) {
    const window = tokens.slice(start, start + length);
    const targets = bos === null ? window.slice(1) : window;
    const inputs = bos === null ? window.slice(0, -1) : [bos, ...window.slice(0, -1)];
    if (targets.length > 0) yield { inputs, targets };
  }
}

export interface PerplexityResult {
  /** exp of the mean. */
  ppl: number;
  nll_per_token: number;
  /** Tokens that were predicted. */
  tokens: number;
}

/** Perplexity over windows. `progress` hears the result so far after each; it may throw to end early. */
export async function measurePerplexity(
  engine: StepEngine,
  windows: Iterable<Window>,
  progress: (soFar: PerplexityResult) => void,
): Promise<PerplexityResult> {
  const { vocabSize } = engine;
  let nll = 0;
  let result: PerplexityResult = { ppl: Number.NaN, nll_per_token: Number.NaN, tokens: 0 };
  for (const { inputs, targets } of windows) {
    await evaluateSequence(engine, inputs, (rows, first) => {
      for (let i = 0; i * vocabSize < rows.length; i++) {
        nll += negativeLogLikelihood(rows.subarray(i * vocabSize, (i + 1) * vocabSize), targets[first + i]);
      }
    });
    const tokens = result.tokens + targets.length;
    result = { ppl: Math.exp(nll / tokens), nll_per_token: nll / tokens, tokens };
    progress(result);
  }
  return result;
}
