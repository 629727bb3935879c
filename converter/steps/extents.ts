import { Pi2Error } from '../../src/base/error.js';
import { type Encoding, rowBytes } from '../../src/format/encoding.js';
import { expertCount, type Hyperparameters } from '../../src/format/hyperparameters.js';
import { type BundleLayout, chooseBundleLayout, expertBytes, roundUpToPage } from '../../src/format/layout.js';
import { type Extent, NEURONS_FILE, RESIDENT_FILE, type TensorEntry } from '../../src/format/manifest.js';
import { bankExtent, bankLayout, NPU_WEIGHTS_FILE } from '../../src/format/npu.js';
import type { HeatOrder } from '../activation/heat-order.js';
import type { SourceExpert, SourceLayer, SourceModel, SourceTensor } from '../checkpoint/model.js';
import type { MatrixEncoding, Recipe } from '../quantize/recipe.js';

/** Tensors begin on a cache line. */
export const TENSOR_ALIGNMENT = 64;
/** A neuron's checksums: CRC-32 of part 1 and of part 2. */
export const CHECKSUM_BYTES = 8;

/** What conversion fills step by step; a predictor's file is written whole, later. */
type StepFile = typeof RESIDENT_FILE | typeof NEURONS_FILE | typeof NPU_WEIGHTS_FILE;
type Place<File extends StepFile = typeof RESIDENT_FILE | typeof NEURONS_FILE> = Omit<Extent, 'crc32' | 'file'> & {
  file: File;
};

/** A tensor to be, and the rows of the checkpoint it is made of. */
export interface PlannedTensor extends Omit<TensorEntry, 'encoding'> {
  encoding: Encoding;
  source: SourceTensor;
  firstSourceRow: number;
  /** Of a vector with a number for each neuron: element j is number `order[j]` of the source. */
  order?: Uint32Array;
}

/** An extent of matrices and vectors that are encoded row by row. */
export interface TensorExtent extends Place {
  kind: 'tensors';
  tensors: PlannedTensor[];
}

/** One layer's FFN: the bundles of its experts. */
export interface NeuronExtent extends Place {
  kind: 'neurons';
  experts: SourceExpert[];
  neuronCount: number;
  hiddenSize: number;
  encoding: MatrixEncoding;
  layout: BundleLayout;
  checksums: ChecksumExtent;
  /** Whether 32 neurons share a scale of Down. */
  tiles: boolean;
  /** [experts x neurons]: bundle j of an expert is neuron `order[j]` of the checkpoint; null when it is neuron j. */
  order: Uint32Array | null;
}

/** One layer's bundle checksums, filled while its neurons are written. */
export interface ChecksumExtent extends Place {
  kind: 'checksums';
  tensor: TensorEntry;
}

/** One layer's heat order, as it is stored. */
export interface HeatOrderExtent extends Place {
  kind: 'heat_order';
  tensor: TensorEntry;
  order: Uint32Array;
}

/** One bank's weights for a dense unit, made of its bundles once they are written. */
export interface NpuExtent extends Place<typeof NPU_WEIGHTS_FILE> {
  layer: number;
  expert: number;
}

/** Where every byte of the model directory will be, decided before the first is written. */
export interface Plan {
  /** In order of file and offset. */
  resident: (TensorExtent | ChecksumExtent | HeatOrderExtent)[];
  neurons: NeuronExtent[];
  /** None without `npu/`. */
  npu: NpuExtent[];
  layout: BundleLayout;
  residentBytes: number;
  neuronsBytes: number;
  npuBytes: number;
  /** Bytes of the checkpoint that are read to be encoded. */
  sourceBytes: number;
}

/**
 * Lays out `resident.bin` and `neurons.bin` (FORMAT.md sections 3 and 4). A pure function of the checkpoint's shapes:
 * neither memory nor threads have a say, so the same checkpoint and recipe always give the same files. `order` is the heat
 * order of each layer; null leaves neurons where they are.
 */
export function planExtents(model: SourceModel, recipe: Recipe, order: HeatOrder | null = null): Plan {
  const h = model.hyperparameters;
  const matrices = h.ffn.gated ? 3 : 2;
  const layout = chooseBundleLayout(recipe.ffn, h.hidden_size, matrices);
  const resident = new FilePlanner(RESIDENT_FILE);
  const neurons = new FilePlanner(NEURONS_FILE);
  const residentExtents: Plan['resident'] = [];

  const embedding = new TensorPlanner('embedding');
  embedding.add('embedding', model.embedding, recipe.embedding);
  if (model.position_embedding) {
    const { tensor, skippedRows } = model.position_embedding;
    embedding.add('position_embedding', tensor, recipe.embedding, skippedRows);
  }
  residentExtents.push(tensorExtent(resident, embedding));
  model.layers.forEach((layer, l) => {
    residentExtents.push(tensorExtent(resident, planAttention(layer, `layers.${l}`, recipe, order?.[l])));
  });
  const head = new TensorPlanner('head');
  head.add('output_norm', model.output_norm, 'f32');
  head.add('output_norm_bias', model.output_norm_bias, 'f32');
  head.add('head', model.head, recipe.head);
  residentExtents.push(tensorExtent(resident, head));

  const bundles = expertCount(h) * h.neuron_count;
  const neuronExtents = model.layers.map((layer, l): NeuronExtent => {
    const name = `layers.${l}.checksums`;
    const bytes = bundles * CHECKSUM_BYTES;
    const checksums: ChecksumExtent = {
      kind: 'checksums',
      ...resident.extent(name, bytes),
      tensor: { name, extent: name, offset: 0, bytes, encoding: 'u32', rows: bundles, columns: 2 },
    };
    residentExtents.push(checksums);
    return {
      kind: 'neurons',
      ...neurons.extent(`layers.${l}.neurons`, layer.experts.length * expertBytes(layout, h.neuron_count)),
      experts: layer.experts,
      neuronCount: h.neuron_count,
      hiddenSize: h.hidden_size,
      encoding: recipe.ffn,
      layout,
      tiles: recipe.down_tiles !== undefined,
      checksums,
      order: order?.[l] ?? null,
    };
  });
  for (const [l, layerOrder] of (order ?? []).entries()) {
    const name = `layers.${l}.heat_order`;
    const bytes = layerOrder.byteLength;
    const [rows, columns] = [expertCount(h), h.neuron_count];
    const tensor = { name, extent: name, offset: 0, bytes, encoding: 'u32', rows, columns } as const;
    residentExtents.push({ kind: 'heat_order', ...resident.extent(name, bytes), tensor, order: layerOrder });
  }
  const npu = new FilePlanner(NPU_WEIGHTS_FILE);
  return {
    resident: residentExtents,
    neurons: neuronExtents,
    npu: recipe.down_tiles === undefined ? [] : planBanks(h, npu),
    layout,
    residentBytes: resident.end,
    neuronsBytes: neurons.end,
    npuBytes: npu.end,
    sourceBytes: sourceBytes(residentExtents, neuronExtents),
  };
}

function planBanks(h: Hyperparameters, file: FilePlanner<typeof NPU_WEIGHTS_FILE>): NpuExtent[] {
  const { bytes } = bankLayout(h);
  return Array.from({ length: h.layer_count * expertCount(h) }, (_, bank) => {
    const [layer, expert] = [Math.floor(bank / expertCount(h)), bank % expertCount(h)];
    return { ...file.extent(bankExtent(layer, expert), bytes), layer, expert };
  });
}

/** Extents in the order they are converted: layer by layer, as checkpoints store them, so that they are read nearly in order. */
export function conversionOrder(plan: Plan): (TensorExtent | NeuronExtent)[] {
  const [embedding, ...rest] = plan.resident.filter((extent) => extent.kind === 'tensors');
  const head = rest.pop() as TensorExtent;
  return [embedding, ...rest.flatMap((attention, l) => [attention, plan.neurons[l]]), head];
}

/** Bytes of one number of a source tensor. */
export function numberBytes(tensor: SourceTensor): number {
  return tensor.type === 'F32' ? 4 : 2;
}

function planAttention(layer: SourceLayer, name: string, recipe: Recipe, order?: Uint32Array): TensorPlanner {
  const planner = new TensorPlanner(`${name}.attention`);
  const add = (part: Exclude<keyof SourceLayer, 'experts'>, encoding: Encoding) =>
    planner.add(`${name}.${part}`, layer[part], encoding, 0, part === 'up_bias' ? order : undefined);
  add('attention_norm', 'f32');
  for (const part of ['q', 'k', 'v', 'o'] as const) add(part, recipe.attention);
  add('ffn_norm', 'f32');
  for (const part of [
    ...(['attention_norm_bias', 'q_bias', 'k_bias', 'v_bias', 'o_bias', 'q_norm', 'k_norm'] as const),
    ...(['ffn_norm_bias', 'router', 'up_bias', 'down_bias'] as const),
  ]) {
    add(part, 'f32');
  }
  return planner;
}

/** Puts tensors one behind another into an extent. */
class TensorPlanner {
  readonly tensors: PlannedTensor[] = [];
  bytes = 0;

  constructor(readonly name: string) {}

  add(name: string, source: SourceTensor | undefined, encoding: Encoding, skippedRows = 0, order?: Uint32Array) {
    if (!source) return;
    const [rows, columns] = source.shape.length === 1 ? [1, source.shape[0]] : source.shape;
    const offset = Math.ceil(this.bytes / TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT;
    const bytes = (rows - skippedRows) * rowBytes(encoding, columns);
    const tensor = { name, extent: this.name, offset, bytes, encoding, rows: rows - skippedRows, columns };
    this.tensors.push({ ...tensor, source, firstSourceRow: skippedRows, ...(order ? { order } : {}) });
    this.bytes = offset + bytes;
  }
}

/** Puts extents one behind another into a file, each on a page of its own. */
class FilePlanner<File extends StepFile> {
  /** Size of the file. */
  end = 0;

  constructor(readonly file: File) {}

  extent(name: string, bytes: number): Place<File> {
    const offset = this.end;
    this.end = offset + roundUpToPage(bytes);
    if (!Number.isSafeInteger(this.end)) {
      throw new Pi2Error('E_UNSUPPORTED', `${name} would end at byte ${this.end}: the model is too large to address`);
    }
    return { name, file: this.file, offset, bytes };
  }
}

function tensorExtent(file: FilePlanner<typeof RESIDENT_FILE>, planner: TensorPlanner): TensorExtent {
  return { kind: 'tensors', ...file.extent(planner.name, planner.bytes), tensors: planner.tensors };
}

function sourceBytes(resident: Plan['resident'], neurons: NeuronExtent[]): number {
  let bytes = 0;
  for (const extent of resident) {
    if (extent.kind !== 'tensors') continue;
    for (const { rows, columns, source } of extent.tensors) bytes += rows * columns * numberBytes(source);
  }
  for (const { experts, neuronCount, hiddenSize } of neurons) {
    for (const { gate, up, down } of experts) {
      for (const matrix of [gate, up, down]) if (matrix) bytes += neuronCount * hiddenSize * numberBytes(matrix);
    }
  }
  return bytes;
}
