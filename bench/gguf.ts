/**
 * GGUF version 3, written: header, metadata, tensor infos, then the tensors' bytes, each at a multiple of 32. Little-endian.
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */
import { type FileHandle, open } from 'node:fs/promises';

/** Encodings that tensors are written in: ggml's number, weights a block, bytes a block. */
export const GGML_TYPES = {
  f32: { id: 0, blockWeights: 1, blockBytes: 4 },
  q4_0: { id: 2, blockWeights: 32, blockBytes: 18 },
  q4_1: { id: 3, blockWeights: 32, blockBytes: 20 },
  iq4_xs: { id: 23, blockWeights: 256, blockBytes: 136 },
} as const;
export type GgmlType = keyof typeof GGML_TYPES;

/** A value of metadata, with GGUF's name of its type. */
export type MetadataValue =
  | { type: 'u32' | 'f32'; value: number }
  | { type: 'string'; value: string }
  | { type: 'strings'; value: readonly string[] }
  | { type: 'f32s' | 'i32s'; value: readonly number[] };

export interface GgufTensor {
  name: string;
  /** Numbers in each dimension, the innermost (inputs of a matrix) first. */
  dimensions: readonly number[];
  type: GgmlType;
  /** Fills `bytes` with the next whole blocks of the tensor. */
  fill(bytes: Buffer): void;
}

const ALIGNMENT = 32;
const VALUE_IDS = { u32: 4, i32: 5, f32: 6, string: 8, array: 9 } as const;
/** A multiple of every block's bytes and of the alignment, about 4 MiB. */
const CHUNK_BYTES = 18 * 20 * 17 * 32 * 20;

/** Bytes of a tensor. Its innermost dimension is whole blocks. */
export function tensorBytes({ dimensions, type }: Pick<GgufTensor, 'dimensions' | 'type'>): number {
  const { blockWeights, blockBytes } = GGML_TYPES[type];
  return (dimensions.reduce((product, count) => product * count, 1) / blockWeights) * blockBytes;
}

/** Writes a file of these tensors, a few MiB in memory at a time. */
export async function writeGguf(
  path: string,
  metadata: ReadonlyMap<string, MetadataValue>,
  tensors: readonly GgufTensor[],
): Promise<void> {
  const file = await open(path, 'w');
  try {
    const head = encodeHead(metadata, tensors);
    await writeAll(file, head);
    const chunk = Buffer.allocUnsafe(CHUNK_BYTES);
    for (const tensor of tensors) {
      const bytes = tensorBytes(tensor);
      for (let done = 0; done < bytes; done += CHUNK_BYTES) {
        const piece = chunk.subarray(0, Math.min(CHUNK_BYTES, bytes - done));
        tensor.fill(piece);
        await writeAll(file, piece);
      }
      await writeAll(file, Buffer.alloc(paddingOf(bytes)));
    }
    await file.sync();
  } finally {
    await file.close();
  }
}

/** Everything before the tensors' bytes. */
function encodeHead(metadata: ReadonlyMap<string, MetadataValue>, tensors: readonly GgufTensor[]): Buffer {
  const parts = [Buffer.from('GGUF'), u32(3), u64(tensors.length), u64(metadata.size)];
  for (const [key, value] of metadata) parts.push(text(key), encodeValue(value));
  let offset = 0;
  for (const tensor of tensors) {
    parts.push(text(tensor.name), u32(tensor.dimensions.length), ...tensor.dimensions.map(u64));
    parts.push(u32(GGML_TYPES[tensor.type].id), u64(offset));
    const bytes = tensorBytes(tensor);
    offset += bytes + paddingOf(bytes);
  }
  const head = Buffer.concat(parts);
  return Buffer.concat([head, Buffer.alloc(paddingOf(head.length))]);
}

function encodeValue(entry: MetadataValue): Buffer {
  switch (entry.type) {
    case 'u32':
      return Buffer.concat([u32(VALUE_IDS.u32), u32(entry.value)]);
    case 'f32':
      return Buffer.concat([u32(VALUE_IDS.f32), Buffer.from(Float32Array.of(entry.value).buffer)]);
    case 'string':
      return Buffer.concat([u32(VALUE_IDS.string), text(entry.value)]);
    case 'strings':
      return array(VALUE_IDS.string, entry.value.length, entry.value.map(text));
    case 'f32s':
      return array(VALUE_IDS.f32, entry.value.length, [Buffer.from(Float32Array.from(entry.value).buffer)]);
    case 'i32s':
      return array(VALUE_IDS.i32, entry.value.length, [Buffer.from(Int32Array.from(entry.value).buffer)]);
  }
}

function array(id: number, count: number, parts: Buffer[]): Buffer {
  return Buffer.concat([u32(VALUE_IDS.array), u32(id), u64(count), ...parts]);
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value);
  return Buffer.concat([u64(bytes.length), bytes]);
}

function u32(value: number): Buffer {
  return Buffer.from(Uint32Array.of(value).buffer);
}

function u64(value: number): Buffer {
  return Buffer.from(BigUint64Array.of(BigInt(value)).buffer);
}

function paddingOf(bytes: number): number {
  return (ALIGNMENT - (bytes % ALIGNMENT)) % ALIGNMENT;
}

async function writeAll(file: FileHandle, bytes: Buffer): Promise<void> {
  for (let done = 0; done < bytes.length; ) done += (await file.write(bytes, done)).bytesWritten;
}
