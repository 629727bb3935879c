import { Pi2Error } from '../base/error.js';
import { rowBytes } from '../format/encoding.js';
import type { OperatingPoint, PredictorInput } from '../format/manifest.js';
import type { ModelDirectory } from '../format/model-directory.js';
import type { MemoryLimit } from '../plan/memory-limit.js';
import type { Ablation } from './ablation.js';
import { loadAddon } from './addon.js';
import type {
  Bandwidths,
  EngineRequest,
  KernelSet,
  NativeAddon,
  NativeEngine,
  NativeTrace,
  SequenceRun,
} from './contract.js';
import type { EngineCounters } from './counters.js';
import { modelRequest } from './engine-request.js';
import { type PlannedRequest, planRequest } from './plan-request.js';
import { type NpuChoice, settleUnit, type UnitUse } from './unit-request.js';

export interface EngineOptions {
  /** Positions of the KV cache; 0 takes the model's context length. Sequences share them. */
  context: number;
  /** Sequences that the KV cache holds at a time. Default: 1. */
  sequences?: number;
  /** 0 takes the cores this process may run on. */
  threads: number;
  kernelSet?: KernelSet;
  /** Memory of the whole process; absent: what the machine can give today. */
  memory?: MemoryLimit;
  /** Default `pi2`. */
  engine?: EngineName;
  /** Default `auto`. */
  loadMode?: LoadMode;
  /** Computes every neuron that fires, as if the model had no predictor. */
  exact?: boolean;
  /** What computes the hottest neurons beside the CPU. Default `auto`. */
  npu?: NpuChoice;
  /** Of ONNX Runtime: the library, unless it is where it is looked for, and the profile of the device whose NPU it uses. */
  npuLibrary?: string;
  npuProfile?: string;
  /** Share of the neurons that this unit computes, 0 to 1. Default: what is estimated to be fastest. */
  hotRatio?: number;
  /** Steps of streaming that are taken away, to measure what they bring. */
  ablate?: readonly Ablation[];
  /** Records of each thread's trace; absent: nothing is traced. */
  traceRecords?: number;
}

/**
 * `auto` keeps every neuron in memory if that fits, and else streams them as `direct` does. `direct` and `buffered` always
 * stream: past the page cache (where the file system allows it), or through it.
 */
export const LOAD_MODES = ['auto', 'resident', 'direct', 'buffered'] as const;
export type LoadMode = (typeof LOAD_MODES)[number];

/**
 * `pi2`: what this project is about. Baselines: `mmap`, files mapped and every neuron computed, as other engines do it;
 * `llmflash`, what LLM in a flash does (ablation.ts).
 */
export const ENGINES = ['pi2', 'mmap', 'llmflash'] as const;
export type EngineName = (typeof ENGINES)[number];

/** What a step computes and tells besides the logits of its last token; see `StepRequest`. */
export interface StepOptions {
  /** Logits of every token. */
  all?: boolean;
  /** Every neuron that fires is computed, though the model has a predictor. */
  exact?: boolean;
  /** These tokens are of a prompt: the matrix unit may compute them. */
  prompt?: boolean;
  /** Receives which neurons fired, in heat order: `firedBytesPerToken` bytes a token. */
  fired?: Uint8Array;
  /** Receives which experts were used: `routedBytesPerToken` bytes a token. */
  routed?: Uint8Array;
  /** Receives what each FFN gets: layers x hidden size numbers a token, in the form of `input`. */
  inputs?: Float32Array;
  /** Default `ffn_norm`. */
  input?: PredictorInput;
  /** Receives what each neuron contributes before its routing weight: layers x used experts x neurons numbers a token. */
  activations?: Float32Array;
}

/** What generation, evaluation and perplexity need of an engine. */
export interface StepEngine {
  readonly contextLength: number;
  readonly vocabSize: number;
  /** Tokens computed together; a longer step is cut into pieces of so many. */
  readonly batchSize: number;
  /**
   * Computes tokens of sequence 0 at `position` and after; the cache below must be filled. `logits` receives vocab_size
   * numbers of the last token, or of every token if `all`.
   */
  step(tokens: Int32Array, position: number, logits: Float32Array, options?: StepOptions): Promise<void>;
}

/** What decoding several sequences together needs of an engine. */
export interface BatchEngine extends Omit<StepEngine, 'step'> {
  /** Sequences that it holds at a time, numbered from 0. */
  readonly sequences: number;
  /**
   * Computes tokens of several sequences, run behind run. `logits` receives vocab_size numbers of the last token of each run, or of
   * every token if `all`.
   */
  stepRuns(
    tokens: Int32Array,
    runs: readonly SequenceRun[],
    logits: Float32Array,
    options?: StepOptions,
  ): Promise<void>;
  fork(from: number, to: number, positions: number): void;
  release(sequence: number): void;
}

/** Bytes of the neuron cache by region; STREAMING.md has what is in them. */
export interface Regions {
  gatesBytes: number;
  hotBytes: number;
  coldBytes: number;
  /** Of all neurons, those whose rows have a place: for good or in a slot. */
  rowsShare: number;
}

/** An open model in memory. Close it: its weights are not the garbage collector's. */
export class Engine implements StepEngine, BatchEngine {
  readonly contextLength: number;
  readonly sequences: number;
  readonly vocabSize: number;
  readonly batchSize: number;
  readonly threads: number;
  readonly kernelSet: KernelSet;
  readonly cpuFeatures: readonly string[];
  /** Bytes of a token in `StepOptions.fired` and in `StepOptions.routed`. */
  readonly firedBytesPerToken: number;
  readonly routedBytesPerToken: number;
  /** From the call of `open` to the model being ready. */
  readonly loadMs: number;
  /** Memory that the whole process was to stay within. With `min`, what that came to. */
  readonly budgetBytes: number;
  /** How weights are really held: `resident`, `mmap`, or how neurons are read, e.g. `direct, io_uring`. */
  readonly storage: string;
  /** Of all gates, those that are in memory; null when that is the page cache's choice. */
  readonly gatesResidentShare: number | null;
  /** What the neuron cache is divided into; null when every neuron is in memory. */
  readonly regions: Regions | null;
  /** The setting of the predictor; null when every neuron that fires is computed. */
  readonly operatingPoint: OperatingPoint | null;
  /** Why the model's predictor is not used, though nobody asked for exact mode; else null. */
  readonly notice: string | null;
  /** The dense unit; null when the CPU computes everything. */
  readonly unit: UnitUse | null;
  /** What computes, and the steps of streaming that were taken away. */
  readonly name: EngineName;
  readonly ablated: readonly Ablation[];
  readonly #native: NativeEngine;
  readonly #isTraced: boolean;
  #traces: NativeTrace[] = [];

  private constructor(
    native: NativeEngine,
    { request, budgetBytes, operatingPoint, notice }: PlannedRequest,
    unit: UnitUse | null,
    { engine = 'pi2', ablate = [] }: EngineOptions,
    cpuFeatures: readonly string[],
    loadMs: number,
  ) {
    this.#native = native;
    this.#isTraced = (request.traceRecords ?? 0) > 0;
    this.name = engine;
    this.ablated = ablate;
    this.budgetBytes = budgetBytes;
    this.unit = unit;
    this.storage = native.counters().stream?.storage ?? (request.mapped ? 'mmap' : 'resident');
    this.gatesResidentShare = gatesResidentShare(request);
    this.regions = regionsOf(request);
    this.operatingPoint = operatingPoint;
    this.notice = notice;
    this.batchSize = request.batchSize;
    this.contextLength = request.contextLength;
    this.sequences = request.sequences ?? 1;
    this.vocabSize = request.vocabSize;
    this.threads = request.threads;
    this.firedBytesPerToken = request.layerCount * request.expertCount * Math.ceil(request.neuronCount / 8);
    this.routedBytesPerToken = request.layerCount * Math.ceil(request.expertCount / 8);
    this.kernelSet = native.kernelSet;
    this.cpuFeatures = cpuFeatures;
    this.loadMs = loadMs;
  }

  /**
   * Loads a model. Throws `Pi2Error`: E_USAGE for a context the model cannot have or options that do not go together, E_CPU for
   * kernels this CPU cannot run, E_MEMORY when the budget is too little, E_IO when a file cannot be read, E_MODEL when the profile
   * is not the model's.
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
    const request = {
      ...modelRequest(model, contextLength, options.threads || cpu.cores, kernelSet),
      ...(options.sequences === undefined ? {} : { sequences: options.sequences }),
    };
    try {
      const planned = await planRequest(model, request, options, addon);
      const native = await addon.openEngine(planned.request);
      const unit = await settleUnit(model, planned.wantedUnit, planned.request, native).catch(async (error) => {
        await native.close();
        throw error;
      });
      return new Engine(native, planned, unit, options, cpu.features, performance.now() - start);
    } catch (error) {
      throw nativeError(error, `open ${model.path}`);
    }
  }

  step(tokens: Int32Array, position: number, logits: Float32Array, options: StepOptions = {}): Promise<void> {
    return this.stepRuns(tokens, [{ sequence: 0, position, count: tokens.length }], logits, options);
  }

  async stepRuns(
    tokens: Int32Array,
    runs: readonly SequenceRun[],
    logits: Float32Array,
    options: StepOptions = {},
  ): Promise<void> {
    try {
      await this.#native.step({ tokens, runs, logits, all: false, ...options });
    } catch (error) {
      throw nativeError(error, 'compute');
    }
    // A step has the rings for itself.
    if (this.#isTraced) this.#traces.push(this.#native.drainTrace());
  }

  /** Lets the empty sequence `to` go on from the first `positions` positions of `from`, which both share. */
  fork(from: number, to: number, positions: number): void {
    this.#native.fork({ from, to, positions });
  }

  /** Empties a sequence. */
  release(sequence: number): void {
    this.#native.release({ sequence });
  }

  /** What was traced since the last call, a part for each step. */
  takeTrace(): NativeTrace[] {
    return this.#traces.splice(0);
  }

  counters(): EngineCounters {
    return this.#native.counters();
  }

  /** What memory and flash give at best, the latter in reads of `flashReadBytes` bytes; between steps, in some 0.1 s. */
  measureBandwidths(flashReadBytes: number): Promise<Bandwidths> {
    return this.#native.measureBandwidths({ flashReadBytes });
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

function gatesResidentShare({ stream, neuronCount, mapped }: EngineRequest): number | null {
  if (mapped) return null;
  if (stream === undefined) return 1;
  return sum(stream.residentGates) / (stream.residentGates.length * neuronCount);
}

/** Rows are whole neurons where a predictor says which are needed, else those of up and down. */
function regionsOf({ stream, predictor, layout, ffnEncoding, hiddenSize, neuronCount }: EngineRequest): Regions | null {
  if (stream === undefined) return null;
  const rows = predictor === undefined ? layout.matrices - 1 : layout.matrices;
  const slotBytes = rows * rowBytes(ffnEncoding, hiddenSize);
  return {
    gatesBytes: sum(stream.residentGates) * layout.part1Bytes,
    hotBytes: sum(stream.hotNeurons) * slotBytes,
    coldBytes: sum(stream.coldSlots) * slotBytes,
    rowsShare: (sum(stream.hotNeurons) + sum(stream.coldSlots)) / (stream.hotNeurons.length * neuronCount),
  };
}

function sum(counts: readonly number[]): number {
  return counts.reduce((total, count) => total + count, 0);
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
    case 'NATIVE_UNIT':
      return new Pi2Error(
        'E_NPU',
        `cannot ${doing}: ${message}`,
        'ONNX Runtime comes with npm install onnxruntime-node, or name its file with --npu-library; --npu none does without',
        options,
      );
    case 'NATIVE_CPU':
      return new Pi2Error('E_CPU', `cannot ${doing}: ${message}`, 'leave --cpu out to take the best kernels', options);
    default:
      return error;
  }
}
