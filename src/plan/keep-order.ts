/**
 * In which order neurons are taken into memory: by the bytes of flash that a byte of memory saves for each token.
 *
 *   gates  of a chunk: it need not be read whole any more, only the rows of neurons that fire
 *   rows   of a neuron: they are not read when it fires
 *
 * Everything is one sequence, and a plan keeps a beginning of it: so with more memory nothing is kept less. In models of some
 * size all gates come first: with hidden size 4096 in 4 bits, a gate of 2816 bytes spares the 8192 of its bundle but for the rows
 * (4096 bytes) of neurons that fire, while rows of 4608 bytes spare 4096 at most. Neurons so small that several share a page
 * are another matter: rows read one by one cost whole pages, so gates and rows of hot chunks come together.
 */
import type { FiringRates } from '../format/firing-rates.js';

/** Gates are kept in whole chunks of this many neurons. */
export const CHUNK_NEURONS = 128;
/** Neurons of a bank whose rows are ranked together: few enough to share memory out evenly, many enough to sort quickly. */
export const GROUP_NEURONS = 16;
/** What a neuron is taken to fire without a profile: about what sparse models do. */
const ASSUMED_RATE = 0.1;
/** Values closer than this share of the largest are alike; then all banks get one chunk before any gets its next. */
const VALUE_STEP = 2 ** -20;

const STEPS = 1 + CHUNK_NEURONS / GROUP_NEURONS;

/** What a neuron takes in memory, and what it costs to read; bytes. */
export interface NeuronCosts {
  gateBytes: number;
  rowsBytes: number;
  /** Of flash, as a part of a chunk that is read whole; of its up and down rows alone. */
  wholeReadBytes: number;
  rowsReadBytes: number;
}

/** Banks and what is known of their neurons. */
export interface Banks {
  bankCount: number;
  /** Neurons of a bank. */
  neuronCount: number;
  costs: NeuronCosts;
  /** Of a model in heat order. Without it all neurons are taken to be alike. */
  firingRates?: FiringRates;
}

/** How many gates and rows of each bank are kept, its hottest neurons'. */
export interface KeptCounts {
  gates: number[];
  rows: number[];
}

/** The sequence in which gates (unless `rowsOnly`) and rows are kept. */
export class KeepOrder {
  readonly #banks: Banks;
  /** Items, the most valuable first: step * bankCount + bank, of which `#add` knows the meaning. */
  readonly #items: Float64Array;

  constructor(banks: Banks, rowsOnly: boolean) {
    this.#banks = banks;
    const { bankCount, neuronCount } = banks;
    const steps = Math.ceil(neuronCount / CHUNK_NEURONS) * STEPS;
    const values = new Float64Array(steps * bankCount).fill(-1);
    let largest = 0;
    for (let bank = 0; bank < bankCount; bank++) {
      const { gateValue, rowValue } = bankValues(banks, bank);
      for (let step = rowsOnly ? 1 : 0; step < steps; step++) {
        const isGates = step % STEPS === 0;
        const first = firstNeuron(step);
        if (first >= neuronCount || (isGates && rowsOnly)) continue;
        // Rows are of no use without gates: they are at most as urgent as those, and behind them where values are alike.
        const value = isGates ? gateValue : Math.min(rowValue(first), rowsOnly ? Number.POSITIVE_INFINITY : gateValue);
        values[step * bankCount + bank] = value;
        largest = Math.max(largest, value);
      }
    }
    this.#items = sortItems(values, largest);
  }

  get length(): number {
    return this.#items.length;
  }

  /** Of each bank what is kept with the first `count` items, and with `part` neurons of the next if its rows are whole. */
  counts(count: number, part = 0): KeptCounts {
    const { bankCount } = this.#banks;
    const kept = { gates: new Array<number>(bankCount).fill(0), rows: new Array<number>(bankCount).fill(0) };
    for (let i = 0; i < count; i++) this.#add(kept, this.#items[i], GROUP_NEURONS);
    if (part > 0) this.#add(kept, this.#items[count], part);
    return kept;
  }

  /** Whether item number `count` is rows, which can be kept in part. */
  isRows(count: number): boolean {
    return Math.floor(this.#items[count] / this.#banks.bankCount) % STEPS !== 0;
  }

  #add(kept: KeptCounts, item: number, neurons: number): void {
    const { bankCount, neuronCount } = this.#banks;
    const step = Math.floor(item / bankCount);
    const isGates = step % STEPS === 0;
    const end = Math.min(firstNeuron(step) + (isGates ? CHUNK_NEURONS : neurons), neuronCount);
    (isGates ? kept.gates : kept.rows)[item % bankCount] = end;
  }
}

/** The first neuron of a step: each chunk has one for its gates, and one for each group of rows. */
function firstNeuron(step: number): number {
  const chunk = Math.floor(step / STEPS);
  return chunk * CHUNK_NEURONS + Math.max(0, (step % STEPS) - 1) * GROUP_NEURONS;
}

/** Bytes of flash saved a token for a byte of memory: by any gates of a bank, and by the rows of the group at a neuron. */
function bankValues(banks: Banks, bank: number): { gateValue: number; rowValue: (first: number) => number } {
  const { neuronCount, costs, firingRates } = banks;
  const rates = firingRates?.rates[bank];
  const routed = firingRates?.routed[bank] ?? 1;
  const mean = rates === undefined ? ASSUMED_RATE : rates.reduce((sum, rate) => sum + rate, 0) / neuronCount;
  const saved = Math.max(0, routed * costs.wholeReadBytes - mean * costs.rowsReadBytes);
  const middle = (first: number) => Math.min(first + GROUP_NEURONS / 2, neuronCount - 1);
  return {
    gateValue: saved / costs.gateBytes,
    rowValue: (first) => ((rates?.[middle(first)] ?? ASSUMED_RATE) * costs.rowsReadBytes) / costs.rowsBytes,
  };
}

/** Numbers of the items that have a value, by falling value; alike ones by their number. */
function sortItems(values: Float64Array, largest: number): Float64Array {
  const step = largest * VALUE_STEP || 1;
  const keys = new Float64Array(values.length);
  let count = 0;
  for (let item = 0; item < values.length; item++) {
    // One number to sort by, which is quick: how far below the largest, then which.
    if (values[item] >= 0) keys[count++] = Math.floor((largest - values[item]) / step) * values.length + item;
  }
  return keys
    .subarray(0, count)
    .sort()
    .map((key) => key % values.length);
}
