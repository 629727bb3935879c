import { type FileHandle, open, readFile } from 'node:fs/promises';
import { z } from 'zod';
import { fileError } from '../../src/base/error.js';

const hex32 = z.string().regex(/^[0-9a-f]{8}$/);
const bytes = z.number().int().min(0).max(Number.MAX_SAFE_INTEGER);

/** What a conversion was made from and how; another one's journal is of no use. */
const headerSchema = z.strictObject({
  journal: z.literal(1),
  format_version: z.number(),
  converter: z.string(),
  recipe: z.record(z.string(), z.union([z.string(), z.number()])),
  /** sha256 of the activation profile that neurons are sorted by; null for the order of the checkpoint. */
  profile: z.string().nullable(),
  /** Where predictors come from, and the text they are made with; null for none. */
  predictor: z.strictObject({ source: z.string(), text_sha256: z.string() }).nullable(),
  checkpoint: z.string(),
  sources: z.array(z.strictObject({ file: z.string(), bytes, modified_ns: z.string() })),
});

const pieceSchema = z.strictObject({
  extent: z.string(),
  /** Bytes of the extent that are written and synced. */
  done: bytes,
  /** CRC-32 of those bytes. */
  crc32: hex32,
  /** Of neurons: CRC-32 of the layer's checksums so far. */
  checksums_crc32: hex32.optional(),
});

const sourceSchema = z.strictObject({ source: z.string(), sha256: z.string().regex(/^[0-9a-f]{64}$/) });

export type JournalHeader = z.infer<typeof headerSchema>;
export type PieceRecord = z.infer<typeof pieceSchema>;
export type SourceRecord = z.infer<typeof sourceSchema>;

/** How far a conversion has come. */
export interface Progress {
  /** The last record of each extent. */
  pieces: Map<string, PieceRecord>;
  /** sha256 of the sources that are hashed, by file. */
  hashes: Map<string, string>;
}

/**
 * The record of finished conversion steps: JSON lines, first a header, then a line a step, appended after the step's bytes
 * are on disk. A process killed while it appends leaves a torn last line, which is cut off.
 */
export class Journal {
  readonly #handle: FileHandle;
  readonly #path: string;

  private constructor(handle: FileHandle, path: string) {
    this.#handle = handle;
    this.#path = path;
  }

  /** Begins a new journal. */
  static async create(path: string, header: JournalHeader): Promise<Journal> {
    try {
      const journal = new Journal(await open(path, 'w'), path);
      await journal.#append(header);
      await journal.#handle.datasync();
      return journal;
    } catch (error) {
      throw fileError(error, 'write', path);
    }
  }

  /**
   * Reads a journal and opens it for more. Null when there is none, when it is damaged, or when its header is another's:
   * `reason` says which.
   */
  static async resume(
    path: string,
    header: JournalHeader,
  ): Promise<{ journal: Journal; progress: Progress } | { journal: null; reason: string | null }> {
    let text: string;
    try {
      text = await readFile(path, 'utf8');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return { journal: null, reason: null };
      throw fileError(error, 'read', path);
    }
    const whole = text.slice(0, text.lastIndexOf('\n') + 1);
    const [first, ...lines] = whole.split('\n').slice(0, -1);
    const found = headerSchema.safeParse(parse(first ?? ''));
    if (!found.success) return { journal: null, reason: 'its journal is damaged' };
    const difference = compareHeaders(found.data, header);
    if (difference) return { journal: null, reason: difference };
    const progress: Progress = { pieces: new Map(), hashes: new Map() };
    for (const line of lines) {
      const value = parse(line);
      const piece = pieceSchema.safeParse(value);
      const source = sourceSchema.safeParse(value);
      if (piece.success) progress.pieces.set(piece.data.extent, piece.data);
      else if (source.success) progress.hashes.set(source.data.source, source.data.sha256);
      else return { journal: null, reason: 'its journal is damaged' };
    }
    try {
      const handle = await open(path, 'r+');
      await handle.truncate(Buffer.byteLength(whole));
      await handle.close();
      return { journal: new Journal(await open(path, 'a'), path), progress };
    } catch (error) {
      throw fileError(error, 'write', path);
    }
  }

  async record(line: PieceRecord | SourceRecord): Promise<void> {
    try {
      await this.#append(line);
    } catch (error) {
      throw fileError(error, 'write', this.#path);
    }
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }

  async #append(value: object): Promise<void> {
    await this.#handle.appendFile(`${JSON.stringify(value)}\n`);
  }
}

/** A CRC-32 as manifest and journal write it. */
export function crc32Text(crc: number): string {
  return (crc >>> 0).toString(16).padStart(8, '0');
}

/** What a CRC-32 continues from: the one before, or nothing. */
export function seedOf(text: string | undefined): number {
  return text ? Number.parseInt(text, 16) : 0;
}

function parse(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return undefined;
  }
}

function compareHeaders(found: JournalHeader, wanted: JournalHeader): string | null {
  const same = (key: keyof JournalHeader) => JSON.stringify(found[key]) === JSON.stringify(wanted[key]);
  if (!same('format_version') || !same('converter')) return 'it was begun by another version of this program';
  if (!same('checkpoint')) return `it was begun from ${found.checkpoint}`;
  if (found.recipe.name === wanted.recipe.name && found.recipe.down_tiles !== wanted.recipe.down_tiles) {
    return found.recipe.down_tiles === undefined ? 'it was begun without --npu' : 'it was begun with --npu';
  }
  if (!same('recipe')) return `it was begun with --quant ${found.recipe.name ?? 'of another kind'}`;
  if (!same('profile')) {
    return found.profile === null ? 'it was begun without a profile' : 'it was begun with another profile';
  }
  if (!same('predictor')) return 'it was begun with another predictor or calibration text';
  if (!same('sources')) return 'the checkpoint has changed since';
  return null;
}
