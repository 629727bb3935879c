import { basename, join, resolve } from 'node:path';
import { Pi2Error } from '../../src/base/error.js';
import { hashSource, type SourceState, sourceStates } from '../sources.js';
import { Config } from './config.js';
import { readHyperparameters } from './families.js';
import { CONFIG_FILE, findFiles, GENERATION_FILE, readJsonObject } from './files.js';
import type { SourceModel, SourceTensor } from './model.js';
import { findPredictors, type SourcePredictor } from './predictors.js';
import { quoted, readHeader } from './safetensors.js';
import { SourceFile } from './source-file.js';
import type { Place, TensorSource } from './tensor-source.js';
import { findTensors, type LocatedTensor } from './tensors.js';

/** A file of the checkpoint that decides what the model is. */
export interface Source {
  /** Name inside the checkpoint's directory. */
  file: string;
  bytes: number;
}

/**
 * A HuggingFace checkpoint directory, opened: everything is checked but the weights themselves, which are read piece by
 * piece. Holds its weight files open until `close`.
 */
export class Checkpoint implements TensorSource {
  /** As given to `open`. */
  readonly directory: string;
  /** Name of the directory, which becomes the model's. */
  readonly name: string;
  readonly model: SourceModel;
  /** config.json, the index if there is one, then the weight files by name. */
  readonly sources: readonly Source[];
  /** Tokenizer and generation files that are there, to go with the model. */
  readonly textFiles: readonly string[];
  readonly #tensors: ReadonlyMap<string, LocatedTensor>;
  readonly #files: ReadonlyMap<string, SourceFile>;

  private constructor(parts: {
    directory: string;
    model: SourceModel;
    sources: Source[];
    textFiles: string[];
    tensors: ReadonlyMap<string, LocatedTensor>;
    opened: ReadonlyMap<string, SourceFile>;
  }) {
    this.directory = parts.directory;
    this.name = basename(resolve(parts.directory));
    this.model = parts.model;
    this.sources = parts.sources;
    this.textFiles = parts.textFiles;
    this.#tensors = parts.tensors;
    this.#files = parts.opened;
  }

  /**
   * Opens a checkpoint. Throws `E_CHECKPOINT` (not a usable directory), `E_PICKLE`, `E_CONFIG`, `E_UNSUPPORTED`,
   * `E_SAFETENSORS`, `E_TENSOR`, or `E_FILE` and `E_IO` from the file system.
   */
  static async open(directory: string): Promise<Checkpoint> {
    const files = await findFiles(directory);
    const configFile = await readJsonObject(directory, CONFIG_FILE);
    const sources: Source[] = [{ file: CONFIG_FILE, bytes: configFile.bytes }];
    const hyperparameters = readHyperparameters(
      new Config(configFile.value, join(directory, CONFIG_FILE)),
      await openGeneration(directory, files.texts),
    );
    const opened = new Map<string, SourceFile>();
    try {
      for (const file of [...(files.index ? [files.index] : []), ...files.weights]) {
        const source = await SourceFile.open(directory, file);
        opened.set(file, source);
        sources.push({ file, bytes: (await source.handle.stat()).size });
      }
      const tensors = await locateTensors(directory, files.weights, opened, files.shardOf);
      const model = findTensors(hyperparameters, tensors);
      return new Checkpoint({ directory, model, sources, textFiles: files.texts, tensors, opened });
    } catch (error) {
      for (const file of opened.values()) await file.close();
      throw error;
    }
  }

  /** Bytes of a tensor of this checkpoint's model. */
  bytes(tensor: SourceTensor): number {
    return this.#locate(tensor).bytes;
  }

  /**
   * Fills `target` with the tensor's bytes from `byteOffset` on. Throws `E_IO` that names the file when it has become too
   * short, and a `RangeError` when asked for bytes that the tensor does not have.
   */
  async read(tensor: SourceTensor, byteOffset: number, target: Uint8Array): Promise<void> {
    const { bytes } = this.#locate(tensor);
    if (!Number.isSafeInteger(byteOffset) || byteOffset < 0 || byteOffset + target.length > bytes) {
      throw new RangeError(`bytes ${byteOffset} + ${target.length} of ${tensor.name}, which has ${bytes}`);
    }
    const { file, offset } = this.place(tensor);
    await file.read(offset + byteOffset, target);
  }

  place(tensor: SourceTensor): Place {
    const { file, offset } = this.#locate(tensor);
    return { file: this.#files.get(file) as SourceFile, offset };
  }

  /** The predictors that it brings, for each layer and expert, or null. Throws `E_TENSOR` if they are not whole. */
  predictors(): SourcePredictor[][] | null {
    return findPredictors(this.model.hyperparameters, this.#tensors);
  }

  states(): Promise<SourceState[]> {
    const files = new Set([...this.sources.map((source) => source.file), ...this.textFiles]);
    return sourceStates(this.directory, [...files]);
  }

  /** Throws `E_CHANGED` if the file has not the size it had, and the signal's reason when that is aborted. */
  hash(state: SourceState, signal: AbortSignal): Promise<string> {
    return hashSource(this.directory, state, signal);
  }

  async close(): Promise<void> {
    for (const file of this.#files.values()) await file.close();
  }

  #locate(tensor: SourceTensor): LocatedTensor {
    const located = this.#tensors.get(tensor.name);
    if (!located) throw new RangeError(`${tensor.name} is not a tensor of ${this.directory}`);
    return located;
  }
}

async function openGeneration(directory: string, texts: string[]): Promise<Config | null> {
  if (!texts.includes(GENERATION_FILE)) return null;
  const { value } = await readJsonObject(directory, GENERATION_FILE);
  return new Config(value, join(directory, GENERATION_FILE));
}

/** Reads all headers; every tensor once, and where the index says it is. */
async function locateTensors(
  directory: string,
  weights: string[],
  opened: ReadonlyMap<string, SourceFile>,
  shardOf: Map<string, string> | null,
): Promise<Map<string, LocatedTensor>> {
  const tensors = new Map<string, LocatedTensor>();
  for (const file of weights) {
    for (const tensor of await readHeader((opened.get(file) as SourceFile).handle, join(directory, file))) {
      const other = tensors.get(tensor.name);
      if (other) {
        throw new Pi2Error(
          'E_SAFETENSORS',
          `${join(directory, file)}: tensor ${quoted(tensor.name)} is in ${other.file} as well`,
          'shards of different checkpoints seem mixed: download them again',
        );
      }
      tensors.set(tensor.name, { ...tensor, file });
    }
  }
  for (const [name, shard] of shardOf ?? []) {
    const found = tensors.get(name);
    if (found?.file !== shard) {
      throw new Pi2Error(
        'E_SAFETENSORS',
        `${join(directory, shard)}: it has no tensor ${quoted(name)}, although the index says so`,
        found ? `the tensor is in ${found.file}: download the index again` : 'download this file again',
      );
    }
  }
  return tensors;
}
