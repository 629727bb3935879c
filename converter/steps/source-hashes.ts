import { createHash } from 'node:crypto';
import type { NativeAddon } from '../../src/engine/contract.js';
import { ROOM_SPARE_BYTES, type SourceFile } from '../checkpoint/source-file.js';
import type { TensorSource } from '../checkpoint/tensor-source.js';
import type { SourceState } from '../sources.js';
import type { Journal, Progress } from '../write/journal.js';
import type { Chunk } from './read-ahead.js';

/** Hashed at once: about a millisecond of the JavaScript thread, which others wait for. */
const SLICE_BYTES = 1024 * 1024;
/** Read at once where nobody else has read. */
const GAP_BYTES = 4 * 1024 * 1024;

/** A file hashed from its first byte on: how far, and what comes of it. */
interface Running {
  file: SourceFile;
  bytes: number;
  hash: ReturnType<typeof createHash>;
  position: number;
  /** What conversion has read beyond, and will not read again. */
  missed: { offset: number; bytes: number }[];
}

/**
 * sha256 of the sources. A hash needs a file's bytes in order, a conversion wants them tensor by tensor: what is read for it is
 * hashed, too, as long as it goes forward, and what it leaves out or has read at other times is read for the hash alone. In the order
 * of `inReadingOrder` that is next to nothing.
 */
export class SourceHashes {
  readonly #addon: Pick<NativeAddon, 'allocatePages'>;
  readonly #checkpoint: TensorSource;
  readonly #states: readonly SourceState[];
  readonly #progress: Progress;
  readonly #journal: Journal;
  readonly #running = new Map<string, Running>();
  #room: Uint8Array | undefined;

  /** Records what it finds in `journal` and `progress`; what is there already is not hashed again. */
  constructor(parts: {
    addon: Pick<NativeAddon, 'allocatePages'>;
    checkpoint: TensorSource;
    states: readonly SourceState[];
    progress: Progress;
    journal: Journal;
  }) {
    this.#addon = parts.addon;
    this.#checkpoint = parts.checkpoint;
    this.#states = parts.states;
    this.#progress = parts.progress;
    this.#journal = parts.journal;
  }

  /**
   * Hashes a chunk, if it is next: what lies before it was read already, or is less than the chunk. That is read for the hash
   * first; the chunk is, later, if it is not next. One at a time. Throws as `finish` does.
   */
  async take({ bytes, place, isWhole }: Chunk, signal: AbortSignal): Promise<void> {
    if (!place || this.#progress.hashes.has(place.file.name)) return;
    const { file, offset } = place;
    const running = this.#start(file);
    const before = running.missed
      .filter((missed) => missed.offset < offset)
      .reduce((sum, missed) => sum + missed.bytes, 0);
    if (!isWhole || offset - running.position - before > bytes.length) {
      running.missed.push({ offset, bytes: bytes.length });
      return;
    }
    await this.#readTo(running, offset, signal);
    const known = running.position - offset;
    if (known < bytes.length) await update(running, bytes.subarray(known), signal);
    running.missed = running.missed.filter((missed) => missed.offset >= running.position);
    if (running.position === running.bytes) await this.#record(file.name, running.hash.digest('hex'));
  }

  /**
   * sha256 of a source, of which the rest is read now. Throws `E_CHANGED` or `E_IO` if the file has not the size it had, and the
   * signal's reason when that is aborted.
   */
  async finish(state: SourceState, signal: AbortSignal): Promise<string> {
    const known = this.#progress.hashes.get(state.file);
    if (known) return known;
    const running = this.#running.get(state.file);
    if (!running) return this.#record(state.file, await this.#checkpoint.hash(state, signal));
    await this.#readTo(running, running.bytes, signal);
    return this.#record(state.file, running.hash.digest('hex'));
  }

  #start(file: SourceFile): Running {
    const begun = this.#running.get(file.name);
    if (begun) return begun;
    const state = this.#states.find((known) => known.file === file.name) as SourceState;
    const running = { file, bytes: state.bytes, hash: createHash('sha256'), position: 0, missed: [] };
    this.#running.set(file.name, running);
    return running;
  }

  /** Reads and hashes up to `end`, if it is not that far. */
  async #readTo(running: Running, end: number, signal: AbortSignal): Promise<void> {
    while (running.position < end) {
      signal.throwIfAborted();
      this.#room ??= new Uint8Array(this.#addon.allocatePages(GAP_BYTES + ROOM_SPARE_BYTES));
      const bytes = Math.min(GAP_BYTES, end - running.position);
      await update(running, await running.file.readPages(running.position, bytes, this.#room), signal);
    }
  }

  async #record(file: string, sha256: string): Promise<string> {
    await this.#journal.record({ source: file, sha256 });
    this.#progress.hashes.set(file, sha256);
    return sha256;
  }
}

async function update(running: Running, bytes: Uint8Array, signal: AbortSignal): Promise<void> {
  for (let done = 0; done < bytes.length; done += SLICE_BYTES) {
    signal.throwIfAborted();
    const slice = bytes.subarray(done, done + SLICE_BYTES);
    running.hash.update(slice);
    running.position += slice.length;
    // Others have their turn.
    await new Promise(setImmediate);
  }
}
