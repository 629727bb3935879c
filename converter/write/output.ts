import { constants } from 'node:fs';
import { type FileHandle, lstat, mkdir, open, readdir, rename, rm, statfs } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { formatBytes } from '../../src/base/bytes.js';
import { fileError, Pi2Error } from '../../src/base/error.js';
import { PAGE_BYTES, roundUpToPage } from '../../src/format/layout.js';
import { MANIFEST_FILE } from '../../src/format/manifest.js';

export const JOURNAL_FILE = 'journal.jsonl';
const COPY_BYTES = 256 * 1024;

/**
 * The directory `NAME.pi2` being made: until it is whole it is called `NAME.pi2.partial`. The rename is the last thing that
 * happens, after everything is on disk.
 */
export class Output {
  /** `NAME.pi2` */
  readonly path: string;
  readonly partialPath: string;
  readonly lockPath: string;
  /** Where the profile of a calibration is made. */
  readonly calibrationPath: string;
  /** Where a model that is replaced stays for the moment between two renames. */
  readonly #replacedPath: string;

  constructor(path: string) {
    this.path = path;
    this.partialPath = `${path}.partial`;
    this.lockPath = `${path}.lock`;
    this.calibrationPath = `${path}.calibration`;
    this.#replacedPath = `${path}.replaced`;
  }

  /**
   * Throws `E_EXISTS` when the model is there and `force` is not given, or when what is there is not a model. A process that
   * was killed while it replaced a model has left the old one aside: it is put back first.
   */
  async checkFree(force: boolean): Promise<void> {
    if ((await kind(this.path)) === 'nothing' && (await kind(this.#replacedPath)) === 'model') {
      await rename(this.#replacedPath, this.path);
    }
    const there = await kind(this.path);
    if (there === 'nothing') return;
    if (there === 'other') {
      throw new Pi2Error(
        'E_EXISTS',
        `${this.path} exists and is not a model`,
        'give another name with -o, or remove it',
      );
    }
    if (!force) {
      throw new Pi2Error('E_EXISTS', `${this.path} exists`, 'give --force to replace it, or another name with -o');
    }
  }

  /** Size of a file of the partial directory; 0 if it is not there. */
  async partialSize(file: string): Promise<number> {
    return lstat(this.partial(file)).then(
      (stat) => stat.size,
      () => 0,
    );
  }

  async makePartial(): Promise<void> {
    try {
      await mkdir(this.partialPath, { recursive: false });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw fileError(error, 'make', this.partialPath);
    }
  }

  /** Makes a folder in the partial directory, if it is not there. */
  async makeFolder(name: string): Promise<void> {
    await mkdir(this.partial(name), { recursive: true }).catch((error) => {
      throw fileError(error, 'make', this.partial(name));
    });
  }

  partial(file: string): string {
    return join(this.partialPath, file);
  }

  /** Empties the partial directory, to start over. */
  async clearPartial(): Promise<void> {
    try {
      for (const file of await readdir(this.partialPath)) await rm(this.partial(file), { recursive: true });
    } catch (error) {
      throw fileError(error, 'empty', this.partialPath);
    }
  }

  async removeFile(file: string): Promise<void> {
    await rm(this.partial(file), { force: true });
  }

  async removePartial(): Promise<void> {
    await rm(this.partialPath, { recursive: true, force: true });
  }

  async removeCalibration(): Promise<void> {
    await rm(this.calibrationPath, { recursive: true, force: true });
  }

  /** Throws `E_DISK_FULL` unless `neededBytes`, less what the partial directory already holds, are free. */
  async checkSpace(neededBytes: number): Promise<void> {
    const { bavail, bsize } = await statfs(dirname(this.path));
    let held = 0;
    const files = await readdir(this.partialPath, { recursive: true }).catch(() => []);
    for (const file of files) held += (await lstat(this.partial(file))).blocks * 512;
    const missing = neededBytes - held;
    if (missing > bavail * bsize) {
      throw new Pi2Error(
        'E_DISK_FULL',
        `${this.path} needs ${formatBytes(missing)} more, and ${formatBytes(bavail * bsize)} are available there`,
        'free some space or give another place with -o; --quant q4 takes the least',
      );
    }
  }

  /** Gives the finished directory its name. An existing model is put aside first and removed last. */
  async publish(): Promise<void> {
    try {
      for (const file of await readdir(this.partialPath, { withFileTypes: true })) {
        if (file.isDirectory()) await syncDirectory(this.partial(file.name));
      }
      await syncDirectory(this.partialPath);
      await rm(this.partial(JOURNAL_FILE));
      await syncDirectory(this.partialPath);
      const replaces = (await kind(this.path)) !== 'nothing';
      if (replaces) {
        await rm(this.#replacedPath, { recursive: true, force: true });
        await rename(this.path, this.#replacedPath);
      }
      await rename(this.partialPath, this.path);
      await syncDirectory(dirname(this.path));
      if (replaces) await rm(this.#replacedPath, { recursive: true, force: true });
    } catch (error) {
      throw fileError(error, 'finish', this.path);
    }
  }
}

/** A file that pieces are written into, each at its offset. */
export class OutputFile {
  readonly #handle: FileHandle;
  readonly #path: string;
  /** The same file past the page cache; null where the file system has no such thing. */
  readonly #direct: FileHandle | null;

  private constructor(handle: FileHandle, path: string, direct: FileHandle | null = null) {
    this.#handle = handle;
    this.#path = path;
    this.#direct = direct;
  }

  /** Makes an empty file, in place of one that may be there. */
  static async create(path: string): Promise<OutputFile> {
    try {
      return new OutputFile(await open(path, 'w'), path);
    } catch (error) {
      throw fileError(error, 'write', path);
    }
  }

  /** Opens the file for writing, as it is; makes it if need be. */
  static async open(path: string): Promise<OutputFile> {
    try {
      await (await open(path, 'a')).close();
      const handle = await open(path, 'r+');
      return new OutputFile(handle, path, await open(path, constants.O_WRONLY | constants.O_DIRECT).catch(() => null));
    } catch (error) {
      throw fileError(error, 'open', path);
    }
  }

  /** The check that readers make, before the directory gets its name. Throws `E_IO`. */
  async requireSize(bytes: number): Promise<void> {
    const { size } = await this.#handle.stat();
    if (size === bytes) return;
    throw new Pi2Error(
      'E_IO',
      `${basename(this.#path)} has ${size} bytes in place of ${bytes}`,
      'another program has written to it: remove the .partial directory and convert again',
    );
  }

  /** Writes all of `bytes` at `offset`. Throws `E_DISK_FULL` or `E_IO`. */
  async write(bytes: Uint8Array, offset: number): Promise<void> {
    try {
      for (let done = 0; done < bytes.length; ) {
        const { bytesWritten } = await this.#handle.write(bytes, done, bytes.length - done, offset + done);
        done += bytesWritten;
      }
    } catch (error) {
      throw fileError(error, 'write', this.#path);
    }
  }

  /**
   * The same for what is not read soon: whole pages past the page cache, which costs neither memory nor copies. `bytes` begin as
   * far into a page of memory as `offset` lies in one of the file.
   */
  async writePages(bytes: Uint8Array, offset: number): Promise<void> {
    const first = Math.min(roundUpToPage(offset) - offset, bytes.length);
    const last = Math.max(bytes.length - ((offset + bytes.length) % PAGE_BYTES), first);
    const pages = bytes.subarray(first, last);
    const written = this.#direct ? await writeSome(this.#direct, pages, offset + first) : 0;
    // Whatever was wrong with it, the ordinary way shows whether it is the disk's fault, and says so.
    if (written < pages.length) return this.write(bytes, offset);
    await this.write(bytes.subarray(0, first), offset);
    await this.write(bytes.subarray(last), offset + last);
  }

  /** Fills `bytes` from `offset` on. Throws `E_IO` if the file ends before. */
  async read(bytes: Uint8Array, offset: number): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      const { bytesRead } = await this.#handle
        .read(bytes, done, bytes.length - done, offset + done)
        .catch((error: unknown) => Promise.reject(fileError(error, 'read', this.#path)));
      if (bytesRead === 0) throw new Pi2Error('E_IO', `${this.#path} ended at byte ${offset + done} while it was read`);
      done += bytesRead;
    }
  }

  /** Returns when all that was written is on disk. */
  async sync(): Promise<void> {
    try {
      await this.#handle.datasync();
    } catch (error) {
      throw fileError(error, 'write', this.#path);
    }
  }

  async close(): Promise<void> {
    await this.#direct?.close();
    await this.#handle.close();
  }
}

/** Bytes that one write puts there; 0 if it fails. */
async function writeSome(handle: FileHandle, bytes: Uint8Array, offset: number): Promise<number> {
  return handle.write(bytes, 0, bytes.length, offset).then(
    ({ bytesWritten }) => bytesWritten,
    () => 0,
  );
}

/** Writes a small file whole and returns when it is on disk. */
export async function writeSynced(path: string, content: Uint8Array | string): Promise<void> {
  try {
    const handle = await open(path, 'w');
    try {
      await handle.writeFile(content);
      await handle.sync();
    } finally {
      await handle.close();
    }
  } catch (error) {
    throw fileError(error, 'write', path);
  }
}

/** Copies a file, whatever its size and permissions, and returns when the copy is on disk. */
export async function copySynced(from: string, to: string): Promise<void> {
  const buffer = Buffer.allocUnsafeSlow(COPY_BYTES);
  const source = await open(from, 'r').catch((error) => {
    throw fileError(error, 'read', from);
  });
  try {
    const target = await OutputFile.create(to);
    try {
      for (let offset = 0; ; ) {
        const { bytesRead } = await source.read(buffer, 0, buffer.length, offset);
        if (bytesRead === 0) break;
        await target.write(buffer.subarray(0, bytesRead), offset);
        offset += bytesRead;
      }
      await target.sync();
    } finally {
      await target.close();
    }
  } catch (error) {
    throw fileError(error, 'copy', from);
  } finally {
    await source.close();
  }
}

/** Checks an output's name: `NAME.pi2` in a directory that exists. Throws `E_USAGE` or `E_FILE`. */
export async function checkOutputName(path: string): Promise<void> {
  const name = basename(path);
  if (!name.endsWith('.pi2') || name === '.pi2') {
    throw new Pi2Error(
      'E_USAGE',
      `the output ${path} is not called NAME.pi2`,
      `give -o ${path.replace(/\/+$/, '')}.pi2`,
    );
  }
  const parent = dirname(path);
  const stat = await lstat(`${parent}/.`).catch((error) => {
    throw fileError(error, 'write into', parent);
  });
  if (!stat.isDirectory()) throw new Pi2Error('E_FILE', `cannot write into ${parent}: not a directory`);
}

async function kind(path: string): Promise<'nothing' | 'model' | 'other'> {
  try {
    await lstat(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return 'nothing';
    throw fileError(error, 'look at', path);
  }
  return lstat(join(path, MANIFEST_FILE)).then(
    (stat) => (stat.isFile() ? 'model' : 'other'),
    () => 'other',
  );
}

async function syncDirectory(path: string): Promise<void> {
  const handle = await open(path, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
