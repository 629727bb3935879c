import { Pi2Error } from '../base/error.js';
import type { Random } from './random.js';

/** Sampling options with llama.cpp's meanings. */
export interface SamplingOptions {
  /** 0 or less: the likeliest token, always. */
  temperature: number;
  /** Keep the k likeliest; 0 keeps all. */
  topK: number;
  /** Keep the likeliest whose probabilities sum up to this; 1 keeps all. */
  topP: number;
  /** Keep those at least this share as likely as the likeliest; 0 keeps all. */
  minP: number;
  /** Logits of recent tokens are divided by it (multiplied if negative); 1 is off. */
  repeatPenalty: number;
  /** How many tokens back are recent; 0 is none, -1 the whole context. */
  repeatLastN: number;
}

export const SAMPLING_DEFAULTS: SamplingOptions = {
  temperature: 0.8,
  topK: 40,
  topP: 0.95,
  minP: 0.05,
  repeatPenalty: 1,
  repeatLastN: 64,
};

/** Candidates first looked at when top-k does not bound them; widened until the other cuts fall inside. */
const FIRST_CANDIDATES = 256;

/**
 * Picks the next token in llama.cpp's order: repeat penalty, top-k, top-p, min-p, temperature, draw. `logits` is changed by
 * the penalty. `recent` is everything so far, prompt included, oldest first. Ties go to the lowest id.
 */
export function sampleToken(
  logits: Float32Array,
  options: SamplingOptions,
  recent: readonly number[],
  random: Random,
): number {
  penalizeRepeats(logits, options.repeatPenalty, lastTokens(recent, options.repeatLastN));
  if (options.temperature <= 0) return likeliest(logits);
  const candidates = chooseCandidates(logits, options);
  return draw(logits, candidates, options.temperature, random);
}

/** The id of the largest logit, the lowest of equals. Throws `Pi2Error` E_MODEL when the logits are not numbers. */
export function likeliest(logits: Float32Array): number {
  let best = 0;
  for (let id = 0; id < logits.length; id++) {
    if (Number.isNaN(logits[id])) throw noLogits();
    if (logits[id] > logits[best]) best = id;
  }
  if (!Number.isFinite(logits[best])) throw noLogits();
  return best;
}

/** Makes each token of `tokens` less likely, once, however often it is there. */
export function penalizeRepeats(logits: Float32Array, penalty: number, tokens: readonly number[]): void {
  if (penalty === 1) return;
  for (const id of new Set(tokens)) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
}

/** Ids that survive top-k, top-p and min-p, likeliest first (in order of id when nothing is cut). */
export function chooseCandidates(
  logits: Float32Array,
  { topK, topP, minP }: Pick<SamplingOptions, 'topK' | 'topP' | 'minP'>,
): Uint32Array {
  const largest = logits[likeliest(logits)];
  const kept = topK > 0 ? Math.min(topK, logits.length) : logits.length;
  if (kept === logits.length && topP >= 1 && minP <= 0) return Uint32Array.from(logits, (_, id) => id);
  const total = sumExponentials(kept < logits.length ? largestIds(logits, kept) : logits.keys(), logits, largest);
  // Every cut keeps a prefix of the sorted candidates, so only as many are sorted as the shortest prefix needs.
  for (let count = Math.min(kept, FIRST_CANDIDATES); ; count = Math.min(kept, count * 8)) {
    const sorted = largestIds(logits, count);
    const prefix = cutPrefix(logits, sorted, total, topP, minP);
    if (prefix < count || count === kept) return sorted.subarray(0, prefix);
  }
}

/** How many of the sorted candidates top-p and min-p keep: at least one. */
function cutPrefix(logits: Float32Array, sorted: Uint32Array, sum: number, topP: number, minP: number): number {
  const largest = logits[sorted[0]];
  const least = minP > 0 ? largest + Math.log(minP) : Number.NEGATIVE_INFINITY;
  let cumulated = 0;
  for (let i = 0; i < sorted.length; i++) {
    if (i > 0 && logits[sorted[i]] < least) return i;
    cumulated += Math.exp(logits[sorted[i]] - largest);
    if (topP < 1 && cumulated >= topP * sum) return i + 1;
  }
  return sorted.length;
}

/** Draws one of `candidates` with probability proportional to exp(logit / temperature). */
function draw(logits: Float32Array, candidates: Uint32Array, temperature: number, random: Random): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (const id of candidates) largest = Math.max(largest, logits[id]);
  const weights = new Float64Array(candidates.length);
  let sum = 0;
  for (let i = 0; i < candidates.length; i++) {
    weights[i] = Math.exp((logits[candidates[i]] - largest) / temperature);
    sum += weights[i];
  }
  let left = random() * sum;
  let last = 0;
  for (let i = 0; i < candidates.length; i++) {
    if (weights[i] === 0) continue;
    last = i;
    left -= weights[i];
    if (left < 0) break;
  }
  return candidates[last];
}

/** Ids of the `count` largest logits, largest first, ties by lowest id: a heap of `count`, the worst on top. */
export function largestIds(logits: Float32Array, count: number): Uint32Array {
  const heap = new Uint32Array(count);
  const worse = (a: number, b: number) => logits[a] < logits[b] || (logits[a] === logits[b] && a > b);
  const sink = (start: number, id: number) => {
    let at = start;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= count) break;
      if (child + 1 < count && worse(heap[child + 1], heap[child])) child++;
      if (!worse(heap[child], id)) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = id;
  };
  for (let id = 0; id < count; id++) heap[id] = id;
  for (let at = (count >> 1) - 1; at >= 0; at--) sink(at, heap[at]);
  for (let id = count; id < logits.length; id++) if (logits[id] > logits[heap[0]]) sink(0, id);
  return heap.sort((a, b) => logits[b] - logits[a] || a - b);
}

/** Sum of exp(logit - largest) over `ids`. */
function sumExponentials(ids: Iterable<number>, logits: Float32Array, largest: number): number {
  let sum = 0;
  for (const id of ids) sum += Math.exp(logits[id] - largest);
  return sum;
}

function lastTokens(recent: readonly number[], count: number): readonly number[] {
  if (count === 0) return [];
  return count < 0 ? recent : recent.slice(-count);
}

/** The error of a model whose logits are NaN or infinite. */
export function noLogits(): Pi2Error {
  return new Pi2Error(
    'E_MODEL',
    'the model computed no usable logits (not numbers)',
    'check it: powerinfer2 verify NAME.pi2',
  );
}
