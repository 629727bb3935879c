import type { NativeAddon } from '../../src/engine/contract.js';
import { ROOM_SPARE_BYTES } from '../checkpoint/source-file.js';
import type { Place, TensorSource } from '../checkpoint/tensor-source.js';
import { numberBytes } from './extents.js';
import { type Load, loadBytes } from './pieces.js';

/** Reads that are asked for at once: enough to keep a disk busy. */
const SPANS_AT_ONCE = 32;

/** Rows of a load that lie together in the file: `rows` of them from `row` of the matrix on, row `at` of the load the first. */
interface Span {
  at: number;
  row: number;
  rows: number;
}

/** The fewest spans that a load's rows can be read in; `width` is that of the matrix. */
function* rowSpans({ rowList, firstRow, rows, columns }: Load, width: number): Generator<Span> {
  const rowOf = (at: number) => (rowList ? rowList[at] : firstRow + at);
  for (let at = 0; at < rows; ) {
    let end = at + 1;
    while (columns === width && end < rows && rowOf(end) === rowOf(end - 1) + 1) end++;
    yield { at, row: rowOf(at), rows: end - at };
    at = end;
  }
}

/** The source numbers of a load. */
export interface Chunk {
  bytes: Uint8Array;
  /** Where the first of them lies; null if they are in no file. */
  place: Place | null;
  /** Whether the others follow it one behind another. */
  isWhole: boolean;
}

/** Reads loads one after another, always one ahead of what is asked for, into two rooms that it owns. */
export class ReadAhead {
  readonly #checkpoint: TensorSource;
  readonly #loads: readonly Load[];
  readonly #rooms: Uint8Array[];
  #started = 0;
  #ahead: Promise<Chunk> | undefined;

  constructor(addon: Pick<NativeAddon, 'allocatePages'>, checkpoint: TensorSource, loads: readonly Load[]) {
    this.#checkpoint = checkpoint;
    this.#loads = loads;
    const bytes = loads.reduce((most, load) => Math.max(most, loadBytes(load)), 0) + ROOM_SPARE_BYTES;
    this.#rooms = [0, 1].map(() => new Uint8Array(addon.allocatePages(bytes)));
    this.#start();
  }

  /** The next load's. They stay until the call after this one. */
  async next(): Promise<Chunk> {
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
    const room = this.#rooms[this.#started % 2];
    this.#started++;
    this.#ahead = load && this.#read(load, room);
    // A failure is met when the load is asked for; until then it is not unhandled.
    this.#ahead?.catch(() => undefined);
  }

  async #read(load: Load, room: Uint8Array): Promise<Chunk> {
    const size = numberBytes(load.source);
    const width = load.source.shape[load.source.shape.length - 1];
    const rowBytes = load.columns * size;
    const spans = [...rowSpans(load, width)];
    const offsetOf = (row: number) => (row * width + load.firstColumn) * size;
    const start = this.#checkpoint.place(load.source);
    const place = start && { file: start.file, offset: start.offset + offsetOf(spans[0].row) };
    const isWhole = spans.length === 1;
    if (place && isWhole) {
      return { bytes: await place.file.readPages(place.offset, loadBytes(load), room), place, isWhole };
    }
    const bytes = room.subarray(0, loadBytes(load));
    for (let first = 0; first < spans.length; first += SPANS_AT_ONCE) {
      const reads = spans.slice(first, first + SPANS_AT_ONCE).map(({ at, row, rows }) => {
        const part = bytes.subarray(at * rowBytes, (at + rows) * rowBytes);
        return this.#checkpoint.read(load.source, offsetOf(row), part);
      });
      // All of them, even after a failure: their memory is used again.
      const results = await Promise.allSettled(reads);
      for (const result of results) if (result.status === 'rejected') throw result.reason;
    }
    return { bytes, place, isWhole };
  }
}
