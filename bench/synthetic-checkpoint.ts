import { createHash } from 'node:crypto';
import { basename, join } from 'node:path';
import { Config } from '../converter/checkpoint/config.js';
import { readHyperparameters } from '../converter/checkpoint/families.js';
import { CONFIG_FILE, INDEX_FILE } from '../converter/checkpoint/files.js';
import type { SourceModel, SourceTensor } from '../converter/checkpoint/model.js';
import { findPredictors, type SourcePredictor } from '../converter/checkpoint/predictors.js';
import type { TensorSource } from '../converter/checkpoint/tensor-source.js';
import { findTensors, type LocatedTensor } from '../converter/checkpoint/tensors.js';
import type { SourceState } from '../converter/sources.js';
import type { Setting } from './activation-settings.js';
import { NumberBlock, toBf16 } from './number-block.js';
import { configOf, type Shape } from './shapes.js';
import { SparseStream } from './sparse-stream.js';
import { type SyntheticTensor, tensorsOf } from './tensors.js';

/** Raised when the same shape and seed give other bytes than before: what an older version made is then made anew. */
const GENERATOR_VERSION = 3;
const SHARD_BYTES = 1_000_000_000;
const BYTES_PER_NUMBER = 2;
/** Of a file, made at once. */
const PIECE_NUMBERS = 512 * 1024;

/** What a synthetic model is made of. */
export interface SyntheticRecipe {
  shape: Shape;
  /** How neurons fire; null for a shape whose neurons all do. */
  setting: Setting | null;
  seed: number;
}

/** A file of the checkpoint: its small content as it is, or a header and tensors. */
interface SyntheticFile {
  name: string;
  head: Uint8Array;
  tensors: readonly SyntheticTensor[];
}

/**
 * A checkpoint of random weights that is on no disk: config.json and sharded bf16 safetensors, no tokenizer, every part made
 * when it is asked for. Its weights mean nothing; they have the sizes, types and spread of a real model's. Same recipe, same
 * bytes, whether read tensor by tensor or as files.
 */
export class SyntheticCheckpoint implements TensorSource {
  readonly name: string;
  readonly shape: Shape;
  readonly model: SourceModel;
  readonly textFiles: readonly string[] = [];
  /** Null for a shape whose neurons all fire. */
  readonly stream: SparseStream | null;
  /** Says what is made: another mark, other bytes. */
  readonly mark: string;
  readonly #block: NumberBlock;
  readonly #files: readonly SyntheticFile[];
  readonly #tensors: ReadonlyMap<string, SyntheticTensor>;
  readonly #located: ReadonlyMap<string, LocatedTensor>;
  readonly #hashes = new Map<string, Promise<string>>();
  #row = new Uint16Array();

  /** `directory`: where it is, or would be. */
  constructor(
    { shape, setting, seed }: SyntheticRecipe,
    readonly directory: string,
  ) {
    this.shape = shape;
    this.name = basename(directory);
    this.mark = JSON.stringify({ synthetic: true, generator_version: GENERATOR_VERSION, seed, setting, shape });
    this.#block = new NumberBlock(seed);
    this.stream = setting && new SparseStream(shape, setting, this.#block);
    const tensors = tensorsOf(shape, this.stream);
    this.#tensors = new Map(tensors.map((tensor) => [tensor.name, tensor]));
    const config = configOf(shape);
    const shards = cutShards(tensors);
    const number = (n: number) => String(n).padStart(5, '0');
    const nameOf = (shard: number) => `model-${number(shard + 1)}-of-${number(shards.length)}.safetensors`;
    this.#files = [
      { name: CONFIG_FILE, head: asJson(config), tensors: [] },
      { name: INDEX_FILE, head: indexOf(shards, nameOf), tensors: [] },
      ...shards.map((own, i) => ({ name: nameOf(i), head: shardHeader(own), tensors: own })),
    ];
    this.#located = new Map(
      this.#files.flatMap(({ name: file, tensors: own }) =>
        own.map(({ name, shape }) => [name, { name, type: 'BF16', shape, offset: 0, bytes: 0, file }]),
      ),
    );
    this.model = findTensors(
      readHyperparameters(new Config(config, join(directory, CONFIG_FILE)), null),
      this.#located,
    );
  }

  /** Bytes of all files. */
  get totalBytes(): number {
    return this.#files.reduce((sum, file) => sum + fileBytes(file), 0);
  }

  /** Names of all files. */
  get files(): string[] {
    return this.#files.map(({ name }) => name);
  }

  /** The content of a file, piece by piece; a piece is good until the next one is asked for. */
  *content(name: string): Generator<Uint8Array> {
    const { head, tensors } = this.#files.find((file) => file.name === name) as SyntheticFile;
    yield head;
    const piece = new Uint16Array(tensors.length > 0 ? PIECE_NUMBERS : 0);
    for (const tensor of tensors) {
      const count = tensorBytes(tensor) / BYTES_PER_NUMBER;
      for (let first = 0; first < count; first += PIECE_NUMBERS) {
        const part = piece.subarray(0, Math.min(PIECE_NUMBERS, count - first));
        this.#fill(tensor, first, part);
        yield new Uint8Array(part.buffer, 0, part.byteLength);
      }
    }
  }

  bytes({ name }: SourceTensor): number {
    return tensorBytes(this.#tensors.get(name) as SyntheticTensor);
  }

  async read({ name }: SourceTensor, byteOffset: number, target: Uint8Array): Promise<void> {
    const numbers = new Uint16Array(target.buffer, target.byteOffset, target.length / BYTES_PER_NUMBER);
    this.#fill(this.#tensors.get(name) as SyntheticTensor, byteOffset / BYTES_PER_NUMBER, numbers);
  }

  place(): null {
    return null;
  }

  predictors(): SourcePredictor[][] | null {
    return findPredictors(this.model.hyperparameters, this.#located);
  }

  async states(): Promise<SourceState[]> {
    // In place of a time: what tells this checkpoint from others.
    const digest = createHash('sha256').update(this.mark).digest().readBigUInt64LE(0);
    return this.#files.map((file) => ({ file: file.name, bytes: fileBytes(file), modified_ns: String(digest) }));
  }

  hash({ file }: Pick<SourceState, 'file'>, signal: AbortSignal): Promise<string> {
    const hashed = this.#hashes.get(file) ?? this.#hash(file, signal);
    this.#hashes.set(file, hashed);
    return hashed;
  }

  async close(): Promise<void> {}

  async #hash(file: string, signal: AbortSignal): Promise<string> {
    const hash = createHash('sha256');
    for (const piece of this.content(file)) {
      hash.update(piece);
      // Others have their turn between pieces.
      await new Promise(setImmediate);
      signal.throwIfAborted();
    }
    return hash.digest('hex');
  }

  /** Fills `target` with numbers of a tensor, from number `first` on. */
  #fill({ name, shape, deviation, writeRow }: SyntheticTensor, first: number, target: Uint16Array): void {
    if (deviation === 'ones') {
      target.fill(toBf16(1));
      return;
    }
    const start = this.#block.start(name);
    if (!writeRow) {
      this.#block.fill(deviation, start + first, target);
      return;
    }
    const columns = shape[shape.length - 1];
    for (let done = 0; done < target.length; ) {
      const row = Math.floor((first + done) / columns);
      const column = (first + done) % columns;
      const count = Math.min(columns - column, target.length - done);
      const part = target.subarray(done, done + count);
      if (count === columns) {
        this.#block.fill(deviation, start + row * columns, part);
        writeRow(row, part);
      } else {
        if (this.#row.length < columns) this.#row = new Uint16Array(columns);
        const whole = this.#row.subarray(0, columns);
        this.#block.fill(deviation, start + row * columns, whole);
        writeRow(row, whole);
        part.set(whole.subarray(column, column + count));
      }
      done += count;
    }
  }
}

/** Tensors in order, as many a shard as `SHARD_BYTES` hold, at least one. */
function cutShards(tensors: readonly SyntheticTensor[]): SyntheticTensor[][] {
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

function fileBytes({ head, tensors }: SyntheticFile): number {
  return tensors.reduce((sum, tensor) => sum + tensorBytes(tensor), head.length);
}

function indexOf(shards: readonly SyntheticTensor[][], nameOf: (shard: number) => string): Uint8Array {
  const entries = shards.flatMap((tensors, i) => tensors.map(({ name }) => [name, nameOf(i)]));
  const size = shards.flat().reduce((sum, tensor) => sum + tensorBytes(tensor), 0);
  return asJson({ metadata: { total_size: size }, weight_map: Object.fromEntries(entries) });
}

/** The header of a safetensors file: its length, then JSON padded with spaces to a multiple of 8. */
function shardHeader(tensors: readonly SyntheticTensor[]): Uint8Array {
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

function asJson(value: object): Uint8Array {
  return Buffer.from(JSON.stringify(value, null, 2));
}
