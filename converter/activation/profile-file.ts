import { lstat, open, rename, rm } from 'node:fs/promises';
import { crc32 } from 'node:zlib';
import { fileError, Pi2Error } from '../../src/base/error.js';
import type { ModelDirectory } from '../../src/format/model-directory.js';
import {
  BATCH_SIZES_MOST,
  CRC_BYTES,
  damagedProfile as damaged,
  decodeProfileHeader,
  HEADER_BYTES,
  layerNeurons,
  PROFILE_MAGIC,
  PROFILE_VERSION,
  profileLayout,
  TEXT_BYTES,
} from '../../src/format/profile-header.js';
import { writeSynced } from '../write/output.js';
import { type ActivationProfile, TOKENS_MAX } from './profile.js';

/** A profile is read whole. The largest mixtures known take a quarter of this. */
const FILE_BYTES_MAX = 2 ** 31 - 1;

/** The bytes of a profile file; FORMAT.md section 5. */
export function encodeProfile(profile: ActivationProfile): Buffer {
  const { shape, texts, batches, following, shared } = profile;
  const bytes = Buffer.alloc(profileLayout(shape, texts.length).bytes);
  PROFILE_MAGIC.copy(bytes);
  const words = [PROFILE_VERSION, shape.layers, shape.experts, shape.neurons, texts.length, 0];
  for (const [i, word] of words.entries()) bytes.writeUInt32LE(word, 8 + 4 * i);
  for (const [i, count] of batches.entries()) bytes.writeBigUInt64LE(BigInt(count), 32 + 8 * i);
  Buffer.from(profile.checkpoint, 'hex').copy(bytes, 64);
  let at = HEADER_BYTES;
  for (const { sha256, tokens } of texts) {
    Buffer.from(sha256, 'hex').copy(bytes, at);
    bytes.writeBigUInt64LE(BigInt(tokens), at + 32);
    at += TEXT_BYTES;
  }
  for (let layer = 0; layer < shape.layers; layer++) {
    bytes.writeBigUInt64LE(BigInt(following[layer]), at);
    bytes.writeBigUInt64LE(BigInt(shared[layer]), at + 8);
    at += 16;
  }
  for (const counts of [profile.routed, profile.fired]) {
    Buffer.from(counts.buffer, counts.byteOffset, counts.byteLength).copy(bytes, at);
    at += counts.byteLength;
  }
  bytes.writeUInt32LE(crc32(bytes.subarray(0, at)), at);
  return bytes;
}

/** Reads the bytes of a profile file; `where` names it in errors. Throws `Pi2Error` E_PROFILE and nothing else. */
export function decodeProfile(bytes: Uint8Array, where: string): ActivationProfile {
  const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const header = decodeProfileHeader(view, view.length, where);
  const { shape } = header;
  const end = view.length - CRC_BYTES;
  if (crc32(view.subarray(0, end)) !== view.readUInt32LE(end)) throw damaged(where, 'its checksum is wrong');

  const number = (at: number) => Number(view.readBigUInt64LE(at));
  const texts = Array.from({ length: header.texts }, (_, i) => {
    const at = HEADER_BYTES + i * TEXT_BYTES;
    return { sha256: view.subarray(at, at + 32).toString('hex'), tokens: number(at + 32) };
  });
  const { overlaps, routed, fired } = profileLayout(shape, header.texts);
  const profile: ActivationProfile = {
    shape,
    checkpoint: view.subarray(64, 96).toString('hex'),
    texts,
    batches: header.batches,
    following: Array.from({ length: shape.layers }, (_, layer) => number(overlaps + 16 * layer)),
    shared: Array.from({ length: shape.layers }, (_, layer) => number(overlaps + 16 * layer + 8)),
    routed: counts(view, routed, fired),
    fired: counts(view, fired, end),
  };
  const problem = findProblem(profile);
  if (problem) throw damaged(where, problem);
  return profile;
}

/** Reads a profile file. Throws `Pi2Error`: E_FILE, E_IO, or E_PROFILE when it is none or damaged. */
export async function readProfile(path: string): Promise<ActivationProfile> {
  return decodeProfile(await readProfileBytes(path), path);
}

/** The profile that a model directory has; null when its neurons are in the order of the checkpoint. Throws `Pi2Error`. */
export async function readModelProfile(model: ModelDirectory): Promise<ActivationProfile | null> {
  if (model.profilePath === null) return null;
  try {
    return await readProfile(model.profilePath);
  } catch (error) {
    if (!(error instanceof Pi2Error) || error.code !== 'E_PROFILE') throw error;
    const hint = 'copy the directory again, or convert the checkpoint again';
    throw new Pi2Error('E_MODEL', error.message, hint, { cause: error });
  }
}

/** The bytes of what should be a profile file, not looked at yet. Throws `Pi2Error`: E_FILE, E_IO, E_PROFILE. */
export async function readProfileBytes(path: string): Promise<Buffer> {
  try {
    const file = await open(path, 'r');
    try {
      const { size } = await file.stat();
      if (size > FILE_BYTES_MAX) throw damaged(path, `it has ${size} bytes, more than any profile`);
      return await file.readFile();
    } finally {
      await file.close();
    }
  } catch (error) {
    throw fileError(error, 'read', path);
  }
}

/** Writes a profile so that a reader always finds the old file or the new one whole. Throws `Pi2Error`. */
export async function writeProfile(path: string, profile: ActivationProfile): Promise<void> {
  const unfinished = `${path}.unfinished`;
  try {
    await writeSynced(unfinished, encodeProfile(profile));
    await rename(unfinished, path);
  } catch (error) {
    await rm(unfinished, { force: true });
    throw fileError(error, 'write', path);
  }
}

/** Refuses to write over anything but an activation profile. Throws `E_EXISTS`, or what reading it throws. */
export async function requireReplaceable(path: string): Promise<void> {
  const found = await lstat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return null;
    throw fileError(error, 'look at', path);
  });
  if (found === null) return;
  const start = Buffer.alloc(PROFILE_MAGIC.length);
  if (found.isFile()) {
    const file = await open(path, 'r').catch((error: unknown) => Promise.reject(fileError(error, 'read', path)));
    await file.read(start, 0, start.length, 0).finally(() => file.close());
  }
  if (!start.equals(PROFILE_MAGIC)) {
    throw new Pi2Error('E_EXISTS', `${path} exists and is not an activation profile`, 'give another name with -o');
  }
}

/** Numbers at an offset that need not suit an array of them. */
function counts(view: Buffer, begin: number, end: number): Uint32Array {
  return new Uint32Array(Uint8Array.prototype.slice.call(view, begin, end).buffer);
}

/** The first thing that no count can be, in words: the checksum is right, so somebody wrote it wrong. */
function findProblem(profile: ActivationProfile): string | null {
  const { shape, texts, batches, following, shared, routed, fired } = profile;
  if (shape.layers < 1 || shape.experts < 1 || shape.neurons < 1) return 'a size is zero';
  const textTokens = texts.reduce((sum, text) => sum + text.tokens, 0);
  if (batches[0] > TOKENS_MAX || textTokens !== batches[0]) return 'its tokens are not those of its texts';
  if (texts.some((text, i) => i > 0 && text.sha256 <= texts[i - 1].sha256)) return 'its texts are out of order';
  if (batches.some((count, i) => i > 0 && count > batches[i - 1])) return 'it has more large batches than small ones';
  if (shared.some((count, layer) => count > following[layer])) return 'more neurons fired again than fired';
  if (routed.some((count) => count > batches[0])) return 'an expert was used by more tokens than there were';
  const table = layerNeurons(shape);
  for (let i = 0; i < fired.length; i++) {
    if (fired[i] > batches[Math.floor(i / table) % BATCH_SIZES_MOST]) return 'a neuron fired more often than it could';
  }
  return null;
}
