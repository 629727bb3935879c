import { Pi2Error } from '../../src/base/error.js';
import type { BadNumber, EncodeRowsRequest, NativeAddon } from '../../src/engine/contract.js';
import { nativeLayout } from '../../src/engine/engine-request.js';
import { PAGE_BYTES, roundUpToPage } from '../../src/format/layout.js';
import { type NEURONS_FILE, RESIDENT_FILE } from '../../src/format/manifest.js';
import type { TensorSource } from '../checkpoint/tensor-source.js';
import { crc32Text, type Journal, type PieceRecord, type Progress, seedOf } from '../write/journal.js';
import type { OutputFile } from '../write/output.js';
import type { NeuronExtent } from './extents.js';
import { checksumRange, encodedBytes, type Load, type Piece } from './pieces.js';
import { ReadAhead } from './read-ahead.js';
import type { SourceHashes } from './source-hashes.js';

/** What the steps of a conversion work with. */
export interface Workshop {
  addon: NativeAddon;
  checkpoint: TensorSource;
  files: Record<typeof RESIDENT_FILE | typeof NEURONS_FILE, OutputFile>;
  journal: Journal;
  /** Records so far; gets those to come. */
  progress: Progress;
  /** Hears of all that is read. */
  hashes: SourceHashes;
  /** Two, as `targetBuffers` makes them. */
  targets: readonly Buffer[];
  threads: number;
  signal: AbortSignal;
  /** Hears of every load that was encoded: its piece and the bytes of the source that were. */
  onLoad: (piece: Piece, bytes: number) => void;
}

/** Two buffers that each hold any of the pieces, wherever in a page it begins, and `leastBytes`. */
export function targetBuffers(
  addon: Pick<NativeAddon, 'allocatePages'>,
  pieces: readonly Piece[],
  leastBytes: number,
): Buffer[] {
  const sizes = pieces.map((piece) => PAGE_BYTES + paddedEnd(piece) - piece.begin);
  const bytes = Math.max(PAGE_BYTES, leastBytes, ...sizes);
  return [0, 1].map(() => Buffer.from(addon.allocatePages(bytes)));
}

/**
 * Encodes and writes pieces in order. While one load is encoded and hashed the next is read, and while a piece is filled the one
 * before is written and synced: two chunks and two pieces are in memory. Stops between loads when the signal says so; what the
 * journal has recorded stays good.
 */
export async function runPieces(pieces: readonly Piece[], shop: Workshop): Promise<void> {
  const reader = new ReadAhead(
    shop.addon,
    shop.checkpoint,
    pieces.flatMap((piece) => piece.loads),
  );
  let finishing: Promise<void> = Promise.resolve();
  try {
    for (const [p, piece] of pieces.entries()) {
      // As far into a page of memory as into one of the file.
      const skipped = (piece.extent.offset + piece.begin) % PAGE_BYTES;
      const target = shop.targets[p % 2].subarray(skipped, skipped + paddedEnd(piece) - piece.begin);
      target.fill(0);
      for (const load of piece.loads) {
        shop.signal.throwIfAborted();
        const chunk = await reader.next();
        await settled(encode(load, chunk.bytes, target, shop), shop.hashes.take(chunk, shop.signal));
        shop.onLoad(piece, encodedBytes(load));
      }
      await finishing;
      finishing = finish(piece, target, shop);
      // Its failure is met by the next await; until then it is not unhandled.
      finishing.catch(() => undefined);
    }
  } finally {
    await reader.settle();
    await finishing;
  }
}

/** Encodes one load into its piece. Throws `E_NOT_FINITE` at a number that cannot be stored. */
async function encode(load: Load, source: Uint8Array, target: Uint8Array, shop: Workshop): Promise<void> {
  const request: EncodeRowsRequest = {
    source,
    sourceType: load.source.type,
    rows: load.rows,
    columns: load.columns,
    encoding: load.encoding,
    target: target.subarray(load.begin, load.end),
    placement: load.placement,
    firstVector: load.firstVector,
    ...(load.order ? { order: load.order } : {}),
    threads: shop.threads,
  };
  const bad =
    load.vectors === 'rows'
      ? await shop.addon.encodeRows(request)
      : await shop.addon.encodeColumns({ ...request, firstElement: load.firstRow, tiles: load.tiles });
  if (bad) throw badNumberError(load, bad);
}

/** Checksums a piece and writes it, at the same time, and records it in the journal once it is on disk. */
async function finish(piece: Piece, target: Uint8Array, shop: Workshop): Promise<void> {
  const { extent } = piece;
  const before = shop.progress.pieces.get(extent.name);
  const file = shop.files[extent.file];
  const [crc, sums] = await settled(
    shop.addon.crc32(target.subarray(0, piece.end - piece.begin), seedOf(before?.crc32)),
    extent.kind === 'neurons' ? writeChecksums(piece, extent, target, seedOf(before?.checksums_crc32), shop) : null,
    file.writePages(target, extent.offset + piece.begin).then(() => file.sync()),
  );
  const record: PieceRecord = { extent: extent.name, done: piece.end, crc32: crc32Text(crc) };
  if (sums !== null) record.checksums_crc32 = crc32Text(sums);
  await shop.journal.record(record);
  shop.progress.pieces.set(extent.name, record);
}

/** What the tasks come to, once all have ended: their memory is used again. Throws what the first that failed did. */
async function settled<T extends readonly unknown[]>(...tasks: T): Promise<{ [i in keyof T]: Awaited<T[i]> }> {
  const results = await Promise.allSettled(tasks);
  for (const result of results) if (result.status === 'rejected') throw result.reason;
  return Promise.all(tasks) as Promise<{ [i in keyof T]: Awaited<T[i]> }>;
}

/** Writes the checksums of a piece's neurons; returns the CRC-32 of the layer's so far. */
async function writeChecksums(
  piece: Piece,
  extent: NeuronExtent,
  target: Uint8Array,
  seed: number,
  shop: Workshop,
): Promise<number> {
  const { begin, end } = checksumRange(piece);
  const { checksums } = extent;
  const bytes = Buffer.alloc((end === checksums.bytes ? roundUpToPage(end) : end) - begin);
  await fillChecksums(piece, extent, target, bytes, shop);
  const file = shop.files[RESIDENT_FILE];
  await file.write(bytes, checksums.offset + begin);
  await file.sync();
  return shop.addon.crc32(bytes.subarray(0, end - begin), seed);
}

async function fillChecksums(
  piece: Piece,
  extent: NeuronExtent,
  target: Uint8Array,
  bytes: Buffer,
  shop: Workshop,
): Promise<void> {
  const { layout } = extent;
  let offset = 0;
  for (const range of piece.ranges) {
    const sums = await shop.addon.bundleChecksums({
      units: target.subarray(range.begin, range.end),
      neurons: range.neurons,
      layout: nativeLayout(layout),
      threads: shop.threads,
    });
    for (const sum of sums) offset = bytes.writeUInt32LE(sum, offset);
  }
}

/** The end of a piece in its extent, with the zeros that fill the extent's last page. */
function paddedEnd(piece: Piece): number {
  return piece.end === piece.extent.bytes ? roundUpToPage(piece.end) : piece.end;
}

function badNumberError(load: Load, bad: BadNumber): Pi2Error {
  const row = load.rowList ? load.rowList[bad.row] : load.firstRow + bad.row;
  const column = load.firstColumn + bad.column;
  // A vector is read as a matrix of one row, or of one column.
  const isVector = load.source.shape.length === 1 || load.source.shape[1] === 1;
  const place = isVector ? `element ${row + column}` : `row ${row}, column ${column}`;
  if (!Number.isFinite(bad.value)) {
    return new Pi2Error(
      'E_NOT_FINITE',
      `${load.source.name}: ${place} is ${bad.value}, not a number that a model can compute with`,
      'the checkpoint is damaged: download or export it again',
    );
  }
  return new Pi2Error(
    'E_NOT_FINITE',
    `${load.source.name}: ${place} is ${bad.value}, too large for ${load.encoding}`,
    load.encoding === 'f16' ? 'convert with --quant q8' : 'the checkpoint is damaged: download or export it again',
  );
}
