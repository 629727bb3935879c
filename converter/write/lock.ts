import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { link, readdir, readFile, rename, rm, unlink, writeFile } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { fileError, Pi2Error } from '../../src/base/error.js';

/**
 * Keeps a second converter off the same output. The lock is a file beside it that names its owner by process id and start
 * time; the lock of a process that is gone is taken over.
 */
export class Lock {
  readonly #path: string;

  private constructor(path: string) {
    this.#path = path;
  }

  /** Throws `E_EXISTS` when a living process holds the lock. */
  static async take(path: string): Promise<Lock> {
    const owner = `${process.pid} ${startTime(process.pid)}\n`;
    const own = `${path}.${process.pid}-${randomUUID()}`;
    try {
      await writeFile(own, owner);
      for (;;) {
        try {
          // A link appears with its content or not at all: nobody reads a lock that is still empty.
          await link(own, path);
          await removeAbandoned(path);
          return new Lock(path);
        } catch (error) {
          if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
        }
        await removeIfStale(path, `${own}.stale`);
      }
    } catch (error) {
      throw fileError(error, 'lock', path);
    } finally {
      await rm(own, { force: true });
    }
  }

  async release(): Promise<void> {
    await unlink(this.#path).catch(() => undefined);
  }
}

/** Removes what processes that were killed while they took this lock have left beside it: `LOCK.PID-…`. */
async function removeAbandoned(path: string): Promise<void> {
  const prefix = `${basename(path)}.`;
  for (const name of await readdir(dirname(path)).catch(() => [])) {
    const pid = name.startsWith(prefix) ? /^(\d+)-/.exec(name.slice(prefix.length))?.[1] : undefined;
    if (pid !== undefined && !isAlive(Number(pid), '')) await rm(join(dirname(path), name), { force: true });
  }
}

/** Throws `E_EXISTS` if the lock's owner lives; else removes it. */
async function removeIfStale(path: string, aside: string): Promise<void> {
  const text = await readIfThere(path);
  if (text === null) return;
  const [pid, started] = text.trim().split(' ');
  if (isAlive(Number(pid), started)) {
    throw new Pi2Error(
      'E_EXISTS',
      `another conversion is writing this model (process ${pid}; its lock is ${path})`,
      'wait for it to end, or give another name with -o',
    );
  }
  try {
    await rename(path, aside);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
    throw error;
  }
  // Another process may have taken the stale lock over just before the rename: then this is its lock, and goes back.
  if ((await readIfThere(aside)) !== text) await link(aside, path).catch(() => undefined);
  await unlink(aside);
}

async function readIfThere(path: string): Promise<string | null> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw error;
  }
}

function isAlive(pid: number, started: string | undefined): boolean {
  if (!Number.isSafeInteger(pid) || pid < 1) return false;
  try {
    process.kill(pid, 0);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
  }
  const now = startTime(pid);
  return now === started || now === '' || started === '';
}

/**
 * When a process started, in clock ticks since boot, or an empty text where /proc does not tell: two processes that had the
 * same id one after another differ in it.
 */
function startTime(pid: number): string {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    // The second field, the program's name in brackets, may hold spaces and brackets; field 22 is the start time.
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? '';
  } catch {
    return '';
  }
}
