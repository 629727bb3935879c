import type { Checkpoint } from '../checkpoint/checkpoint.js';
import { numberBytes } from './extents.js';
import { type Load, loadBytes } from './pieces.js';

/** Rows of a rectangle that are asked for at once: enough to keep a disk busy. */
const ROWS_AT_ONCE = 32;

/** Reads loads one after another, always one ahead of what is asked for, into two chunks that it owns. */
export class ReadAhead {
  readonly #checkpoint: Checkpoint;
  readonly #loads: readonly Load[];
  readonly #chunks: Uint8Array[];
  #started = 0;
  #ahead: Promise<Uint8Array> | undefined;

  constructor(checkpoint: Checkpoint, loads: readonly Load[]) {
    this.#checkpoint = checkpoint;
    this.#loads = loads;
    const bytes = loads.reduce((most, load) => Math.max(most, loadBytes(load)), 0);
    this.#chunks = [Buffer.allocUnsafeSlow(bytes), Buffer.allocUnsafeSlow(bytes)];
    this.#start();
  }

  /** The source numbers of the next load. They stay until the call after this one. */
  async next(): Promise<Uint8Array> {
    if (!this.#ahead) throw new RangeError('no load is left');
    const chunk = await this.#ahead;
    this.#start();
    return chunk;
  }

  /** Returns when nothing is being read any more. */
  async settle(): Promise<void> {
    await this.#ahead?.catch(() => undefined);
  }

  #start(): void {
    const load = this.#loads[this.#started];
    const chunk = this.#chunks[this.#started % 2];
    this.#started++;
    this.#ahead = load && this.#read(load, chunk.subarray(0, loadBytes(load)));
    // A failure is met when the load is asked for; until then it is not unhandled.
    this.#ahead?.catch(() => undefined);
  }

  async #read(load: Load, chunk: Uint8Array): Promise<Uint8Array> {
    const size = numberBytes(load.source);
    const width = load.source.shape[load.source.shape.length - 1];
    const offsetOf = (row: number) => ((load.firstRow + row) * width + load.firstColumn) * size;
    if (load.columns === width) {
      await this.#checkpoint.read(load.source, offsetOf(0), chunk);
      return chunk;
    }
    const rowBytes = load.columns * size;
    for (let first = 0; first < load.rows; first += ROWS_AT_ONCE) {
      const reads: Promise<void>[] = [];
      for (let row = first; row < Math.min(load.rows, first + ROWS_AT_ONCE); row++) {
        const part = chunk.subarray(row * rowBytes, (row + 1) * rowBytes);
        reads.push(this.#checkpoint.read(load.source, offsetOf(row), part));
      }
      // All of them, even after a failure: their memory is used again.
      const results = await Promise.allSettled(reads);
      for (const result of results) if (result.status === 'rejected') throw result.reason;
    }
    return chunk;
  }
}
