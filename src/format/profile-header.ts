/** The head of an activation profile and where its tables are; FORMAT.md section 5. */
import { Pi2Error } from '../base/error.js';
import { expertCount, type Hyperparameters, LIMITS } from './hyperparameters.js';

/** First bytes of an activation profile. Frozen. */
export const PROFILE_MAGIC = Buffer.from('pi2prof\0', 'latin1');
/** Version that is written, and the newest that is read. */
export const PROFILE_VERSION = 1;
/** Batch sizes that a profile has counts for: 1 to this. Frozen: the file has a table for each. */
export const BATCH_SIZES_MOST = 4;
/** Bytes before the texts, of each text, and of the checksum at the end. */
export const HEADER_BYTES = 96;
export const TEXT_BYTES = 40;
export const CRC_BYTES = 4;
/** More texts than anybody merges. */
const TEXTS_MAX = 1 << 16;

const MAKE_AGAIN = 'make it again: powerinfer2 profile -m NAME.pi2 -f TEXT';

/** What is counted of. */
export interface ProfileShape {
  layers: number;
  /** 1 for a dense FFN. */
  experts: number;
  /** Of one expert. */
  neurons: number;
}

/** What the first bytes of a profile say. */
export interface ProfileHeader {
  shape: ProfileShape;
  /** Texts that were counted. */
  texts: number;
  /** `batches[b - 1]`: batches of b tokens that were counted. `batches[0]` is the number of tokens. */
  batches: number[];
}

/** Where the tables of a profile begin, and the bytes of the whole file. */
export interface ProfileLayout {
  overlaps: number;
  routed: number;
  fired: number;
  crc: number;
  bytes: number;
}

/** The shape of the profiles of a model. */
export function profileShape(h: Hyperparameters): ProfileShape {
  return { layers: h.layer_count, experts: expertCount(h), neurons: h.neuron_count };
}

/** Neurons of a layer, over its experts. */
export function layerNeurons({ experts, neurons }: ProfileShape): number {
  return experts * neurons;
}

/** Offsets of a profile of this shape with so many texts. */
export function profileLayout(shape: ProfileShape, texts: number): ProfileLayout {
  const { layers, experts } = shape;
  const overlaps = HEADER_BYTES + TEXT_BYTES * texts;
  const routed = overlaps + 16 * layers;
  const fired = routed + 4 * layers * experts;
  const crc = fired + 4 * layers * BATCH_SIZES_MOST * layerNeurons(shape);
  return { overlaps, routed, fired, crc, bytes: crc + CRC_BYTES };
}

/**
 * Reads the first `HEADER_BYTES` bytes of a profile file of `fileBytes` bytes; `where` names it in errors. Throws `Pi2Error`
 * E_PROFILE when it is none, of another version, or not as long as it says.
 */
export function decodeProfileHeader(bytes: Buffer, fileBytes: number, where: string): ProfileHeader {
  const isProfile = bytes.length >= HEADER_BYTES && bytes.subarray(0, PROFILE_MAGIC.length).equals(PROFILE_MAGIC);
  if (!isProfile || fileBytes < HEADER_BYTES + CRC_BYTES) {
    throw new Pi2Error('E_PROFILE', `${where} is not an activation profile`, MAKE_AGAIN);
  }
  const [version, layers, experts, neurons, texts] = Array.from({ length: 5 }, (_, i) => bytes.readUInt32LE(8 + 4 * i));
  if (version > PROFILE_VERSION) {
    throw new Pi2Error(
      'E_PROFILE',
      `${where} was made by a newer powerinfer2: profile version ${version}, this one reads ${PROFILE_VERSION}`,
      'update powerinfer2, or make the profile again with this version',
    );
  }
  const shape = { layers, experts, neurons };
  const possible =
    layers <= LIMITS.layers && experts <= LIMITS.experts && neurons <= LIMITS.intermediate && texts <= TEXTS_MAX;
  const expected = possible ? profileLayout(shape, texts).bytes : Number.NaN;
  if (fileBytes !== expected)
    throw damagedProfile(where, `it has ${fileBytes} bytes, its header speaks of ${expected}`);
  if (version !== PROFILE_VERSION) throw damagedProfile(where, `there is no profile version ${version}`);
  const batches = Array.from({ length: BATCH_SIZES_MOST }, (_, i) => Number(bytes.readBigUInt64LE(32 + 8 * i)));
  return { shape, texts, batches };
}

/** The error for a profile whose bytes cannot be: `what` in words. */
export function damagedProfile(where: string, what: string): Pi2Error {
  return new Pi2Error('E_PROFILE', `${where} is damaged: ${what}`, MAKE_AGAIN);
}
