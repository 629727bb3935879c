import { formatBytes } from '../../src/base/bytes.js';
import { Pi2Error } from '../../src/base/error.js';
import { conversionOrder, type Plan } from './extents.js';
import { type Limits, leastLimits } from './pieces.js';

/**
 * What the process grows by besides its two chunks and two pieces: JavaScript objects between collections, threads of the
 * encoder, the hashing buffer, journal and manifest.
 */
const OVERHEAD_BYTES = 56 * 1024 * 1024;
const MOST_CHUNK_BYTES = 16 * 1024 * 1024;
/** Smaller ones would be correct too, but slow. */
const LEAST_CHUNK_BYTES = 1024 * 1024;
const LEAST_PIECE_BYTES = 2 * 1024 * 1024;

/**
 * Divides a memory ceiling: `usedBytes` are resident before conversion begins; of the rest, beyond overhead, two chunks
 * (one is read while the other is encoded) and two pieces (one is written while the other is filled) are made.
 * Throws `E_MEMORY` with the least ceiling that would do. A piece's memory is used again for something that takes
 * `packBytes`.
 */
export function divideMemory(plan: Plan, ceilingBytes: number, usedBytes: number, packBytes: number): Limits {
  const least = { pieceBytes: Math.max(packBytes, LEAST_PIECE_BYTES), chunkBytes: LEAST_CHUNK_BYTES };
  for (const extent of conversionOrder(plan)) {
    const { pieceBytes, chunkBytes } = leastLimits(extent);
    least.pieceBytes = Math.max(least.pieceBytes, pieceBytes);
    least.chunkBytes = Math.max(least.chunkBytes, chunkBytes);
  }
  const available = ceilingBytes - usedBytes - OVERHEAD_BYTES;
  const needed = 2 * (least.pieceBytes + least.chunkBytes);
  if (available < needed) {
    const mebibyte = 1024 * 1024;
    const enough = Math.ceil((usedBytes + OVERHEAD_BYTES + needed) / (16 * mebibyte) + 0.5) * 16;
    throw new Pi2Error(
      'E_MEMORY',
      `a memory ceiling of ${formatBytes(ceilingBytes)} is too small for this checkpoint`,
      `give at least --max-ram ${enough}M`,
    );
  }
  const chunkBytes = Math.max(least.chunkBytes, Math.min(MOST_CHUNK_BYTES, Math.floor(available / 8)));
  const pieceBytes = Math.max(least.pieceBytes, Math.floor(available / 2) - chunkBytes);
  return chunkBytes + pieceBytes > available / 2 ? least : { pieceBytes, chunkBytes };
}
