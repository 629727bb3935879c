import { Pi2Error } from '../base/error.js';
import { expertCount } from '../format/hyperparameters.js';
import { type Extent, type PredictorInput, RESIDENT_FILE } from '../format/manifest.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { budgetBytes, describeLimit, type MemoryLimit } from '../plan/memory-limit.js';
import {
  leastMemory,
  type MemoryPlan,
  type MemoryQuestion,
  planMemory,
  type StreamShape,
} from '../plan/memory-plan.js';
import { loadAddon } from './addon.js';
import type {
  EngineCounters,
  EngineMemory,
  EngineRequest,
  KernelSet,
  NativeAddon,
  NativeEngine,
  NativeExtent,
  NativeTensor,
  StreamRequest,
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
  /** Memory of the whole process; absent: what the machine can give today. */
  memory?: MemoryLimit;
  /** Default `auto`. */
  loadMode?: LoadMode;
  /** Compares the checksum of every bundle that is read from flash while computing. */
  verifyReads?: boolean;
}

/**
 * `auto` keeps every neuron in memory if that fits, and else streams them as `direct` does. `direct` and `buffered` always
 * stream: past the page cache (where the file system allows it), or through it.
 */
export const LOAD_MODES = ['auto', 'resident', 'direct', 'buffered'] as const;
export type LoadMode = (typeof LOAD_MODES)[number];

/** What this process takes beside the engine: garbage of JavaScript, logits, stacks, the unused ends of allocations. */
const RESERVE_BYTES = 32 * 1024 * 1024;
/** The least that a message names is this much more: a process is not as large every time. */
const SLACK_BYTES = 8 * 1024 * 1024;
/** Reads under way at once, where a pool of threads does them. */
const READ_LANES = 4;
/** Two CRC-32 a neuron. */
const CHECKSUM_BYTES = 8;
/** Buffers for what a step tells besides logits; see `StepRequest`. */
export interface FiringRecord {
  /** `firedBytesPerToken` bytes a token: which neurons fired, in heat order. */
  fired?: Uint8Array;
  /** `routedBytesPerToken` bytes a token: which experts were used. */
  routed?: Uint8Array;
  /** Layers x hidden size numbers a token: what each FFN gets. */
  inputs?: Float32Array;
  /** Which form of it. */
  input?: PredictorInput;
  /** Layers x used experts x neurons numbers a token: what each neuron contributes before its routing weight. */
  activations?: Float32Array;
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
  /** Memory that the whole process was to stay within. With `min`, what that came to. */
  readonly budgetBytes: number;
  /** How weights are really held: `resident`, or how neurons are read, e.g. `direct, io_uring`. */
  readonly storage: string;
  /** Of all gates, those that are in memory. */
  readonly gatesResidentShare: number;
  readonly #native: NativeEngine;

  private constructor(
    native: NativeEngine,
    request: EngineRequest,
    budgetBytes: number,
    cpuFeatures: readonly string[],
    loadMs: number,
  ) {
    this.#native = native;
    this.budgetBytes = budgetBytes;
    this.storage = native.counters().stream?.storage ?? 'resident';
    this.gatesResidentShare = gatesResidentShare(request);
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
   * E_MEMORY when the budget is too little, E_IO when a file cannot be read.
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
    const resident = engineRequest(model, contextLength, options.threads || cpu.cores, kernelSet);
    try {
      const { request, budget } = withMemoryPlan(model, resident, options, addon);
      const native = await addon.openEngine(request);
      return new Engine(native, request, budget, cpu.features, performance.now() - start);
    } catch (error) {
      throw nativeError(error, `open ${model.path}`);
    }
  }

  /** As `StepEngine` has it; `record`, if given, receives what the step tells besides logits. */
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

/** The request with what is kept in memory decided, and the budget that was kept to. */
function withMemoryPlan(
  model: ModelDirectory,
  resident: EngineRequest,
  options: EngineOptions,
  addon: NativeAddon,
): { request: EngineRequest; budget: number } {
  const { loadMode = 'auto', memory } = options;
  const bankCount = resident.expertOffsets.length;
  const streamed = (shape: StreamShape) => streamedRequest(model, resident, shape, options);
  const processBytes = process.memoryUsage.rss() + RESERVE_BYTES;
  const question: MemoryQuestion = {
    bankCount,
    neuronCount: resident.neuronCount,
    budgetBytes: budgetBytes(memory, processBytes),
    processBytes,
    mode: loadMode === 'auto' || loadMode === 'resident' ? loadMode : 'stream',
    measure: (shape) => sumOfBytes(addon.memoryNeeded(shape === undefined ? resident : streamed(shape))),
  };
  if (memory?.kind === 'min') question.budgetBytes = leastMemory(question);
  const plan = planMemory(question);
  if (plan.kind === 'too_little') throw tooLittle(model, resident, options, question.budgetBytes, plan);
  const request = plan.kind === 'resident' ? resident : streamed(plan.shape);
  return { request, budget: question.budgetBytes };
}

function streamedRequest(
  model: ModelDirectory,
  resident: EngineRequest,
  shape: StreamShape,
  options: EngineOptions,
): EngineRequest {
  const mode = options.loadMode === 'buffered' ? 'buffered' : 'direct';
  const stream: StreamRequest = { ...shape, mode, backend: 'uring', lanes: READ_LANES };
  if (!options.verifyReads) return { ...resident, stream };
  const { neuron_count, layer_count } = model.manifest.hyperparameters;
  const experts = resident.expertCount;
  stream.checksumOffsets = Array.from({ length: layer_count * experts }, (_, bank) => {
    const { offset } = model.extent(`layers.${Math.floor(bank / experts)}.checksums`);
    return offset + (bank % experts) * neuron_count * CHECKSUM_BYTES;
  });
  return { ...resident, extents: model.manifest.extents.map(nativeExtent), stream };
}

function sumOfBytes(memory: EngineMemory): number {
  return memory.weightBytes + memory.kvBytes + memory.scratchBytes + memory.loadBytes;
}

function gatesResidentShare({ stream, neuronCount }: EngineRequest): number {
  if (stream === undefined) return 1;
  const gates = stream.residentGates.reduce((sum, count) => sum + count, 0);
  return gates / (stream.residentGates.length * neuronCount);
}

/** Refuses, with the least that would do, what would end in swap or a kill. */
function tooLittle(
  model: ModelDirectory,
  { contextLength }: EngineRequest,
  { loadMode = 'auto', memory }: EngineOptions,
  budget: number,
  { leastBytes }: MemoryPlan & { kind: 'too_little' },
): Pi2Error {
  const least = `${Math.ceil((leastBytes + SLACK_BYTES) / 2 ** 20)}M`;
  const resident = loadMode === 'resident' ? ' with all weights in memory' : '';
  const streamHint = loadMode === 'resident' ? ', leave --load-mode out' : '';
  return new Pi2Error(
    'E_MEMORY',
    `${model.path}${resident} and a context of ${contextLength} take ${least}, ${describeLimit(memory, budget)}`,
    `the least that would do: --memory ${least}; or a smaller context with -c${streamHint}`,
  );
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
  return model.manifest.extents.filter((extent) => !/\.(checksums|heat_order)$/.test(extent.name)).map(nativeExtent);
}

function nativeExtent({ name, file, offset, bytes, crc32 }: Extent): NativeExtent {
  const kind = file === RESIDENT_FILE ? 'resident' : 'neurons';
  return { name, file: kind, offset, bytes, crc32: Number.parseInt(crc32, 16) };
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
