import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { join } from 'node:path';
import { loadAddon } from '../../src/engine/addon.js';
import { PAGE_BYTES, roundUpToPage } from '../../src/format/layout.js';
import { openFile } from './files.js';
import { readFully } from './safetensors.js';

/** What a room for `readPages` needs beyond the bytes that are read: they may begin and end inside a page. */
export const ROOM_SPARE_BYTES = 2 * PAGE_BYTES;

/** A weight file of a checkpoint, open for reading. */
export class SourceFile {
  /** Name in the checkpoint's directory. */
  readonly name: string;
  readonly handle: FileHandle;
  readonly #path: string;
  /** The same file past the page cache; null where that is not possible or not wanted. Opened by the first `readPages`. */
  #direct: Promise<FileHandle | null> | undefined;

  private constructor(directory: string, name: string, handle: FileHandle) {
    this.name = name;
    this.handle = handle;
    this.#path = join(directory, name);
  }

  /** Throws as `openFile` does. */
  static async open(directory: string, name: string): Promise<SourceFile> {
    return new SourceFile(directory, name, await openFile(directory, name));
  }

  /** Fills `target` from `offset` of the file. Throws `E_IO` that names the file when it ends before. */
  async read(offset: number, target: Uint8Array): Promise<void> {
    await readFully(this.handle, target, offset, this.#path);
  }

  /**
   * Reads what will not be read again: past the page cache, which costs neither memory nor copies, unless most of the file is
   * in there already. `room` begins on a page of memory and has `ROOM_SPARE_BYTES` more than are read; returns the part of it
   * that holds the bytes. Throws as `read` does.
   */
  async readPages(offset: number, bytes: number, room: Uint8Array): Promise<Uint8Array> {
    this.#direct ??= this.#openDirect(room);
    const direct = await this.#direct;
    const skipped = offset % PAGE_BYTES;
    const end = skipped + bytes;
    if (direct && (await readInto(direct, room.subarray(0, roundUpToPage(end)), offset - skipped)) >= end) {
      return room.subarray(skipped, end);
    }
    // Whatever was wrong with it, the ordinary way shows whether it is the file's fault, and says so.
    const target = room.subarray(0, bytes);
    await this.read(offset, target);
    return target;
  }

  async close(): Promise<void> {
    await this.handle.close();
    await (await this.#direct)?.close();
  }

  /** Tries the first page both ways: on FUSE the open may succeed and what is read be wrong. */
  async #openDirect(room: Uint8Array): Promise<FileHandle | null> {
    const { size } = await this.handle.stat();
    const cached = await loadAddon()
      .pageCacheBytes(this.#path)
      .catch(() => null);
    if (cached !== null && cached > size / 2) return null;
    const flags = constants.O_RDONLY | constants.O_NONBLOCK | constants.O_DIRECT;
    const direct = await open(this.#path, flags).catch(() => null);
    if (!direct) return null;
    const [one, other] = [room.subarray(0, PAGE_BYTES), room.subarray(PAGE_BYTES, 2 * PAGE_BYTES)];
    const got = await readInto(direct, one, 0);
    const expected = await readInto(this.handle, other, 0);
    if (got === expected && Buffer.compare(one.subarray(0, got), other.subarray(0, got)) === 0) return direct;
    await direct.close();
    return null;
  }
}

/** Bytes that one read at `offset` gives; 0 if it fails. */
async function readInto(handle: FileHandle, target: Uint8Array, offset: number): Promise<number> {
  return handle.read(target, 0, target.length, offset).then(
    ({ bytesRead }) => bytesRead,
    () => 0,
  );
}
