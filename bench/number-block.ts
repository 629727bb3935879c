import { createHash } from 'node:crypto';
import { seededRandom } from '../src/engine/random.js';
import { normal } from './normal.js';

/** Random numbers made: a prime, so that no row length divides it and each row of a matrix begins elsewhere in the block. */
const BLOCK_NUMBERS = 1_048_573;
/** Deviations that are kept encoded, 2 MB each: what the tensors of two or three layers need. */
const KEPT_DEVIATIONS = 32;

/** One block of normal numbers, as bf16 of each deviation that is asked for: making a number costs far more than copying it. */
export class NumberBlock {
  readonly #numbers = new Float32Array(BLOCK_NUMBERS);
  readonly #seed: number;
  readonly #encoded = new Map<number, Uint16Array>();
  readonly #starts = new Map<string, number>();

  constructor(seed: number) {
    this.#seed = seed;
    const random = seededRandom(seed);
    for (let i = 0; i < BLOCK_NUMBERS; i++) this.#numbers[i] = normal(random);
  }

  /** Fills `target` with bf16 numbers of the block times `deviation`, from number `start` on, the block repeated. */
  fill(deviation: number, start: number, target: Uint16Array): void {
    const block = this.#encode(deviation);
    for (let done = 0; done < target.length; ) {
      const from = (start + done) % BLOCK_NUMBERS;
      const piece = block.subarray(from, from + target.length - done);
      target.set(piece, done);
      done += piece.length;
    }
  }

  /** Where a tensor begins in the block, in numbers: the same whenever it is asked for. */
  start(tensor: string): number {
    let start = this.#starts.get(tensor);
    if (start === undefined) {
      const hash = createHash('sha256').update(`${this.#seed} ${tensor}`).digest();
      start = hash.readUInt32LE(0) % BLOCK_NUMBERS;
      this.#starts.set(tensor, start);
    }
    return start;
  }

  #encode(deviation: number): Uint16Array {
    let encoded = this.#encoded.get(deviation);
    if (!encoded) {
      encoded = new Uint16Array(BLOCK_NUMBERS);
      for (let i = 0; i < BLOCK_NUMBERS; i++) encoded[i] = toBf16(this.#numbers[i] * deviation);
      const [oldest] = this.#encoded.keys();
      if (this.#encoded.size === KEPT_DEVIATIONS) this.#encoded.delete(oldest);
      this.#encoded.set(deviation, encoded);
    }
    return encoded;
  }
}

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

/** A number as bf16, rounded to nearest even. */
export function toBf16(value: number): number {
  float[0] = value;
  return (bits[0] + 0x7fff + ((bits[0] >>> 16) & 1)) >>> 16;
}

/** The number that bf16 bits stand for. */
export function fromBf16(value: number): number {
  bits[0] = value << 16;
  return float[0];
}
