/**
 * The whole contract between TypeScript and the native addon; its other side is `native/addon/addon.cc`.
 *
 * TypeScript validates everything before a call and speaks to people; the addon checks sizes again where a lie would touch
 * memory, and rejects with an `Error` whose `code` is one of `NativeErrorCode`. Work runs on the addon's threads; every
 * buffer passed in stays untouched by JavaScript until the promise settles.
 */
import type { EngineCounters } from './counters.js';
import type { ReplayCounters, ReplayRequest } from './replay-contract.js';
import type { NativeUnitCalls, UnitRequest } from './unit-contract.js';

export type NativeErrorCode =
  | 'NATIVE_ARGUMENT'
  | 'NATIVE_IO'
  | 'NATIVE_CHECKSUM'
  | 'NATIVE_MEMORY'
  | 'NATIVE_CPU'
  | 'NATIVE_UNIT'
  | 'NATIVE_BUSY';

/** Instruction sets that kernels are compiled for, weakest first. */
export const KERNEL_SETS = ['scalar', 'neon', 'avx2', 'avx512', 'amx'] as const;
export type KernelSet = (typeof KERNEL_SETS)[number];

export interface CpuReport {
  /** Kernel sets that this CPU can run, weakest first. The last is the default. */
  kernelSets: KernelSet[];
  /** CPU features that the kernels use and this CPU has, e.g. `avx2 fma f16c avx512f avx512_vnni`. */
  features: string[];
  /** Cores this process may run on. */
  cores: number;
}

/** Number types of source tensors, as safetensors spells them. */
export type SourceType = 'F32' | 'F16' | 'BF16';

/**
 * Where encoded vectors go: vector number v (see `order`) has its weights at
 * `floor(v / perUnit) * unitBytes + (v % perUnit) * weightsStride + weightsOffset`, and its scales likewise.
 * A plain tensor has perUnit 1, unitBytes = weightsStride = the row's bytes.
 */
export interface Placement {
  perUnit: number;
  unitBytes: number;
  weightsOffset: number;
  weightsStride: number;
  scalesOffset: number;
  scalesStride: number;
}

/** In `order`, in place of a vector number: this row or column becomes none. */
export const SKIPPED = 0xffffffff;

export interface EncodeRowsRequest {
  /** Row-major source, `rows` x `columns` numbers of `sourceType`. */
  source: Uint8Array;
  sourceType: SourceType;
  rows: number;
  columns: number;
  encoding: 'f32' | 'f16' | 'q8' | 'q4';
  target: Uint8Array;
  placement: Placement;
  /** Number of the vector that source row r becomes: `order[r]` if given (`SKIPPED` for none), else `firstVector + r`. */
  firstVector: number;
  order?: Uint32Array;
  threads: number;
}

/**
 * Encodes a band of a matrix whose **columns** are the vectors (Down: column i belongs to neuron i). The band has `rows` rows
 * beginning at matrix row `firstElement` (a multiple of 256), and `columns` columns = vectors. Elements past the band of the
 * last partial group are padded with zero.
 */
export interface EncodeColumnsRequest extends EncodeRowsRequest {
  firstElement: number;
  /**
   * q4 only: 32 vectors, from the first on, share the scale of each 32 of their elements. The first is a multiple of 32 in its
   * expert; with `order` the vectors are 0 to some n - 1, each once. The last tile may be short.
   */
  tiles: boolean;
}

/** Where the weights and scales of a matrix begin in a cluster; native/quantize/cluster.h. */
export interface PackedMatrix {
  weights: number;
  scales: number;
}

/** Neurons of a cluster that become weights of a dense unit, FORMAT.md section 7. */
export interface PackClusterRequest {
  /** q4 bundles of `layout`, from the beginning of a unit; the first neuron is in slot `slot` of it. */
  units: Uint8Array;
  layout: EngineRequest['layout'];
  slot: number;
  neurons: number;
  /** The same and the zeros behind them: a multiple of 32. */
  paddedNeurons: number;
  /** Number of the first in its cluster, a multiple of 32. */
  first: number;
  /** The cluster's bytes, zero before the first call. `neurons` of it are a multiple of 32. */
  target: Uint8Array;
  parts: { gate?: PackedMatrix; up: PackedMatrix; down: PackedMatrix; neurons: number; hiddenSize: number };
  threads: number;
}

/** A number that cannot be stored: NaN or infinite, or too large for f16. Row and column of the source as given. */
export interface BadNumber {
  row: number;
  column: number;
  value: number;
}

/** A tensor of `resident.bin` or `predictor.bin`, at an absolute file offset. */
export interface NativeTensor {
  name: string;
  offset: number;
  bytes: number;
  encoding: 'f32' | 'f16' | 'q8' | 'q4';
  rows: number;
  columns: number;
}

/** An extent to load and check, at its file offset. */
export interface NativeExtent {
  name: string;
  file: 'resident' | 'neurons' | 'predictor';
  offset: number;
  bytes: number;
  crc32: number;
}

/**
 * How neurons are kept when not all of them are in memory; docs/ARCHITECTURE.md. Three numbers for each bank (layer and
 * expert, layer-major): neurons whose gates stay in memory (a multiple of 128, or all), neurons whose up and down stay (the
 * hottest, at most resident gates), and slots for others that come and go. With a predictor gates are kept with their rows:
 * `residentGates` is 0, hot neurons and slots are of whole neurons.
 */
export interface StreamRequest {
  residentGates: number[];
  hotNeurons: number[];
  coldSlots: number[];
  /** Memory for reads on their way and being computed. */
  stagingBytes: number;
  mode: 'direct' | 'buffered';
  backend: 'threads' | 'uring';
  /** Reads under way at once (threads). */
  lanes: number;
  /** With a predictor: memory for neurons that are guessed and read while attention computes. Default: 0, none are. */
  prefetchBytes?: number;
  /**
   * Whether the gate of a missing neuron is read first, and its rows only if it fires. Default: what some reads at open show to
   * be faster.
   */
  twoPhase?: boolean;
  /** Which neurons slots keep: those that fire often, or (a baseline) those that fired last. Default: `frequency`. */
  policy?: 'frequency' | 'recency';
  /** To measure what a step brings, it is taken away: neurons read as bundles, computing while reads are on their way. */
  bundles?: boolean;
  pipeline?: boolean;
  /**
   * What the cache expects of neurons before it has seen them: the share of the tokens routed to its bank that each fires for on
   * calibration text, from 0 to 1. One a neuron: banks in order, neurons in heat order. Absent: nothing is known.
   */
  firingRates?: Float32Array;
  /** Trouble that tests ask for. Reads are numbered from 1; that one fails with EIO, or ends early; every read takes a delay. */
  trial?: { failRead?: number; shortRead?: number; delayUs?: number };
}

/**
 * A predictor of which neurons contribute (paper section 1.9): score = bias + fc2^T relu(fc1 x), one a neuron. Tensors as
 * FORMAT.md section 6 has them. Steps that do not ask for exactness compute only neurons whose score reaches a threshold.
 */
export interface PredictorRequest {
  path: string;
  extents: NativeExtent[];
  tensors: NativeTensor[];
  /** What fc1 multiplies: the residual stream after attention, or the FFN's normed input. */
  input: 'residual' | 'ffn_norm';
  /** For each layer: a neuron in memory is computed from this score on, one on flash is fetched from that on. */
  memoryThresholds: number[];
  flashThresholds: number[];
  /** For calibration: neurons of an expert from this number on (in heat order) count as on flash, wherever they are. */
  flashFrom?: number;
}

/** Sizes of the predictor of one bank, and its numbers. */
export interface PredictorNumbers {
  hiddenSize: number;
  neuronCount: number;
  rank: number;
  /** fc1 (rank x hidden), then fc2 (rank x neurons), then the bias of each neuron. */
  parameters: Float32Array;
}

/**
 * A piece of the training of one bank's predictor: a step of Adam for each `batchSize` tokens of `order`. All state is the
 * caller's, `parameters` and `moments` are changed in place; the result does not depend on `threads`.
 */
export interface TrainPredictorRequest extends PredictorNumbers {
  /** [tokens x hidden] */
  inputs: Float32Array;
  /** Entries of token t in the next two: `starts[t]` up to `starts[t + 1]`. */
  starts: Uint32Array;
  /** Neurons that fire for the token, each once. */
  neurons: Uint32Array;
  /** What they contribute, relative to the mean. */
  weights: Float32Array;
  /** Two for each parameter, zero before the first step. */
  moments: Float32Array;
  stepsBefore: number;
  order: Uint32Array;
  batchSize: number;
  learningRate: number;
  threads: number;
}

/** Bytes that opening a request takes: what its counters show once it is open, and memory needed only while it opens. */
export interface EngineMemory {
  weightBytes: number;
  kvBytes: number;
  scratchBytes: number;
  unitBytes: number;
  loadBytes: number;
}

export interface EngineRequest {
  residentPath: string;
  neuronsPath: string;
  /** Every extent but the bundle checksums: read once, its CRC-32 compared, `NATIVE_CHECKSUM` naming the wrong one. */
  extents: NativeExtent[];
  /** Everything but checksums. */
  tensors: NativeTensor[];
  /** One entry for each layer and expert (layer-major): where its bundles begin in `neurons.bin`. */
  expertOffsets: number[];
  /**
   * Where in `resident.bin` the heat order of each of them is (neuronCount u32); their extents must be among `extents`. Absent:
   * neurons are in the order of the checkpoint. Sums are made in that order.
   */
  orderOffsets?: number[];
  /**
   * Checksums of the bundles, which are loaded only with `stream`: their extents, and where in `resident.bin` those of each bank
   * begin. Whatever is read from flash is compared; a wrong neuron fails the step with `NATIVE_CHECKSUM`, naming it.
   */
  checksums: { extents: NativeExtent[]; offsets: number[] };
  layout: {
    matrices: number;
    part1Bytes: number;
    part2Bytes: number;
    neuronsPerUnit: number;
    unitBytes: number;
    part1Stride: number;
    part2Offset: number;
    part2Stride: number;
  };
  ffnEncoding: 'f16' | 'q8' | 'q4';
  hiddenSize: number;
  layerCount: number;
  headCount: number;
  kvHeadCount: number;
  headDim: number;
  neuronCount: number;
  vocabSize: number;
  normKind: 'rms' | 'layer';
  normEpsilon: number;
  /** Rotary frequencies, head_dim/2 of them, scaling applied; empty for learned positions. */
  ropeFrequencies: Float32Array;
  /** For each layer; 0 is unlimited. */
  windows: number[];
  gated: boolean;
  activation: 'silu' | 'relu' | 'drelu' | 'fatrelu';
  threshold: number;
  /** 1 and 1 for a dense FFN. */
  expertCount: number;
  expertsPerToken: number;
  /** Positions the KV cache holds: of one sequence, and of all together, where what they share counts once. */
  contextLength: number;
  /** Sequences that the KV cache holds at a time, numbered from 0. Default: 1. */
  sequences?: number;
  threads: number;
  /** Absent: the best this CPU has. */
  kernelSet?: KernelSet;
  /** Most tokens computed together in a step; longer steps are cut into pieces of it. */
  batchSize: number;
  /** Absent: every neuron is resident. */
  stream?: StreamRequest;
  /** Absent: every gate is computed. */
  predictor?: PredictorRequest;
  /** Absent: the CPU computes every neuron. Steps that record what fires are the CPU's alone in any case. */
  unit?: UnitRequest;
  /**
   * Both files are mapped and every neuron is computed: what is in memory is the page cache's choice. Without `stream` and
   * `predictor`. A page that cannot be read fails every step from then on with `NATIVE_IO`. Absent: no.
   */
  mapped?: boolean;
  /** Records (of 32 bytes) of each thread's trace, which keeps the newest. Default: 0, nothing is traced. */
  traceRecords?: number;
}

/**
 * `count` tokens of one sequence at positions `position`, `position + 1`, …; below, it must be filled, and what it holds from
 * there on is forgotten.
 */
export interface SequenceRun {
  sequence: number;
  position: number;
  count: number;
}

export interface StepRequest {
  /** Tokens of all runs, one run behind another. */
  tokens: Int32Array;
  /** At least one, each of another sequence. They are computed together, and each gets the bits that it gets alone. */
  runs: readonly SequenceRun[];
  /** Receives logits: of every token if `all`, else of the last of each run. vocabSize floats for each. */
  logits: Float32Array;
  all: boolean;
  /** Whether every neuron that fires is computed, though the engine has a predictor. Default: no. */
  exact?: boolean;
  /**
   * Whether these tokens are of a prompt, which a matrix unit (kernel set `amx`) may compute, in bf16 and another order of sums:
   * the same bits whatever steps the prompt is cut into. Default: no.
   */
  prompt?: boolean;
  /**
   * If given, receives which neurons fired: for each token, for each layer, for each expert, ceil(neurons / 8) bytes in which
   * bit i % 8 of byte i / 8 says that neuron i (in heat order) fired. Neurons of experts that were not routed to have not.
   */
  fired?: Uint8Array;
  /**
   * If given, receives which experts tokens were routed to: for each token, for each layer, ceil(experts / 8) bytes of bits as
   * above. The FFN of a dense model is its expert 0.
   */
  routed?: Uint8Array;
  /** If given, receives what the FFN of each token and layer gets, hiddenSize numbers each, as `input` says. */
  inputs?: Float32Array;
  /** What `inputs` receives: the residual stream after attention, or that same normed. Default: `ffn_norm`. */
  input?: 'residual' | 'ffn_norm';
  /**
   * If given, receives what each neuron contributes before its routing weight, 0 if it does not fire: for each token, for each
   * layer, for each of the expertsPerToken experts it uses (ascending), neuronCount numbers. Only with every neuron in memory.
   */
  activations?: Float32Array;
}

/** Records of 32 bytes, thread by thread, and how many were lost: the oldest. */
export interface NativeTrace {
  records: ArrayBuffer;
  dropped: number;
}

/** Bytes a second; null where it cannot be measured: memory that is mapped, flash that nothing is streamed from. */
export interface Bandwidths {
  memory: number | null;
  flash: number | null;
}

/** An open model. One step at a time: a second call before the first settles is refused with `NATIVE_BUSY`. */
export interface NativeEngine extends NativeUnitCalls {
  readonly kernelSet: KernelSet;
  step(request: StepRequest): Promise<void>;
  /**
   * Lets sequence `to`, which must be empty, go on from the first `positions` positions of `from`: both share them, nothing is
   * copied. Between steps.
   */
  fork(request: { from: number; to: number; positions: number }): void;
  /** Empties a sequence: what it did not share is free for others. Between steps. */
  release(request: { sequence: number }): void;
  counters(): EngineCounters;
  /** What threads did since the last call: records as native/base/trace.h has them, and how many did not fit. */
  drainTrace(): NativeTrace;
  /**
   * What memory and flash give at best, in 0.1 s: the engine's own weights, read by its own threads, and reads of
   * `flashReadBytes` bytes (rounded to pages; 0 leaves flash alone) all over the neurons. Not while a step runs.
   */
  measureBandwidths(request: { flashReadBytes: number }): Promise<Bandwidths>;
  /** Frees all memory; later calls are refused. Waits for a running step. */
  close(): Promise<void>;
}

export interface NativeAddon {
  cpu(): CpuReport;
  /** Names of the stages that records of a trace have the numbers of. */
  traceStages(): string[];
  encodeRows(request: EncodeRowsRequest): Promise<BadNumber | null>;
  encodeColumns(request: EncodeColumnsRequest): Promise<BadNumber | null>;
  /** Packs neurons of a cluster for a dense unit. Rejects if Down has not one scale for each tile. */
  packCluster(request: PackClusterRequest): Promise<void>;
  /** Decodes `rows` vectors that `encodeRows` wrote back to float32, row-major (for tests and inspection). */
  decodeRows(request: {
    source: Uint8Array;
    rows: number;
    columns: number;
    encoding: 'f32' | 'f16' | 'q8' | 'q4';
    placement: Placement;
  }): Float32Array;
  /** CRC-32 (IEEE) of `bytes`, continuing from `seed` (0 at first), off the JavaScript thread. */
  crc32(bytes: Uint8Array, seed: number): Promise<number>;
  /** CRC-32 of part 1 and part 2 of `neurons` bundles laid out from the start of `units`: 2 numbers a neuron. */
  bundleChecksums(request: {
    units: Uint8Array;
    neurons: number;
    layout: EngineRequest['layout'];
    threads: number;
  }): Promise<Uint32Array>;
  /** What `openEngine` would take. The one place that knows: plans are made by asking it. */
  memoryNeeded(request: EngineRequest): EngineMemory;
  openEngine(request: EngineRequest): Promise<NativeEngine>;
  /** Drives the engine's neuron cache through a trace, one token after another, with the calls that decoding makes. */
  replayCache(request: ReplayRequest): Promise<ReplayCounters>;
  trainPredictor(request: TrainPredictorRequest): Promise<void>;
  /** Fills `scores` [tokens x neurons] from `inputs` [tokens x hidden]. */
  scorePredictor(
    request: PredictorNumbers & { inputs: Float32Array; scores: Float32Array; threads: number },
  ): Promise<void>;
  /**
   * Bytes of a file that are in the kernel's page cache, in whole pages; asking brings none in. Null where the kernel does not
   * tell: it does for files that the process owns or may write. A missing file is `NATIVE_IO`.
   */
  pageCacheBytes(path: string): Promise<number | null>;
  /** Zeroed memory that begins on a page, as reads and writes past the page cache want it; on huge pages where it is large. */
  allocatePages(bytes: number): ArrayBuffer;
  /** Bytes a second that `threads` threads read from anonymous memory of `bytes` bytes, best of several sweeps of the first GiB. */
  measureReadBandwidth(request: { threads: number; bytes: number }): Promise<number>;
  /** Bytes a second that reads of a file bring past the page cache, `lanes` at once; `how` says how they were really made. */
  measureFlashBandwidth(request: {
    path: string;
    blockBytes: number;
    lanes: number;
    random: boolean;
    seconds: number;
  }): Promise<{ bytesPerSecond: number; how: string }>;
}
