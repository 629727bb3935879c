import { open } from 'node:fs/promises';
import { fileError, Pi2Error } from '../base/error.js';

/** More text than anybody evaluates; bounds the memory that a wrong file can take. */
const TEXT_BYTES_MAX = 256 * 1024 * 1024;
const PIECE_BYTES = 64 * 1024;

/** Reads a UTF-8 text file (or pipe). Throws `Pi2Error`: E_FILE, E_IO, or E_TEXT when it is not text or too large. */
export async function readTextFile(file: string): Promise<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
  const parts: string[] = [];
  let total = 0;
  try {
    const handle = await open(file, 'r');
    try {
      const piece = new Uint8Array(PIECE_BYTES);
      for (;;) {
        const { bytesRead } = await handle.read(piece, 0, PIECE_BYTES, null);
        parts.push(decodePiece(decoder, piece.subarray(0, bytesRead), bytesRead > 0, file, total));
        total += bytesRead;
        if (bytesRead === 0) return parts.join('');
        if (total > TEXT_BYTES_MAX)
          throw new Pi2Error('E_TEXT', `${file} is larger than ${TEXT_BYTES_MAX} bytes`, 'cut it');
      }
    } finally {
      await handle.close();
    }
  } catch (error) {
    throw fileError(error, 'read', file);
  }
}

function decodePiece(
  decoder: InstanceType<typeof TextDecoder>,
  piece: Uint8Array,
  more: boolean,
  file: string,
  offset: number,
): string {
  try {
    return decoder.decode(piece, { stream: more });
  } catch (error) {
    const where = piece.length > 0 ? `between byte ${offset} and ${offset + piece.length}` : 'at its end';
    throw new Pi2Error('E_TEXT', `${file} is not UTF-8 text: wrong bytes ${where}`, 'convert it to UTF-8 first', {
      cause: error,
    });
  }
}
