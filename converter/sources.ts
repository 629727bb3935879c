import { createHash } from 'node:crypto';
import { open, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { fileError, Pi2Error } from '../src/base/error.js';
import type { TensorSource } from './checkpoint/tensor-source.js';

const BUFFER_BYTES = 1024 * 1024;

/** What tells one state of a source file from another. */
export interface SourceState {
  file: string;
  bytes: number;
  /** Time of the last change, nanoseconds since 1970, as decimal digits. */
  modified_ns: string;
}

/** Size and time of change of each file of a directory. */
export async function sourceStates(directory: string, files: readonly string[]): Promise<SourceState[]> {
  return Promise.all(
    files.map(async (file) => {
      const path = join(directory, file);
      const found = await stat(path, { bigint: true }).catch((error) => {
        throw fileError(error, 'read', path);
      });
      return { file, bytes: Number(found.size), modified_ns: String(found.mtimeNs) };
    }),
  );
}

/** Throws `E_CHANGED` if a file is no longer in the state it was in. */
export async function checkUnchanged(source: TensorSource, before: readonly SourceState[]): Promise<void> {
  const now = await source.states();
  for (const [i, state] of before.entries()) {
    const isSame = state.bytes === now[i].bytes && state.modified_ns === now[i].modified_ns;
    if (!isSame) throw changed(source.directory, state.file);
  }
}

/**
 * sha256 of one source, read in small pieces: hashing blocks JavaScript for about a millisecond at a time. Throws
 * `E_CHANGED` if the file has not the size it had, and the signal's reason when that is aborted.
 */
export async function hashSource(directory: string, source: SourceState, signal: AbortSignal): Promise<string> {
  const path = join(directory, source.file);
  const hash = createHash('sha256');
  try {
    const handle = await open(path, 'r');
    try {
      const buffer = Buffer.allocUnsafeSlow(Math.min(BUFFER_BYTES, source.bytes + 1));
      let total = 0;
      for (;;) {
        signal.throwIfAborted();
        const { bytesRead } = await handle.read(buffer, 0, buffer.length, total);
        if (bytesRead === 0) break;
        hash.update(buffer.subarray(0, bytesRead));
        total += bytesRead;
      }
      if (total !== source.bytes) throw changed(directory, source.file);
    } finally {
      await handle.close();
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw fileError(error, 'read', path);
  }
  return hash.digest('hex');
}

function changed(directory: string, file: string): Pi2Error {
  return new Pi2Error(
    'E_CHANGED',
    `${join(directory, file)} has changed while it was converted`,
    'run the command again when nothing writes to the checkpoint any more',
  );
}
