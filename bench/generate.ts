import { mkdir, open, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileError } from '../src/base/error.js';
import type { SyntheticCheckpoint } from './synthetic-checkpoint.js';

/** Says what was generated; written last, so that a checkpoint with it is complete. */
const MARK_FILE = 'synthetic.json';

/**
 * Writes a synthetic checkpoint to its directory, for what needs one on disk. A complete one that is there is left as it is.
 * Returns whether one was made. Throws `Pi2Error`.
 */
export async function generateCheckpoint(checkpoint: SyntheticCheckpoint): Promise<boolean> {
  const { directory, mark, files } = checkpoint;
  if ((await readIfThere(join(directory, MARK_FILE))) === mark) return false;
  const partial = `${directory}.partial`;
  try {
    for (const path of [directory, partial]) await rm(path, { recursive: true, force: true });
    await mkdir(partial, { recursive: true });
    for (const name of files) {
      const file = await open(join(partial, name), 'w');
      try {
        for (const piece of checkpoint.content(name)) await file.writeFile(piece);
      } finally {
        await file.close();
      }
    }
    await writeFile(join(partial, MARK_FILE), mark);
    await rename(partial, directory);
  } catch (error) {
    await rm(partial, { recursive: true, force: true });
    throw fileError(error, 'write the synthetic checkpoint', directory);
  }
  return true;
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch {
    return undefined;
  }
}
