import os from 'node:os';
import { formatBytes } from '../base/bytes.js';
import { Pi2Error } from '../base/error.js';
import { expertCount } from '../format/hyperparameters.js';
import { RESIDENT_FILE } from '../format/manifest.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { loadAddon } from './addon.js';
import type {
  EngineCounters,
  EngineRequest,
  KernelSet,
  NativeAddon,
  NativeEngine,
  NativeExtent,
  NativeTensor,
} from './contract.js';
import { ropeFrequencies } from './rope.js';

/**
 * Most tokens computed together. Longer prompts are cut into steps of this many, so that an abort is heard between them; the
 * weights are then read once for so many tokens that arithmetic is the limit.
 */
export const BATCH_SIZE = 128;

export interface EngineOptions {
  /** Positions of the KV cache; 0 takes the model's context length. */
  context: number;
  /** 0 takes the cores this process may run on. */
  threads: number;
  kernelSet?: KernelSet;
}

/** Buffers for what a step tells besides logits; see `StepRequest`. */
export interface FiringRecord {
  /** `firedBytesPerToken` bytes a token: which neurons fired, in heat order. */
  fired: Uint8Array;
  /** `routedBytesPerToken` bytes a token: which experts were used. */
  routed: Uint8Array;
}

/** What generation, evaluation and perplexity need of an engine. */
export interface StepEngine {
  readonly contextLength: number;
  readonly vocabSize: number;
  /**
   * Computes tokens of one sequence at `position` and after; the cache below must be filled. `logits` receives vocab_size
   * numbers of the last token, or of every token if `all`.
   */
  step(tokens: Int32Array, position: number, logits: Float32Array, all?: boolean): Promise<void>;
}

/** An open model in memory. Close it: its weights are not the garbage collector's. */
export class Engine implements StepEngine {
  readonly contextLength: number;
  readonly vocabSize: number;
  readonly threads: number;
  readonly kernelSet: KernelSet;
  readonly cpuFeatures: readonly string[];
  /** Bytes of a token in `FiringRecord.fired` and in `FiringRecord.routed`. */
  readonly firedBytesPerToken: number;
  readonly routedBytesPerToken: number;
  /** From the call of `open` to the model being ready. */
  readonly loadMs: number;
  readonly #native: NativeEngine;

  private constructor(native: NativeEngine, request: EngineRequest, cpuFeatures: readonly string[], loadMs: number) {
    this.#native = native;
    this.contextLength = request.contextLength;
    this.vocabSize = request.vocabSize;
    this.threads = request.threads;
    this.firedBytesPerToken = request.layerCount * request.expertCount * Math.ceil(request.neuronCount / 8);
    this.routedBytesPerToken = request.layerCount * Math.ceil(request.expertCount / 8);
    this.kernelSet = native.kernelSet;
    this.cpuFeatures = cpuFeatures;
    this.loadMs = loadMs;
  }

  /**
   * Loads a model. Throws `Pi2Error`: E_USAGE for a context the model cannot have, E_CPU for kernels this CPU cannot run,
   * E_MEMORY when weights and KV cache do not fit, E_IO when a file cannot be read.
   */
  static async open(model: ModelDirectory, options: EngineOptions, addon: NativeAddon = loadAddon()): Promise<Engine> {
    const start = performance.now();
    const cpu = addon.cpu();
    const { kernelSet } = options;
    if (kernelSet !== undefined && !cpu.kernelSets.includes(kernelSet)) {
      const known = cpu.kernelSets.join(', ');
      throw new Pi2Error('E_CPU', `this CPU cannot run ${kernelSet} kernels`, `it can run: ${known}`);
    }
    const contextLength = chooseContext(model, options.context);
    requireMemory(model, contextLength, availableMemory());
    const request = engineRequest(model, contextLength, options.threads || cpu.cores, kernelSet);
    try {
      const native = await addon.openEngine(request);
      return new Engine(native, request, cpu.features, performance.now() - start);
    } catch (error) {
      throw nativeError(error, `open ${model.path}`);
    }
  }

  /** As `StepEngine` has it; `record`, if given, receives which neurons fired and which experts were used. */
  async step(
    tokens: Int32Array,
    position: number,
    logits: Float32Array,
    all = false,
    record?: FiringRecord,
  ): Promise<void> {
    try {
      await this.#native.step({ tokens, position, logits, all, ...record });
    } catch (error) {
      throw nativeError(error, 'compute');
    }
  }

  counters(): EngineCounters {
    return this.#native.counters();
  }

  async close(): Promise<void> {
    await this.#native.close();
  }
}

/** The context to open: the model's own for 0. Learned positions end where they end; rotary ones go on, worse and worse. */
export function chooseContext(model: ModelDirectory, asked: number): number {
  const { context_length, position } = model.manifest.hyperparameters;
  if (asked === 0) return context_length;
  if (asked > context_length && position.kind === 'learned') {
    throw new Pi2Error(
      'E_USAGE',
      `context ${asked} is more than the ${context_length} positions that the model has learned`,
      `give -c ${context_length} or less`,
    );
  }
  return asked;
}

/** Bytes of the KV cache for each position: keys and values as half floats. */
export function kvBytesPerToken(model: ModelDirectory): number {
  const h = model.manifest.hyperparameters;
  return h.layer_count * 2 * h.kv_head_count * h.head_dim * 2;
}

/** Refuses, with the context that would fit, what would end in swap or a kill. */
export function requireMemory(model: ModelDirectory, contextLength: number, availableBytes: number): void {
  const weightBytes = model.manifest.extents.reduce((sum, extent) => sum + extent.bytes, 0);
  const kvBytes = kvBytesPerToken(model) * contextLength;
  if (weightBytes + kvBytes <= availableBytes) return;
  const room = Math.floor((availableBytes - weightBytes) / kvBytesPerToken(model));
  const available = `${formatBytes(availableBytes)} of memory are available`;
  if (room < 1) {
    throw new Pi2Error(
      'E_MEMORY',
      `the weights of ${model.path} take ${formatBytes(weightBytes)}, ${available}`,
      'close other programs, or convert with fewer bits: --quant q4',
    );
  }
  throw new Pi2Error(
    'E_MEMORY',
    `weights and a context of ${contextLength} take ${formatBytes(weightBytes + kvBytes)}, ${available}`,
    `give a smaller context: -c ${room} would fit`,
  );
}

/**
 * Memory this process can still take: what the kernel calls available, under the limit of its control group. Page cache does
 * not count as taken, unlike in `process.availableMemory`.
 */
function availableMemory(): number {
  const limit = process.constrainedMemory();
  const left = limit > 0 ? limit - process.memoryUsage.rss() : Number.POSITIVE_INFINITY;
  return Math.min(os.freemem(), left);
}

function engineRequest(
  model: ModelDirectory,
  contextLength: number,
  threads: number,
  kernelSet: KernelSet | undefined,
): EngineRequest {
  const { hyperparameters: h, layout, quantization } = model.manifest;
  const experts = expertCount(h);
  return {
    residentPath: model.residentPath,
    neuronsPath: model.neuronsPath,
    tensors: nativeTensors(model),
    expertOffsets: Array.from({ length: h.layer_count * experts }, (_, i) =>
      model.expertOffset(Math.floor(i / experts), i % experts),
    ),
    extents: nativeExtents(model),
    layout: nativeLayout(layout),
    ffnEncoding: quantization.ffn as EngineRequest['ffnEncoding'],
    hiddenSize: h.hidden_size,
    layerCount: h.layer_count,
    headCount: h.head_count,
    kvHeadCount: h.kv_head_count,
    headDim: h.head_dim,
    neuronCount: h.neuron_count,
    vocabSize: h.vocab_size,
    normKind: h.norm.kind,
    normEpsilon: h.norm.epsilon,
    ropeFrequencies: ropeFrequencies(h),
    windows: h.attention.windows,
    gated: h.ffn.gated,
    activation: h.ffn.activation,
    threshold: h.ffn.threshold,
    expertCount: experts,
    expertsPerToken: h.experts?.used_per_token ?? 1,
    contextLength,
    threads,
    ...(kernelSet === undefined ? {} : { kernelSet }),
    batchSize: BATCH_SIZE,
  };
}

function nativeTensors(model: ModelDirectory): NativeTensor[] {
  const tensors: NativeTensor[] = [];
  for (const tensor of model.manifest.tensors) {
    const { name, bytes, encoding, rows, columns } = tensor;
    if (encoding === 'u32') continue;
    tensors.push({ name, offset: model.tensorOffset(tensor), bytes, encoding, rows, columns });
  }
  return tensors;
}

/** What is loaded and checked: all but bundle checksums, which are for bundles that are read one by one, and heat orders. */
function nativeExtents(model: ModelDirectory): NativeExtent[] {
  const extents = model.manifest.extents.filter((extent) => !/\.(checksums|heat_order)$/.test(extent.name));
  return extents.map(({ name, file, offset, bytes, crc32 }) => ({
    name,
    file: file === RESIDENT_FILE ? 'resident' : 'neurons',
    offset,
    bytes,
    crc32: Number.parseInt(crc32, 16),
  }));
}

/** The manifest's layout as the addon takes it. */
export function nativeLayout(layout: ModelDirectory['manifest']['layout']): EngineRequest['layout'] {
  return {
    matrices: layout.matrices,
    part1Bytes: layout.part1_bytes,
    part2Bytes: layout.part2_bytes,
    neuronsPerUnit: layout.neurons_per_unit,
    unitBytes: layout.unit_bytes,
    part1Stride: layout.part1_stride,
    part2Offset: layout.part2_offset,
    part2Stride: layout.part2_stride,
  };
}

/** An error of the addon in words for a person. */
export function nativeError(error: unknown, doing: string): unknown {
  const { code, message } = error as { code?: string; message?: string };
  const options = { cause: error };
  switch (code) {
    case 'NATIVE_IO':
      return new Pi2Error(
        'E_IO',
        `cannot ${doing}: ${message}`,
        'check the disk, then: powerinfer2 verify NAME.pi2',
        options,
      );
    case 'NATIVE_CHECKSUM':
      return new Pi2Error(
        'E_CHECKSUM',
        `cannot ${doing}: ${message}`,
        'powerinfer2 verify lists all that is wrong; convert the checkpoint again, or copy the directory again',
        options,
      );
    case 'NATIVE_MEMORY':
      return new Pi2Error(
        'E_MEMORY',
        `cannot ${doing}: not enough memory (${message})`,
        'give a smaller context with -c, or convert with fewer bits: --quant q4',
        options,
      );
    case 'NATIVE_CPU':
      return new Pi2Error('E_CPU', `cannot ${doing}: ${message}`, 'leave --cpu out to take the best kernels', options);
    default:
      return error;
  }
}
