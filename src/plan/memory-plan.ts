/**
 * What is kept in memory. A bank is one expert of one layer; its neurons are in heat order.
 *
 *   exact      gates and rows by what they save (keep-order.ts); rows of neurons that fire nearly always are kept for good (hot),
 *              places for the others change hands (slots)
 *   predicted  whole neurons: of each bank the share that an operating point wants for good, then slots
 *
 * Beside neurons, some memory goes to reads on their way, and to tokens computed together. The planner knows nothing of bytes:
 * `measure` asks the engine, which is the one place that does.
 */
import { PAGE_BYTES } from '../format/layout.js';
import { type Banks, CHUNK_NEURONS, GROUP_NEURONS, KeepOrder, type KeptCounts } from './keep-order.js';

/**
 * Reads on their way and being computed, two halves of 8 MiB: chunks for every core, where one takes a MiB, and reads for
 * the time of an attention block. More is better spent on neurons.
 */
const STAGING_BYTES_MOST = 16 * 1024 * 1024;
/** Staging is this share of what remains above the least, while that is little. */
const STAGING_SHARE = 1 / 16;
/** The same of neurons that a predictor guesses before attention: what a device can read meanwhile. */
const PREFETCH_BYTES_MOST = 2 * 1024 * 1024;
const PREFETCH_SHARE = 1 / 32;
/** The same of tokens computed together: a prompt reads flash once for each batch, but a token of decoding has no use of it. */
const BATCH_SHARE = 1 / 8;
/**
 * Most tokens computed together: the weights are then read once for so many that arithmetic is the limit, and an abort is
 * heard between them.
 */
export const BATCH_SIZE_MOST = 128;
/** The same with a matrix unit: arithmetic is so fast that decoding weights, or reading them from flash, is the limit. */
export const MATRIX_BATCH_SIZE_MOST = 256;
/**
 * A neuron that fires for this share of the tokens that reach its bank is kept for good: its place would never be given to
 * another, so it needs no bookkeeping. Below a fifth, places that change hands find more (docs/CACHE.md).
 */
const HOT_RATE = 0.3;

/** The part of a `StreamRequest` that the planner decides; one number a bank. */
export interface StreamShape {
  residentGates: number[];
  hotNeurons: number[];
  coldSlots: number[];
  stagingBytes: number;
  prefetchBytes: number;
}

export interface MemoryQuestion extends Banks {
  /** Positions that the engine is opened for: no more are computed together. */
  contextLength: number;
  /** Memory of the whole process. */
  budgetBytes: number;
  /** What is not the engine's: the process as it is before opening, and a reserve for what it will do. */
  processBytes: number;
  /** `auto` keeps everything resident if it fits, `resident` wants just that, `stream` never does. */
  mode: 'auto' | 'resident' | 'stream';
  /**
   * Bytes of an engine that computes so many tokens together with this shape, or with every neuron resident. Must not shrink when
   * a number grows.
   */
  measure(batchSize: number, shape?: StreamShape): number;
  /**
   * For a predicted engine, the shares of every bank that its operating points want in memory, ascending. Its neurons are kept
   * whole, since their gates are not what says whether they are needed.
   */
  keptShares?: readonly number[];
  /**
   * Hottest neurons of every bank that a dense unit computes, ascending: as many of them as fit are kept for good. Default:
   * none.
   */
  unitNeurons?: readonly number[];
  /** Most tokens computed together. Default: `BATCH_SIZE_MOST`. */
  batchMost?: number;
  /** Whether the engine can read neurons ahead. */
  canPrefetch?: boolean;
}

/** `bytes` is the process and the engine together; never more than the budget, unless it is too little. */
export type MemoryPlan =
  | { kind: 'resident'; bytes: number; batchSize: number }
  | { kind: 'streamed'; bytes: number; batchSize: number; shape: StreamShape }
  | { kind: 'too_little'; leastBytes: number };

/** Decides what is kept. Pure; with a larger budget no bank gets fewer gates, and no fewer neurons are kept in all. */
export function planMemory(question: MemoryQuestion): MemoryPlan {
  const { mode, budgetBytes, processBytes } = question;
  const total = (batchSize: number, shape?: StreamShape) => processBytes + question.measure(batchSize, shape);
  const batchMost = Math.min(question.batchMost ?? BATCH_SIZE_MOST, question.contextLength);
  const largestBatch = (budget: number, shape?: StreamShape) =>
    1 + mostThatFit(batchMost - 1, (more) => total(1 + more, shape) <= budget);
  if (mode !== 'stream' && total(1) <= budgetBytes) {
    const batchSize = largestBatch(budgetBytes);
    return { kind: 'resident', bytes: total(batchSize), batchSize };
  }
  const leastBytes = leastMemory(question);
  if (mode === 'resident' || leastBytes > budgetBytes) return { kind: 'too_little', leastBytes };
  const nothing = emptyShape(question);
  const spare = budgetBytes - leastBytes;
  const forStaging = Math.min(STAGING_BYTES_MOST, STAGING_SHARE * spare);
  const forPrefetch = question.canPrefetch ? Math.min(PREFETCH_BYTES_MOST, PREFETCH_SHARE * spare) : 0;
  const forBatch = Math.min(total(batchMost, nothing) - total(1, nothing), BATCH_SHARE * spare);
  const forReads = forStaging + forPrefetch;
  const neurons = keepNeurons(question, (shape) => total(1, shape) <= budgetBytes - forReads - forBatch);
  const batchSize = largestBatch(budgetBytes - forReads, neurons);
  const fits = (shape: StreamShape, budget: number) => total(batchSize, shape) <= budget;
  const stagingBytes = mostThatFit(STAGING_BYTES_MOST, (bytes) =>
    fits({ ...neurons, stagingBytes: bytes }, budgetBytes - forPrefetch),
  );
  const staged = { ...neurons, stagingBytes };
  const withPages = (pages: number) => ({ ...staged, prefetchBytes: pages * PAGE_BYTES });
  const pagesMost = question.canPrefetch ? PREFETCH_BYTES_MOST / PAGE_BYTES : 0;
  const shape = withPages(mostThatFit(pagesMost, (pages) => fits(withPages(pages), budgetBytes)));
  return { kind: 'streamed', bytes: total(batchSize, shape), batchSize, shape };
}

/** The least memory that the model can run in, of the whole process: a token at a time, and unless `resident` no neuron kept. */
export function leastMemory(question: MemoryQuestion): number {
  const { mode, processBytes, measure } = question;
  const resident = processBytes + measure(1);
  if (mode === 'resident') return resident;
  const streamed = processBytes + measure(1, emptyShape(question));
  return mode === 'auto' ? Math.min(resident, streamed) : streamed;
}

/** Of a bank, the neurons that count as the hottest `share`. */
export function shareOfNeurons(share: number, neuronCount: number): number {
  return Math.ceil(share * neuronCount);
}

/** The largest number up to `most` that fits; 0 always does. */
function mostThatFit(most: number, fits: (count: number) => boolean): number {
  let low = 0;
  let high = most;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

function emptyShape({ bankCount }: MemoryQuestion): StreamShape {
  const zeros = new Array<number>(bankCount).fill(0);
  return { residentGates: zeros, hotNeurons: zeros, coldSlots: zeros, stagingBytes: 0, prefetchBytes: 0 };
}

/** As many neurons as fit, in their order. */
function keepNeurons(question: MemoryQuestion, fits: (shape: StreamShape) => boolean): StreamShape {
  const { bankCount, neuronCount, keptShares = [], unitNeurons = [] } = question;
  const rowsOnly = question.keptShares !== undefined;
  const order = new KeepOrder(question, rowsOnly);
  const hotMost = Array.from({ length: bankCount }, (_, bank) => hotCount(question, bank));
  const shapeOf = ({ gates, rows }: KeptCounts, wanted: number): StreamShape => {
    const kept = rows.map((count) => Math.max(count, wanted));
    // Where all have a place nothing is to be chosen.
    const most = (bank: number) => (kept[bank] === neuronCount ? neuronCount : hotMost[bank]);
    const hotNeurons = kept.map((count, bank) => Math.max(Math.min(count, most(bank)), wanted));
    const coldSlots = kept.map((count, bank) => count - hotNeurons[bank]);
    const ofHot = rowsOnly ? 0 : Math.min(CHUNK_NEURONS * Math.ceil(wanted / CHUNK_NEURONS), neuronCount);
    const residentGates = gates.map((count) => Math.max(count, ofHot));
    return { residentGates, hotNeurons, coldSlots, stagingBytes: 0, prefetchBytes: 0 };
  };
  // What a point promises was measured with that share of each bank in memory from the first token on. With rates slots are full
  // from there on, and places go to banks by what fires; without, neurons have to be hot, the same share of each bank.
  const promised = question.firingRates === undefined ? keptShares : [];
  const shares = promised.map((share) => shareOfNeurons(share, neuronCount));
  const most = (counts: readonly number[]) =>
    Math.max(0, ...counts.filter((count) => fits(shapeOf(order.counts(0), count))));
  const wanted = Math.max(most(shares), most(unitNeurons));
  const count = mostThatFit(order.length, (items) => fits(shapeOf(order.counts(items), wanted)));
  const partMost = count < order.length && order.isRows(count) ? GROUP_NEURONS - 1 : 0;
  const part = mostThatFit(partMost, (neurons) => fits(shapeOf(order.counts(count, neurons), wanted)));
  return shapeOf(order.counts(count, part), wanted);
}

/** Of a bank, the neurons that fire so often that they are kept for good. */
function hotCount({ neuronCount, firingRates }: MemoryQuestion, bank: number): number {
  if (firingRates === undefined) return 0;
  const rates = firingRates.rates[bank];
  const least = HOT_RATE * firingRates.routed[bank];
  return mostThatFit(neuronCount, (count) => rates[count - 1] > 0 && rates[count - 1] >= least);
}
