import { createHash } from 'node:crypto';
import { type FileHandle, mkdir, open, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileError } from '../src/base/error.js';
import { type Random, seededRandom } from '../src/engine/random.js';
import { configOf, type RowWriter, type Shape, type SyntheticTensor, tensorsOf } from './shapes.js';
import { SparseStream } from './sparse-stream.js';

/** Raised when the same shape and seed give other bytes than before: an older checkpoint is then made anew. */
const GENERATOR_VERSION = 2;
/** Says what was generated; written last, so that a checkpoint with it is complete. */
const MARK_FILE = 'synthetic.json';
const SHARD_BYTES = 1_000_000_000;
/**
 * Random numbers made: a prime, so that no row length divides it and each row of a matrix begins elsewhere in the block.
 */
const BLOCK_NUMBERS = 1_048_573;
const BYTES_PER_NUMBER = 2;
const ROWS_PER_WRITE = 256;

/**
 * Makes a synthetic checkpoint of `shape` in `directory`: config.json and sharded bf16 safetensors, no tokenizer. Its weights
 * mean nothing; they have the sizes, types and spread of a real model's. Every tensor is one block of normal numbers,
 * repeated from a place of its own: making a number costs far more than writing it. Same shape and seed, same bytes. A
 * complete checkpoint that is there is left as it is. Returns whether one was made. Throws `Pi2Error`.
 */
export async function generateCheckpoint(shape: Shape, seed: number, directory: string): Promise<boolean> {
  const mark = JSON.stringify({ synthetic: true, generator_version: GENERATOR_VERSION, seed, shape });
  if ((await readIfThere(join(directory, MARK_FILE))) === mark) return false;
  const partial = `${directory}.partial`;
  try {
    for (const path of [directory, partial]) await rm(path, { recursive: true, force: true });
    await mkdir(partial, { recursive: true });
    await writeShards(shape, new NumberBlock(seed), partial);
    await writeFile(join(partial, 'config.json'), JSON.stringify(configOf(shape), null, 2));
    await writeFile(join(partial, MARK_FILE), mark);
    await rename(partial, directory);
  } catch (error) {
    await rm(partial, { recursive: true, force: true });
    throw fileError(error, 'write the synthetic checkpoint', directory);
  }
  return true;
}

/** One block of normal numbers, as bf16 of each deviation that was asked for. */
class NumberBlock {
  readonly #numbers = new Float32Array(BLOCK_NUMBERS);
  readonly #seed: number;
  readonly #encoded = new Map<number, Uint8Array>();

  constructor(seed: number) {
    this.#seed = seed;
    const random = seededRandom(seed);
    for (let i = 0; i < BLOCK_NUMBERS; i++) this.#numbers[i] = normal(random);
  }

  /** The block as bf16 bytes, each number times `deviation`. */
  encoded(deviation: number): Uint8Array {
    let bytes = this.#encoded.get(deviation);
    if (!bytes) {
      bytes = toBf16(this.#numbers.map((number) => number * deviation));
      this.#encoded.set(deviation, bytes);
    }
    return bytes;
  }

  /** A copy of `count` bf16 numbers from number `start` on, the block repeated. */
  numbers(deviation: number, start: number, count: number): Uint16Array {
    const bytes = this.encoded(deviation);
    const block = new Uint16Array(bytes.buffer, bytes.byteOffset, BLOCK_NUMBERS);
    const copy = new Uint16Array(count);
    for (let done = 0; done < count; ) {
      const from = (start + done) % BLOCK_NUMBERS;
      const piece = block.subarray(from, from + count - done);
      copy.set(piece, done);
      done += piece.length;
    }
    return copy;
  }

  /** Where a tensor begins in the block, in numbers: the same whenever it is asked for. */
  start(tensor: string): number {
    const hash = createHash('sha256').update(`${this.#seed} ${tensor}`).digest();
    return hash.readUInt32LE(0) % BLOCK_NUMBERS;
  }
}

/** A normal number of deviation 1, by Box and Muller. */
function normal(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

/** Rounds to nearest even. Little-endian, as safetensors wants. */
function toBf16(numbers: Float32Array): Uint8Array {
  const bits = new Uint32Array(numbers.buffer);
  const bytes = Buffer.alloc(numbers.length * BYTES_PER_NUMBER);
  for (let i = 0; i < bits.length; i++) {
    bytes.writeUInt16LE((bits[i] + 0x7fff + ((bits[i] >>> 16) & 1)) >>> 16, i * BYTES_PER_NUMBER);
  }
  return bytes;
}

async function writeShards(shape: Shape, block: NumberBlock, directory: string): Promise<void> {
  // Gates and predictors have numbers in common.
  const numbersOf = (tensor: string, from: number, count: number): Uint16Array => {
    const gate = tensors.find(({ name }) => name === tensor) as SyntheticTensor;
    return block.numbers(gate.deviation as number, block.start(tensor) + from, count);
  };
  const tensors = tensorsOf(shape, shape.activation === 'drelu' ? new SparseStream(shape, numbersOf) : null);
  const shards = cutShards(tensors);
  const weightMap: Record<string, string> = {};
  let totalBytes = 0;
  for (const [i, tensors] of shards.entries()) {
    const number = (n: number) => String(n).padStart(5, '0');
    const file = `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`;
    await writeShard(tensors, block, join(directory, file));
    for (const tensor of tensors) {
      weightMap[tensor.name] = file;
      totalBytes += tensorBytes(tensor);
    }
  }
  const index = { metadata: { total_size: totalBytes }, weight_map: weightMap };
  await writeFile(join(directory, 'model.safetensors.index.json'), JSON.stringify(index, null, 2));
}

/** Tensors in order, as many a shard as `SHARD_BYTES` hold, at least one. */
function cutShards(tensors: SyntheticTensor[]): SyntheticTensor[][] {
  const shards: SyntheticTensor[][] = [[]];
  let bytes = 0;
  for (const tensor of tensors) {
    if (bytes > 0 && bytes + tensorBytes(tensor) > SHARD_BYTES) {
      shards.push([]);
      bytes = 0;
    }
    shards[shards.length - 1].push(tensor);
    bytes += tensorBytes(tensor);
  }
  return shards;
}

function tensorBytes(tensor: SyntheticTensor): number {
  return tensor.shape.reduce((product, size) => product * size, BYTES_PER_NUMBER);
}

async function writeShard(tensors: SyntheticTensor[], block: NumberBlock, path: string): Promise<void> {
  const file = await open(path, 'w');
  try {
    await file.writeFile(shardHeader(tensors));
    for (const tensor of tensors) {
      if (tensor.deviation === 'ones') await file.writeFile(toBf16(new Float32Array(tensor.shape[0]).fill(1)));
      else if (tensor.writeRow) await writeRows(file, tensor, tensor.writeRow, block);
      else {
        const start = BYTES_PER_NUMBER * block.start(tensor.name);
        await writeRepeated(file, block.encoded(tensor.deviation), start, tensorBytes(tensor));
      }
    }
  } finally {
    await file.close();
  }
}

/** The header of a safetensors file: its length, then JSON padded with spaces to a multiple of 8. */
function shardHeader(tensors: SyntheticTensor[]): Buffer {
  let offset = 0;
  const entries = tensors.map((tensor) => {
    const begin = offset;
    offset += tensorBytes(tensor);
    return [tensor.name, { dtype: 'BF16', shape: tensor.shape, data_offsets: [begin, offset] }];
  });
  const json = JSON.stringify(Object.fromEntries([['__metadata__', { format: 'pt' }], ...entries]));
  const text = Buffer.from(json.padEnd(Math.ceil(json.length / 8) * 8));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text]);
}

/** Writes `bytes` bytes: `block` from `start` on, over and over. */
async function writeRepeated(file: FileHandle, block: Uint8Array, start: number, bytes: number): Promise<void> {
  for (let left = bytes, at = start; left > 0; at = 0) {
    const piece = block.subarray(at, Math.min(block.length, at + left));
    await file.writeFile(piece);
    left -= piece.length;
  }
}

/** Writes a matrix of random numbers whose rows are changed one by one. */
async function writeRows(
  file: FileHandle,
  tensor: SyntheticTensor,
  writeRow: RowWriter,
  block: NumberBlock,
): Promise<void> {
  const [rows, columns] = tensor.shape;
  const start = block.start(tensor.name);
  for (let first = 0; first < rows; first += ROWS_PER_WRITE) {
    const count = Math.min(ROWS_PER_WRITE, rows - first);
    const piece = block.numbers(tensor.deviation as number, start + first * columns, count * columns);
    for (let i = 0; i < count; i++) writeRow(first + i, piece.subarray(i * columns, (i + 1) * columns));
    await file.writeFile(new Uint8Array(piece.buffer));
  }
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch {
    return undefined;
  }
}
