/**
 * What other policies than the engine's would find of a trace: the references of docs/CACHE.md. Each is a pure function of the
 * trace and returns how many needed neurons it has in memory, of those of token `countFrom` and later. A neuron is kept whole;
 * a missing one is read, and kept if the policy wants it.
 */
import type { NeedList } from './cache-trace.js';

/** One pool of places for all neurons, or one for each bank. */
export type Places = number | readonly number[];

const NEVER = 0xffffffff;

/** The pool of each bank and how many places each pool has. */
function pools({ bankCount }: NeedList, places: Places): { poolOf: number[]; capacity: readonly number[] } {
  if (typeof places === 'number') return { poolOf: new Array<number>(bankCount).fill(0), capacity: [places] };
  return { poolOf: Array.from({ length: bankCount }, (_, bank) => bank), capacity: places };
}

/** Calls visit(unit, token, i) for every needed neuron in order; i is its place in `units`. */
function forEachNeed(
  { tokens, starts, units }: NeedList,
  visit: (unit: number, token: number, i: number) => void,
): void {
  for (let token = 0; token < tokens; token++) {
    for (let i = starts[token]; i < starts[token + 1]; i++) visit(units[i], token, i);
  }
}

/** Needed neurons that are counted. */
export function countNeeds({ starts, tokens }: NeedList, countFrom: number): number {
  return starts[tokens] - starts[countFrom];
}

/** The least recently used one goes. Neurons marked in `fixed` are always there and take no place. */
export function lruHits(needs: NeedList, places: Places, countFrom: number, fixed?: Uint8Array): number {
  const { poolOf, capacity } = pools(needs, places);
  const unitCount = needs.bankCount * needs.neuronCount;
  // A ring for each pool, the oldest first, closed by an element of its own.
  const older = new Uint32Array(unitCount + capacity.length);
  const newer = new Uint32Array(unitCount + capacity.length);
  for (let pool = 0; pool < capacity.length; pool++)
    older[unitCount + pool] = newer[unitCount + pool] = unitCount + pool;
  const isKept = new Uint8Array(unitCount);
  const used = new Uint32Array(capacity.length);
  const unlink = (unit: number) => {
    newer[older[unit]] = newer[unit];
    older[newer[unit]] = older[unit];
  };
  let hits = 0;
  forEachNeed(needs, (unit, token) => {
    const counted = token >= countFrom ? 1 : 0;
    if (fixed?.[unit]) {
      hits += counted;
      return;
    }
    const pool = poolOf[Math.floor(unit / needs.neuronCount)];
    if (capacity[pool] === 0) return;
    const ring = unitCount + pool;
    if (isKept[unit]) {
      hits += counted;
      unlink(unit);
    } else if (used[pool] < capacity[pool]) {
      used[pool]++;
    } else {
      const oldest = newer[ring];
      unlink(oldest);
      isKept[oldest] = 0;
    }
    isKept[unit] = 1;
    older[unit] = older[ring];
    newer[unit] = ring;
    newer[older[ring]] = unit;
    older[ring] = unit;
  });
  return hits;
}

/** The hottest of all neurons by `rates`, marked with 1; ties by number. */
export function hottest(rates: Float32Array, count: number): Uint8Array {
  const order = Uint32Array.from(rates, (_, unit) => unit).sort((a, b) => rates[b] - rates[a] || a - b);
  const marks = new Uint8Array(rates.length);
  for (const unit of order.subarray(0, count)) marks[unit] = 1;
  return marks;
}

/** The neurons kept in the last `k` tokens, with the largest k for which they never are more than `capacity`. */
export function windowHits(
  needs: NeedList,
  capacity: number,
  countFrom: number,
): { hits: number; windowTokens: number } {
  let low = 0;
  let high = needs.tokens;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (largestWindow(needs, middle) <= capacity) low = middle;
    else high = middle - 1;
  }
  const last = new Float64Array(needs.bankCount * needs.neuronCount).fill(Number.NEGATIVE_INFINITY);
  let hits = 0;
  forEachNeed(needs, (unit, token) => {
    if (token >= countFrom && token - last[unit] <= low) hits++;
    last[unit] = token;
  });
  return { hits, windowTokens: low };
}

/** The most different neurons in any `length` tokens in a row. */
function largestWindow({ tokens, bankCount, neuronCount, starts, units }: NeedList, length: number): number {
  const uses = new Uint32Array(bankCount * neuronCount);
  let present = 0;
  let most = 0;
  for (let token = 0; token < tokens; token++) {
    for (let i = starts[token]; i < starts[token + 1]; i++) if (uses[units[i]]++ === 0) present++;
    const gone = token - length;
    for (let i = starts[gone] ?? 0; gone >= 0 && i < starts[gone + 1]; i++) if (--uses[units[i]] === 0) present--;
    most = Math.max(most, present);
  }
  return most;
}

/**
 * Belady's optimum: the neuron that is needed furthest in the future goes, or is not kept at all. No policy that has as many
 * places finds more.
 */
export function beladyHits(needs: NeedList, places: Places, countFrom: number): number {
  const { poolOf, capacity } = pools(needs, places);
  const unitCount = needs.bankCount * needs.neuronCount;
  const nextUse = nextUses(needs);
  const kept = capacity.map((count) => new FurthestFirst(count));
  const position = new Int32Array(unitCount).fill(-1);
  let hits = 0;
  forEachNeed(needs, (unit, token, i) => {
    const heap = kept[poolOf[Math.floor(unit / needs.neuronCount)]];
    if (position[unit] >= 0) {
      if (token >= countFrom) hits++;
      heap.update(position, unit, nextUse[i]);
    } else if (heap.size < heap.capacity) {
      heap.push(position, unit, nextUse[i]);
    } else if (heap.size > 0 && heap.furthest > nextUse[i]) {
      heap.replaceFirst(position, unit, nextUse[i]);
    }
  });
  return hits;
}

/**
 * For each need the next one of the same neuron. Its token would not do: of two neurons that a token needs, to keep the first
 * leaves the choice open whether to keep the second.
 */
function nextUses({ bankCount, neuronCount, units }: NeedList): Uint32Array {
  const next = new Uint32Array(bankCount * neuronCount).fill(NEVER);
  const result = new Uint32Array(units.length);
  for (let i = units.length - 1; i >= 0; i--) {
    result[i] = next[units[i]];
    next[units[i]] = i;
  }
  return result;
}

/** A heap of neurons, the one needed last on top. `position` says where each neuron is in the heap of its pool, -1 nowhere. */
class FurthestFirst {
  readonly capacity: number;
  size = 0;
  readonly #units: Uint32Array;
  readonly #keys: Uint32Array;

  constructor(capacity: number) {
    this.capacity = capacity;
    this.#units = new Uint32Array(capacity);
    this.#keys = new Uint32Array(capacity);
  }

  get furthest(): number {
    return this.#keys[0];
  }

  push(position: Int32Array, unit: number, key: number): void {
    this.#rise(position, this.size++, unit, key);
  }

  /** The neuron's next use is later than it was: it can only rise. */
  update(position: Int32Array, unit: number, key: number): void {
    this.#rise(position, position[unit], unit, key);
  }

  replaceFirst(position: Int32Array, unit: number, key: number): void {
    position[this.#units[0]] = -1;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child + 1 < this.size && this.#keys[child + 1] > this.#keys[child]) child++;
      if (child >= this.size || this.#keys[child] <= key) break;
      this.#put(position, at, this.#units[child], this.#keys[child]);
      at = child;
    }
    this.#put(position, at, unit, key);
  }

  #rise(position: Int32Array, from: number, unit: number, key: number): void {
    let at = from;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (this.#keys[parent] >= key) break;
      this.#put(position, at, this.#units[parent], this.#keys[parent]);
      at = parent;
    }
    this.#put(position, at, unit, key);
  }

  #put(position: Int32Array, at: number, unit: number, key: number): void {
    this.#units[at] = unit;
    this.#keys[at] = key;
    position[unit] = at;
  }
}
