import { BATCH_SIZES_MOST, layerNeurons, type ProfileShape } from '../../src/format/profile-header.js';
import { type ActivationProfile, emptyProfile } from './profile.js';

/** Counts, token by token, the bits that the engine says. Neurons are counted as they lie and sorted back at the end. */
export class FiringCounter {
  readonly #shape: ProfileShape;
  /** Heat order of each layer [experts x neurons], or null where neurons lie as in the checkpoint. */
  readonly #orders: readonly (Uint32Array | null)[];
  readonly #counts: ActivationProfile;
  /** Bits of the last tokens, the newest last, used again in a ring. */
  readonly #recent: Uint8Array[];
  /** Bits of the neurons that fired in the newest batch. */
  readonly #union: Uint8Array;
  /** Tokens of the window so far. */
  #length = 0;

  constructor(shape: ProfileShape, checkpoint: string, orders: readonly (Uint32Array | null)[]) {
    this.#shape = shape;
    this.#orders = orders;
    this.#counts = emptyProfile(shape, checkpoint);
    const bytes = shape.layers * shape.experts * bytesOf(shape.neurons);
    this.#recent = Array.from({ length: BATCH_SIZES_MOST }, () => new Uint8Array(bytes));
    this.#union = new Uint8Array(bytes);
  }

  get tokens(): number {
    return this.#counts.batches[0];
  }

  /** What comes next does not follow what came before. */
  beginWindow(): void {
    this.#length = 0;
  }

  /** Counts one token: its `fired` and `routed` bits as the engine writes them. */
  add(fired: Uint8Array, routed: Uint8Array): void {
    const newest = this.#recent.shift() as Uint8Array;
    newest.set(fired);
    this.#recent.push(newest);
    this.#length++;
    this.#countRouted(routed);
    if (this.#length > 1) this.#countOverlap(this.#recent[BATCH_SIZES_MOST - 2], newest);
    this.#union.fill(0);
    for (let batch = 1; batch <= Math.min(BATCH_SIZES_MOST, this.#length); batch++) {
      const oldest = this.#recent[BATCH_SIZES_MOST - batch];
      for (let i = 0; i < oldest.length; i++) this.#union[i] |= oldest[i];
      this.#countFired(batch);
    }
  }

  /** The profile so far, in the order of the checkpoint, of the text with this sha256. */
  profile(sha256: string): ActivationProfile {
    const counts = this.#counts;
    const table = layerNeurons(this.#shape);
    const fired = new Uint32Array(counts.fired.length);
    for (let start = 0; start < fired.length; start += table) {
      const order = this.#orders[Math.floor(start / table / BATCH_SIZES_MOST)];
      for (let i = 0; i < table; i++) {
        const expertStart = i - (i % this.#shape.neurons);
        fired[start + (order ? expertStart + order[i] : i)] = counts.fired[start + i];
      }
    }
    return { ...counts, texts: [{ sha256, tokens: this.tokens }], fired };
  }

  #countRouted(routed: Uint8Array): void {
    const { experts } = this.#shape;
    const bytes = bytesOf(experts);
    const { routed: counts } = this.#counts;
    for (let i = 0; i < counts.length; i++) {
      const expert = i % experts;
      const byte = routed[((i - expert) / experts) * bytes + (expert >> 3)];
      counts[i] += (byte >> (expert & 7)) & 1;
    }
  }

  #countOverlap(before: Uint8Array, now: Uint8Array): void {
    const { layers } = this.#shape;
    const { following, shared } = this.#counts;
    const bytes = now.length / layers;
    for (let layer = 0; layer < layers; layer++) {
      for (let i = layer * bytes; i < (layer + 1) * bytes; i++) {
        following[layer] += BITS_SET[now[i]];
        shared[layer] += BITS_SET[now[i] & before[i]];
      }
    }
  }

  #countFired(batch: number): void {
    const { layers, experts, neurons } = this.#shape;
    const { batches, fired } = this.#counts;
    const bytes = bytesOf(neurons);
    batches[batch - 1]++;
    let at = 0;
    for (let layer = 0; layer < layers; layer++) {
      for (let expert = 0; expert < experts; expert++) {
        const start = ((layer * BATCH_SIZES_MOST + batch - 1) * experts + expert) * neurons;
        for (let i = 0; i < bytes; i++) {
          for (let bits = this.#union[at++]; bits !== 0; bits &= bits - 1) {
            fired[start + 8 * i + LOWEST_BIT[bits]]++;
          }
        }
      }
    }
  }
}

/** Number of bits set in each byte. */
const BITS_SET = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll('0', '').length);
/** Number of the lowest bit set in each byte but 0. */
const LOWEST_BIT = Uint8Array.from({ length: 256 }, (_, byte) => Math.log2(byte & -byte || 1));

/** Bytes that hold a bit for each of `count` things. */
function bytesOf(count: number): number {
  return Math.ceil(count / 8);
}
