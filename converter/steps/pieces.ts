import { type Placement, SKIPPED } from '../../src/engine/contract.js';
import { type Encoding, GROUP, rowBytes, scaleBytes, weightBytes } from '../../src/format/encoding.js';
import { type BundleLayout, expertBytes } from '../../src/format/layout.js';
import { DOWN_TILE } from '../../src/format/npu.js';
import type { SourceTensor } from '../checkpoint/model.js';
import {
  CHECKSUM_BYTES,
  type NeuronExtent,
  numberBytes,
  type PlannedTensor,
  TENSOR_ALIGNMENT,
  type TensorExtent,
} from './extents.js';

/** What a piece may hold in memory. */
export interface Limits {
  /** Encoded bytes of a piece. */
  pieceBytes: number;
  /** Source bytes read at once. */
  chunkBytes: number;
}

/** A rectangle of a source matrix, read in one go, and where its vectors go once encoded. */
export interface Load {
  source: SourceTensor;
  firstRow: number;
  rows: number;
  firstColumn: number;
  columns: number;
  encoding: Encoding;
  /** Rows are vectors (gate, up, all tensors), or columns are (down). */
  vectors: 'rows' | 'columns';
  /** Range of the piece that the vectors lie in, and where in it. */
  begin: number;
  end: number;
  placement: Placement;
  firstVector: number;
  /** In heat order: the vector that each row (column) read becomes, `SKIPPED` for columns that belong to other pieces. */
  order?: Uint32Array;
  /** Of columns: whether 32 vectors share a scale. */
  tiles: boolean;
  /** In heat order: the rows to read, ascending, in place of `firstRow` and those after it. */
  rowList?: Uint32Array;
}

/** Neurons of one expert in a piece, for their checksums. */
export interface NeuronRange {
  /** Where in the piece. */
  begin: number;
  end: number;
  neurons: number;
}

/** A contiguous range of an extent that is encoded in memory, written and recorded in the journal as one step. */
export interface Piece {
  extent: TensorExtent | NeuronExtent;
  /** Bytes of the extent. The next piece begins where this one ends. */
  begin: number;
  end: number;
  loads: Load[];
  ranges: NeuronRange[];
}

/**
 * Larger pieces gain nothing, smaller ones wait more often for the disk to confirm. Only an expert whose columns are read
 * whole may be larger.
 */
const GOAL_BYTES = 64 * 1024 * 1024;

/**
 * Cuts what is left of an extent, from byte `done` on, into pieces within the limits. Throws a RangeError if `done` is not
 * where a piece can begin, or if a row or unit alone exceeds the limits (see `leastLimits`).
 */
export function cutPieces(extent: TensorExtent | NeuronExtent, done: number, limits: Limits): Piece[] {
  return extent.kind === 'tensors' ? cutTensors(extent, done, limits) : cutNeurons(extent, done, limits);
}

/** Units that a piece is made of: one, or with tiles as many as hold whole ones. */
function wholeUnits({ layout: { neurons_per_unit: perUnit }, tiles }: NeuronExtent): number {
  let units = 1;
  while (tiles && (units * perUnit) % DOWN_TILE !== 0) units++;
  return units;
}

/**
 * The least limits that an extent can be converted within: one row, one unit, one band of one column. With tiles the neurons of
 * one belong together; in heat order their columns may be any.
 */
export function leastLimits(extent: TensorExtent | NeuronExtent): Limits {
  if (extent.kind === 'neurons') {
    const most = Math.max(
      ...extent.experts.flatMap((e) => [e.gate, e.up, e.down]).map((m) => (m ? numberBytes(m) : 0)),
    );
    const columns = !extent.tiles ? 1 : extent.order ? extent.neuronCount : DOWN_TILE;
    return {
      pieceBytes: wholeUnits(extent) * extent.layout.unit_bytes,
      chunkBytes: most * Math.max(extent.hiddenSize, GROUP * columns),
    };
  }
  return {
    pieceBytes:
      TENSOR_ALIGNMENT + Math.max(...extent.tensors.map((tensor) => rowBytes(tensor.encoding, tensor.columns))),
    chunkBytes: Math.max(...extent.tensors.map((tensor) => tensor.columns * numberBytes(tensor.source))),
  };
}

/** Bytes of the source that a load reads. */
export function loadBytes(load: Load): number {
  return load.rows * load.columns * numberBytes(load.source);
}

/** Bytes of the source that a load encodes: without columns that it has to read and leaves to other pieces. */
export function encodedBytes(load: Load): number {
  if (load.vectors === 'rows' || !load.order) return loadBytes(load);
  let columns = 0;
  for (const vector of load.order) if (vector !== SKIPPED) columns++;
  return load.rows * columns * numberBytes(load.source);
}

/** Bytes of the checksums of a piece's neurons, and where they go in the layer's checksum extent. */
export function checksumRange(piece: Piece): { begin: number; end: number } {
  const extent = piece.extent as NeuronExtent;
  const whole = expertBytes(extent.layout, extent.neuronCount);
  const expert = Math.floor(piece.begin / whole);
  const unit = (piece.begin % whole) / extent.layout.unit_bytes;
  const first = expert * extent.neuronCount + unit * extent.layout.neurons_per_unit;
  const neurons = piece.ranges.reduce((sum, range) => sum + range.neurons, 0);
  return { begin: first * CHECKSUM_BYTES, end: (first + neurons) * CHECKSUM_BYTES };
}

function cutTensors(extent: TensorExtent, done: number, limits: Limits): Piece[] {
  const most = Math.min(limits.pieceBytes, GOAL_BYTES);
  const cutter = new Cutter(extent, done);
  for (const tensor of extent.tensors) {
    const bytesPerRow = rowBytes(tensor.encoding, tensor.columns);
    const sourceRowBytes = tensor.columns * numberBytes(tensor.source);
    let row = rowAfter(done - tensor.offset, bytesPerRow, tensor.rows);
    while (row < tensor.rows) {
      const begin = tensor.offset + row * bytesPerRow;
      if (begin + bytesPerRow - cutter.begin > most) cutter.cut();
      const room = Math.max(1, Math.floor((most - (begin - cutter.begin)) / bytesPerRow));
      const rows = Math.min(tensor.rows - row, room);
      cutter.end = begin + rows * bytesPerRow;
      if (tensor.order) {
        cutter.load(orderedVector(tensor, tensor.order, begin - cutter.begin));
        row += rows;
        continue;
      }
      for (const [first, count] of runs(row, rows, Math.floor(limits.chunkBytes / sourceRowBytes))) {
        cutter.load({
          source: tensor.source,
          firstRow: tensor.firstSourceRow + first,
          rows: count,
          firstColumn: 0,
          columns: tensor.columns,
          encoding: tensor.encoding,
          vectors: 'rows',
          begin: begin - cutter.begin,
          end: cutter.end - cutter.begin,
          placement: rowPlacement(tensor.encoding, tensor.columns),
          firstVector: first - row,
          tiles: false,
        });
      }
      row += rows;
    }
  }
  return cutter.finish();
}

/** A vector whose numbers are put in heat order: as a matrix of one column, whose rows are then vectors of one number. */
function orderedVector(tensor: PlannedTensor, order: Uint32Array, begin: number): Load {
  return {
    source: { ...tensor.source, shape: [tensor.columns, 1] },
    firstRow: 0,
    rows: tensor.columns,
    firstColumn: 0,
    columns: 1,
    encoding: tensor.encoding,
    vectors: 'rows',
    begin,
    end: begin + tensor.bytes,
    placement: rowPlacement(tensor.encoding, 1),
    firstVector: 0,
    order: vectorsOf(order, tensor.columns),
    tiles: false,
  };
}

function cutNeurons(extent: NeuronExtent, done: number, limits: Limits): Piece[] {
  const { layout, neuronCount } = extent;
  const perUnit = layout.neurons_per_unit;
  const bytesPerExpert = expertBytes(layout, neuronCount);
  const whole = wholeUnits(extent);
  const mostUnits = Math.floor(limits.pieceBytes / layout.unit_bytes / whole) * whole;
  const isBorder = done === extent.bytes || ((done % bytesPerExpert) / layout.unit_bytes) % whole === 0;
  if (!isBorder || mostUnits < 1) throw new RangeError(`${extent.name}: cannot begin at ${done}`);
  const cutter = new Cutter(extent, done);
  for (const [e, expert] of extent.experts.entries()) {
    const units = bytesPerExpert / layout.unit_bytes;
    let unit = rowAfter(done - e * bytesPerExpert, layout.unit_bytes, units);
    while (unit < units) {
      const begin = e * bytesPerExpert + unit * layout.unit_bytes;
      const count = Math.min(units - unit, mostUnits);
      const bytes = count * layout.unit_bytes;
      if (begin + bytes - cutter.begin > Math.min(limits.pieceBytes, GOAL_BYTES)) cutter.cut();
      cutter.end = begin + bytes;
      const first = unit * perUnit;
      const neurons = Math.min(neuronCount - first, count * perUnit);
      const range = { begin: begin - cutter.begin, end: cutter.end - cutter.begin, neurons };
      cutter.range(range);
      const start = e * neuronCount + first;
      const scattered = extent.order && scatter(extent.order.subarray(start, start + neurons), neuronCount);
      const matrices = [expert.gate, expert.up, expert.down].filter((matrix) => matrix !== undefined);
      for (const [m, source] of matrices.entries()) {
        const isDown = source === expert.down;
        const tiles = isDown && extent.tiles;
        const common = { source, encoding: extent.encoding, begin: range.begin, end: range.end, tiles };
        const placement = bundlePlacement(layout, extent.encoding, extent.hiddenSize, m);
        if (scattered) {
          for (const load of scatteredLoads(extent, scattered, isDown, limits.chunkBytes, source)) {
            cutter.load({ ...common, ...load, placement });
          }
        } else if (isDown) {
          const multiple = tiles ? DOWN_TILE : 1;
          for (const band of bands(extent.hiddenSize, neurons, limits.chunkBytes, numberBytes(source), multiple)) {
            cutter.load({
              ...common,
              ...band,
              firstColumn: first + band.firstColumn,
              vectors: 'columns',
              placement,
              firstVector: band.firstColumn,
            });
          }
        } else {
          const rows = Math.floor(limits.chunkBytes / (extent.hiddenSize * numberBytes(source)));
          for (const [row, count] of runs(0, neurons, rows)) {
            cutter.load({
              ...common,
              firstRow: first + row,
              rows: count,
              firstColumn: 0,
              columns: extent.hiddenSize,
              vectors: 'rows',
              placement,
              firstVector: row,
            });
          }
        }
      }
      unit += count;
    }
  }
  return cutter.finish();
}

/** Where the neurons of a range lie in the checkpoint. */
interface Scattered {
  /** Neurons of the range, ascending, and the vector that each becomes. */
  rows: Uint32Array;
  vectors: Uint32Array;
  /** For every neuron of the expert: the vector it becomes, or `SKIPPED`. */
  columns: Uint32Array;
}

function scatter(order: Uint32Array, neuronCount: number): Scattered {
  const rows = order.slice().sort();
  const columns = vectorsOf(order, neuronCount);
  return { rows, vectors: rows.map((neuron) => columns[neuron]), columns };
}

/** The place of each of `count` things in `order`, or `SKIPPED`. */
function vectorsOf(order: Uint32Array, count: number): Uint32Array {
  const vectors = new Uint32Array(count).fill(SKIPPED);
  for (let i = 0; i < order.length; i++) vectors[order[i]] = i;
  return vectors;
}

/**
 * The loads of one matrix for neurons that are scattered over it. Rows are read where they are wanted; columns would be single
 * numbers, so that whole bands of them are read and those of other pieces left out.
 */
function* scatteredLoads(
  extent: NeuronExtent,
  { rows, vectors, columns }: Scattered,
  isDown: boolean,
  chunkBytes: number,
  source: SourceTensor,
): Generator<
  Pick<Load, 'firstRow' | 'rows' | 'firstColumn' | 'columns' | 'vectors' | 'firstVector' | 'order' | 'rowList'>
> {
  if (isDown) {
    const multiple = extent.tiles ? extent.neuronCount : 1;
    for (const band of bands(extent.hiddenSize, extent.neuronCount, chunkBytes, numberBytes(source), multiple)) {
      const order = columns.subarray(band.firstColumn, band.firstColumn + band.columns);
      if (order.some((vector) => vector !== SKIPPED)) yield { ...band, vectors: 'columns', firstVector: 0, order };
    }
    return;
  }
  const most = Math.floor(chunkBytes / (extent.hiddenSize * numberBytes(source)));
  for (const [first, count] of runs(0, rows.length, most)) {
    const rowList = rows.subarray(first, first + count);
    const order = vectors.subarray(first, first + count);
    const whole = { firstColumn: 0, columns: extent.hiddenSize };
    yield { ...whole, firstRow: rowList[0], rows: count, vectors: 'rows', firstVector: 0, order, rowList };
  }
}

/** Where matrix number `matrix` (gate, up, down; without a gate: up, down) of a bundle goes; FORMAT.md section 4. */
export function bundlePlacement(
  layout: BundleLayout,
  encoding: Encoding,
  hiddenSize: number,
  matrix: number,
): Placement {
  const weights = weightBytes(encoding, hiddenSize);
  return {
    perUnit: layout.neurons_per_unit,
    unitBytes: layout.unit_bytes,
    weightsOffset: matrix === 0 ? 0 : layout.part2_offset + (matrix - 1) * weights,
    weightsStride: matrix === 0 ? layout.part1_stride : layout.part2_stride,
    scalesOffset: weights + matrix * scaleBytes(encoding, hiddenSize),
    scalesStride: layout.part1_stride,
  };
}

/** Rows one behind another, each its weights and then its scales. */
export function rowPlacement(encoding: Encoding, columns: number): Placement {
  const bytes = rowBytes(encoding, columns);
  return {
    perUnit: 1,
    unitBytes: bytes,
    weightsOffset: 0,
    weightsStride: bytes,
    scalesOffset: weightBytes(encoding, columns),
    scalesStride: bytes,
  };
}

/** Rectangles of Down [hidden x neurons]: whole groups of rows, all columns where the chunk allows it, else a multiple. */
function bands(hiddenSize: number, neurons: number, chunkBytes: number, bytesPerNumber: number, multiple: number) {
  const bandBytes = GROUP * bytesPerNumber;
  const columns = Math.min(neurons, Math.floor(chunkBytes / bandBytes / multiple) * multiple);
  const groups = Math.floor(chunkBytes / (bandBytes * columns));
  const rectangles: Pick<Load, 'firstRow' | 'rows' | 'firstColumn' | 'columns'>[] = [];
  for (const [firstRow, rows] of runs(0, hiddenSize, groups * GROUP)) {
    for (const [firstColumn, count] of runs(0, neurons, columns)) {
      rectangles.push({ firstRow, rows, firstColumn, columns: count });
    }
  }
  return rectangles;
}

/** `count` things from `first` on in runs of at most `most`: [first, count] of each. */
function* runs(first: number, count: number, most: number): Generator<[number, number]> {
  if (most < 1) throw new RangeError('a row does not fit the chunk');
  for (let i = 0; i < count; i += most) yield [first + i, Math.min(most, count - i)];
}

/** The first row that byte `offset` of a tensor does not follow. Throws a RangeError inside a row. */
function rowAfter(offset: number, bytesPerRow: number, rows: number): number {
  if (offset <= 0) return 0;
  if (offset >= rows * bytesPerRow) return rows;
  if (offset % bytesPerRow !== 0) throw new RangeError(`byte ${offset} is inside a row of ${bytesPerRow}`);
  return offset / bytesPerRow;
}

/** Collects loads until a piece is full. */
class Cutter {
  readonly #extent: Piece['extent'];
  readonly #pieces: Piece[] = [];
  #loads: Load[] = [];
  #ranges: NeuronRange[] = [];
  begin: number;
  end: number;

  constructor(extent: Piece['extent'], begin: number) {
    this.#extent = extent;
    this.begin = begin;
    this.end = begin;
  }

  load(load: Load): void {
    this.#loads.push(load);
  }

  range(range: NeuronRange): void {
    this.#ranges.push(range);
  }

  /** Ends the piece; the following one begins where it ended, zeros before its first tensor included. */
  cut(): void {
    if (this.#loads.length === 0) return;
    const { begin, end } = this;
    this.#pieces.push({ extent: this.#extent, begin, end, loads: this.#loads, ranges: this.#ranges });
    this.#loads = [];
    this.#ranges = [];
    this.begin = end;
  }

  finish(): Piece[] {
    this.cut();
    return this.#pieces;
  }
}
