import type { FileHandle } from 'node:fs/promises';
import { fileError, Pi2Error } from '../../src/base/error.js';

/** Longest header that is read. The reference implementation of the format has the same limit. */
export const HEADER_BYTES_MOST = 100_000_000;

const LENGTH_BYTES = 8;

/** Bytes of a number of each type that safetensors may hold. Only F32, F16 and BF16 can be weights here. */
const TYPE_BYTES = new Map([
  ['F64', 8],
  ['F32', 4],
  ['F16', 2],
  ['BF16', 2],
  ['F8_E4M3', 1],
  ['F8_E5M2', 1],
  ['F8_E8M0', 1],
  ['I64', 8],
  ['U64', 8],
  ['I32', 4],
  ['U32', 4],
  ['I16', 2],
  ['U16', 2],
  ['I8', 1],
  ['U8', 1],
  ['BOOL', 1],
]);

/** The number types that weights may have. */
export const WEIGHT_TYPES = ['F32', 'F16', 'BF16'] as const;

/** A tensor as the header of a safetensors file describes it, checked against the file's size. */
export interface HeaderTensor {
  name: string;
  /** Any type that safetensors knows: whether the model needs the tensor is not known yet. */
  type: string;
  shape: readonly number[];
  /** From the file's first byte. */
  offset: number;
  bytes: number;
}

/**
 * Reads and checks the header of a safetensors file. `file` is its name in errors.
 * Throws `E_SAFETENSORS` that names the file, and the tensor if it is one's fault.
 */
export async function readHeader(handle: FileHandle, file: string): Promise<HeaderTensor[]> {
  let fileBytes: number;
  const length = Buffer.alloc(LENGTH_BYTES);
  try {
    fileBytes = (await handle.stat()).size;
    if (fileBytes < LENGTH_BYTES) {
      throw damaged(file, `it has ${fileBytes} bytes; a safetensors file begins with an 8-byte header length`);
    }
    await readFully(handle, length, 0, file);
    const headerBytes = checkHeaderLength(length.readBigUInt64LE(), fileBytes, file);
    const header = Buffer.alloc(headerBytes);
    await readFully(handle, header, LENGTH_BYTES, file);
    return parseHeader(header, fileBytes - LENGTH_BYTES - headerBytes, file);
  } catch (error) {
    throw fileError(error, 'read', file);
  }
}

/** Fills `target` from `offset` of the file. Throws `E_IO` when the file ends before. */
export async function readFully(handle: FileHandle, target: Uint8Array, offset: number, file: string): Promise<void> {
  let done = 0;
  while (done < target.length) {
    let bytesRead: number;
    try {
      ({ bytesRead } = await handle.read(target, done, target.length - done, offset + done));
    } catch (error) {
      throw fileError(error, 'read', file);
    }
    if (bytesRead === 0) {
      throw new Pi2Error(
        'E_IO',
        `cannot read ${file}: it ends at byte ${offset + done}, ${target.length - done} bytes too early`,
        'the file was cut short while it was being read: get it again, then run the same command again',
      );
    }
    done += bytesRead;
  }
}

function checkHeaderLength(length: bigint, fileBytes: number, file: string): number {
  if (length > BigInt(HEADER_BYTES_MOST)) {
    throw damaged(file, `its header claims ${length} bytes; at most ${HEADER_BYTES_MOST} are accepted`);
  }
  const headerBytes = Number(length);
  if (headerBytes > fileBytes - LENGTH_BYTES) {
    throw damaged(file, `its header claims ${headerBytes} bytes, but the file has only ${fileBytes}: it is truncated`);
  }
  if (headerBytes < 2) throw damaged(file, `its header claims ${headerBytes} bytes; the shortest, {}, has 2`);
  return headerBytes;
}

/**
 * Parses a header (the JSON behind the length) of a file with `dataBytes` bytes behind it. The tensors come back in order of
 * offset; they do not overlap and leave no byte out, as the format demands.
 */
export function parseHeader(header: Uint8Array, dataBytes: number, file: string): HeaderTensor[] {
  const entries = parseJsonObject(header, file);
  const dataOffset = LENGTH_BYTES + header.length;
  const tensors: HeaderTensor[] = [];
  for (const [name, entry] of Object.entries(entries)) {
    if (name === '__metadata__') continue;
    tensors.push(parseTensor(name, entry, dataOffset, dataBytes, file));
  }
  tensors.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  checkCoverage(tensors, dataOffset, dataBytes, file);
  return tensors;
}

function parseJsonObject(header: Uint8Array, file: string): object {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(header));
  } catch (error) {
    throw damaged(file, `its header is not valid JSON (${oneLine((error as Error).message)})`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw damaged(file, 'its header is not a JSON object');
  }
  return value;
}

const ENTRY_KEYS = ['dtype', 'shape', 'data_offsets'];

function parseTensor(name: string, entry: unknown, dataOffset: number, dataBytes: number, file: string): HeaderTensor {
  const wrong = (what: string) => damaged(file, `tensor ${quoted(name)} ${what}`);
  if (typeof entry !== 'object' || entry === null || Array.isArray(entry)) throw wrong('is not described by an object');
  for (const key of ENTRY_KEYS) if (!Object.hasOwn(entry, key)) throw wrong(`has no "${key}"`);
  for (const key of Object.keys(entry)) {
    if (!ENTRY_KEYS.includes(key)) throw wrong(`has an unknown key ${quoted(key)}; known: ${ENTRY_KEYS.join(', ')}`);
  }
  const { dtype, shape, data_offsets: range } = entry as { dtype: unknown; shape: unknown; data_offsets: unknown };
  const typeBytes = typeof dtype === 'string' ? TYPE_BYTES.get(dtype) : undefined;
  if (typeBytes === undefined) {
    throw wrong(`has number type ${quoted(dtype)}; weights may be ${WEIGHT_TYPES.join(', ')}`);
  }
  if (!Array.isArray(shape) || !shape.every(isSize)) {
    throw wrong(`has shape ${quoted(shape)}; expected a list of whole numbers, none negative`);
  }
  if (!Array.isArray(range) || range.length !== 2 || !range.every(isSize)) {
    throw wrong(`has data_offsets ${quoted(range)}; expected two whole numbers, none negative`);
  }
  const [begin, end] = range as [number, number];
  if (begin > end) throw wrong(`ends at byte ${end}, before it begins at ${begin}`);
  if (end > dataBytes) {
    throw wrong(`ends at byte ${end} of the data, but the file has only ${dataBytes}: it is truncated or wrong`);
  }
  // A product that is not exact is far beyond any range that passed the checks above.
  const shapeBytes = (shape as number[]).reduce((product, size) => product * size, typeBytes);
  if (shapeBytes !== end - begin) {
    throw wrong(`of type ${dtype} and shape [${shape.join(', ')}] needs ${shapeBytes} bytes, but has ${end - begin}`);
  }
  return { name, type: dtype as string, shape: shape as number[], offset: dataOffset + begin, bytes: end - begin };
}

function checkCoverage(tensors: HeaderTensor[], dataOffset: number, dataBytes: number, file: string): void {
  for (const [i, tensor] of tensors.entries()) {
    const next = tensors[i + 1];
    if (next && next.offset < tensor.offset + tensor.bytes) {
      throw damaged(file, `tensors ${quoted(tensor.name)} and ${quoted(next.name)} overlap`);
    }
  }
  let covered = dataOffset;
  for (const tensor of tensors) {
    const gap = tensor.offset - covered;
    if (gap > 0) throw damaged(file, `${gap} bytes before tensor ${quoted(tensor.name)} belong to no tensor`);
    covered += tensor.bytes;
  }
  const rest = dataOffset + dataBytes - covered;
  if (rest > 0) throw damaged(file, `its last ${rest} bytes belong to no tensor`);
}

function isSize(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function damaged(file: string, what: string): Pi2Error {
  return new Pi2Error('E_SAFETENSORS', `${file}: ${what}`, 'the file is damaged or incomplete: download it again');
}

/** A value of a file as one short line for a message: quoted, without line breaks or control characters. */
export function quoted(value: unknown): string {
  return shortened(oneLine(JSON.stringify(value) ?? 'undefined'));
}

function oneLine(text: string): string {
  return shortened(text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?'));
}

function shortened(text: string): string {
  return text.length <= 120 ? text : `${text.slice(0, 117)}...`;
}
