import { type FileHandle, open } from 'node:fs/promises';
import { fileError, Pi2Error } from '../../src/base/error.js';

/** Tokens that one bank computed: what it got, and which of its neurons contributed how much. */
export interface Samples {
  tokens: number;
  /** [tokens x hidden] */
  inputs: Float32Array;
  /** [tokens + 1]: the entries of token t in the next two are `starts[t]` up to `starts[t + 1]`. */
  starts: Uint32Array;
  neurons: Uint32Array;
  contributions: Float32Array;
}

/** A run of tokens in the file. */
interface Block {
  offset: number;
  tokens: number;
  entries: number;
}

/** Numbers take this much, counts and neurons too. */
const BYTES = 4;

/** Samples of all banks in a temporary file, as they come; what lies where is known to this object alone. */
export class SampleFile {
  readonly #handle: FileHandle;
  readonly #path: string;
  readonly #hiddenSize: number;
  readonly #blocks: Block[][];
  /** Sum of all contributions of each bank, and the number of entries they are of. */
  readonly #contributions: Float64Array;
  #end = 0;

  private constructor(handle: FileHandle, path: string, banks: number, hiddenSize: number) {
    this.#handle = handle;
    this.#path = path;
    this.#hiddenSize = hiddenSize;
    this.#blocks = Array.from({ length: banks }, () => []);
    this.#contributions = new Float64Array(banks);
  }

  static async create(path: string, banks: number, hiddenSize: number): Promise<SampleFile> {
    try {
      return new SampleFile(await open(path, 'w+'), path, banks, hiddenSize);
    } catch (error) {
      throw fileError(error, 'write', path);
    }
  }

  /** Adds what a bank computed for some tokens; `counts` are the entries of each token. */
  async append(
    bank: number,
    inputs: Float32Array,
    counts: Uint32Array,
    neurons: Uint32Array,
    contributions: Float32Array,
  ): Promise<void> {
    const parts = [inputs, counts, neurons, contributions].map(bytesOf);
    try {
      // A regular file takes all of it or fails.
      await this.#handle.writev(parts, this.#end);
    } catch (error) {
      throw fileError(error, 'write', this.#path);
    }
    this.#blocks[bank].push({ offset: this.#end, tokens: counts.length, entries: neurons.length });
    for (let i = 0; i < contributions.length; i++) this.#contributions[bank] += contributions[i];
    this.#end += parts.reduce((sum, part) => sum + part.length, 0);
  }

  /** Bytes of the file. */
  get size(): number {
    return this.#end;
  }

  /** Of all neurons of the banks that were used, those that contributed. */
  firedShare(neuronCount: number): number {
    const blocks = this.#blocks.flat();
    const tokens = blocks.reduce((sum, block) => sum + block.tokens, 0);
    return blocks.reduce((sum, block) => sum + block.entries, 0) / Math.max(1, tokens * neuronCount);
  }

  /** What a neuron of the banks contributes to a token, in the mean, silent ones included. */
  meanMagnitude(banks: readonly number[], neuronCount: number): number {
    let sum = 0;
    let tokens = 0;
    for (const bank of banks) {
      sum += this.#contributions[bank];
      for (const block of this.#blocks[bank]) tokens += block.tokens;
    }
    return sum / Math.max(1, tokens * neuronCount);
  }

  /** Mean of the contributions of several banks; 0 if there were none. */
  meanContribution(banks: readonly number[]): number {
    let sum = 0;
    let entries = 0;
    for (const bank of banks) {
      sum += this.#contributions[bank];
      for (const block of this.#blocks[bank]) entries += block.entries;
    }
    return entries === 0 ? 0 : sum / entries;
  }

  /** Bytes that the samples of a bank take in memory, at most `bytesMost`: later blocks are left out. */
  bytes(bank: number, bytesMost: number): number {
    return this.#bytes(this.#firstBlocks(bank, bytesMost));
  }

  /** The samples of a bank that take no more than `bytesMost`, in the order they came. */
  async read(bank: number, bytesMost: number): Promise<Samples> {
    const blocks = this.#firstBlocks(bank, bytesMost);
    const tokens = blocks.reduce((sum, block) => sum + block.tokens, 0);
    const entries = blocks.reduce((sum, block) => sum + block.entries, 0);
    const samples: Samples = {
      tokens,
      inputs: new Float32Array(tokens * this.#hiddenSize),
      starts: new Uint32Array(tokens + 1),
      neurons: new Uint32Array(entries),
      contributions: new Float32Array(entries),
    };
    let token = 0;
    let entry = 0;
    for (const block of blocks) {
      const counts = samples.starts.subarray(token + 1, token + 1 + block.tokens);
      await this.#fill(block.offset, [
        samples.inputs.subarray(token * this.#hiddenSize, (token + block.tokens) * this.#hiddenSize),
        counts,
        samples.neurons.subarray(entry, entry + block.entries),
        samples.contributions.subarray(entry, entry + block.entries),
      ]);
      for (let t = 0; t < counts.length; t++) counts[t] += samples.starts[token + t];
      token += block.tokens;
      entry += block.entries;
    }
    return samples;
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }

  #firstBlocks(bank: number, bytesMost: number): Block[] {
    let bytes = 0;
    return this.#blocks[bank].filter((block) => {
      bytes += this.#bytes([block]);
      return bytes <= bytesMost;
    });
  }

  #bytes(blocks: readonly Block[]): number {
    return blocks.reduce(
      (sum, { tokens, entries }) => sum + BYTES * (tokens * (this.#hiddenSize + 1) + 2 * entries),
      0,
    );
  }

  async #fill(offset: number, targets: (Float32Array | Uint32Array)[]): Promise<void> {
    const parts = targets.map(bytesOf);
    const bytes = parts.reduce((sum, part) => sum + part.length, 0);
    try {
      const { bytesRead } = await this.#handle.readv(parts, offset);
      if (bytesRead !== bytes) throw new Pi2Error('E_IO', `${this.#path} ended while it was read`);
    } catch (error) {
      throw fileError(error, 'read', this.#path);
    }
  }
}

function bytesOf(numbers: Float32Array | Uint32Array): Uint8Array {
  return new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength);
}
