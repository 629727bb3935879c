/** What the addon is asked to open: a model directory in its words. */
import { expertCount } from '../format/hyperparameters.js';
import {
  type Extent,
  NEURONS_FILE,
  type OperatingPoint,
  PREDICTOR_FILE,
  type PredictorEntry,
  RESIDENT_FILE,
} from '../format/manifest.js';
import type { ModelDirectory } from '../format/model-directory.js';
import type { StreamShape } from '../plan/memory-plan.js';
import type {
  EngineRequest,
  KernelSet,
  NativeExtent,
  NativeTensor,
  PredictorRequest,
  StreamRequest,
} from './contract.js';
import { ropeFrequencies } from './rope.js';

/** Reads under way at once, where a pool of threads does them. */
const READ_LANES = 4;
/** Two CRC-32 a neuron. */
const CHECKSUM_BYTES = 8;
/** A number in a heat order. */
const ORDER_BYTES = 4;

/** A request without what memory decides: how many tokens at once, streaming, a predictor. */
export type ModelRequest = Omit<EngineRequest, 'batchSize' | 'stream' | 'predictor'>;

/** The request for a model with every neuron resident, computed exactly. */
export function modelRequest(
  model: ModelDirectory,
  contextLength: number,
  threads: number,
  kernelSet: KernelSet | undefined,
): ModelRequest {
  const { hyperparameters: h, layout, quantization, heat_order } = model.manifest;
  const experts = expertCount(h);
  return {
    residentPath: model.residentPath,
    neuronsPath: model.neuronsPath,
    tensors: nativeTensors(model, isPlain),
    expertOffsets: Array.from({ length: h.layer_count * experts }, (_, i) =>
      model.expertOffset(Math.floor(i / experts), i % experts),
    ),
    extents: nativeExtents(model, (extent) => isPlain(extent) && !isChecksums(extent)),
    ...(heat_order === 'identity' ? {} : { orderOffsets: expertOffsets(model, 'heat_order', ORDER_BYTES) }),
    checksums: {
      extents: nativeExtents(model, isChecksums),
      offsets: expertOffsets(model, 'checksums', CHECKSUM_BYTES),
    },
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
  };
}

/** How neurons are read while computing. */
export function streamRequest(
  shape: StreamShape,
  how: Pick<StreamRequest, 'mode' | 'policy' | 'bundles' | 'twoPhase' | 'pipeline' | 'firingRates'>,
): StreamRequest {
  return { ...shape, ...how, backend: 'uring', lanes: READ_LANES };
}

/** The model's predictor, with the thresholds of one of its operating points. */
export function predictorRequest(
  model: ModelDirectory,
  { input }: Pick<PredictorEntry, 'input'>,
  { memory_thresholds, flash_thresholds }: Pick<OperatingPoint, 'memory_thresholds' | 'flash_thresholds'>,
): PredictorRequest {
  const isPredictor = ({ file }: Extent) => file === PREDICTOR_FILE;
  return {
    path: model.predictorPath,
    extents: nativeExtents(model, isPredictor),
    tensors: nativeTensors(model, isPredictor),
    input,
    memoryThresholds: memory_thresholds,
    flashThresholds: flash_thresholds,
  };
}

/** Where numbers of each expert begin in `resident.bin`: those of a layer are an extent, `bytes` for each of its neurons. */
function expertOffsets(model: ModelDirectory, extent: string, bytes: number): number[] {
  const { hyperparameters: h } = model.manifest;
  const experts = expertCount(h);
  return Array.from({ length: h.layer_count * experts }, (_, i) => {
    const { offset } = model.extent(`layers.${Math.floor(i / experts)}.${extent}`);
    return offset + (i % experts) * h.neuron_count * bytes;
  });
}

/** Whether an extent is of every model, neither of a predictor nor of a dense unit. */
function isPlain({ file }: Extent): boolean {
  return file === RESIDENT_FILE || file === NEURONS_FILE;
}

function isChecksums({ name }: Extent): boolean {
  return name.endsWith('.checksums');
}

/** The tensors of weights in the extents that are wanted: no checksums, no heat orders. */
function nativeTensors(model: ModelDirectory, wanted: (extent: Extent) => boolean): NativeTensor[] {
  const tensors: NativeTensor[] = [];
  for (const tensor of model.manifest.tensors) {
    const { name, bytes, encoding, rows, columns } = tensor;
    if (encoding === 'u32' || !wanted(model.extent(tensor.extent))) continue;
    tensors.push({ name, offset: model.tensorOffset(tensor), bytes, encoding, rows, columns });
  }
  return tensors;
}

const NATIVE_FILES = { [RESIDENT_FILE]: 'resident', [NEURONS_FILE]: 'neurons', [PREDICTOR_FILE]: 'predictor' } as const;
type NativeFile = keyof typeof NATIVE_FILES;

function nativeExtents(model: ModelDirectory, wanted: (extent: Extent) => boolean): NativeExtent[] {
  return model.manifest.extents.filter(wanted).map(({ name, file, offset, bytes, crc32 }) => {
    return { name, file: NATIVE_FILES[file as NativeFile], offset, bytes, crc32: Number.parseInt(crc32, 16) };
  });
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
