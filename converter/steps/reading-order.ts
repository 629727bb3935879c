import type { SourceTensor } from '../checkpoint/model.js';
import type { Place, TensorSource } from '../checkpoint/tensor-source.js';
import { conversionOrder, type NeuronExtent, numberBytes, type Plan, type TensorExtent } from './extents.js';
import type { Load, Piece } from './pieces.js';

/**
 * The extents of a plan in the order of the checkpoint's files, so that these are read from beginning to end and hashed on the
 * way. Where an extent lies is said by its largest tensors, and of these by the first: norms lie anywhere.
 */
export function readingOrder(plan: Plan, checkpoint: TensorSource): (TensorExtent | NeuronExtent)[] {
  const extents = conversionOrder(plan).map((extent) => ({ extent, place: firstPlace(extent, checkpoint) }));
  return extents.sort((a, b) => compare(a.place, b.place)).map(({ extent }) => extent);
}

/** A piece with its loads in the order of the files, too. */
export function inReadingOrder(piece: Piece, checkpoint: TensorSource): Piece {
  const offset = ({ source, firstRow, firstColumn }: Load) =>
    (firstRow * source.shape[source.shape.length - 1] + firstColumn) * numberBytes(source);
  const placed = piece.loads.map((load) => {
    const start = checkpoint.place(load.source);
    return { load, place: start && { file: start.file, offset: start.offset + offset(load) } };
  });
  const loads = placed.sort((a, b) => compare(a.place, b.place)).map(({ load }) => load);
  return { ...piece, loads };
}

function firstPlace(extent: TensorExtent | NeuronExtent, checkpoint: TensorSource): Place | null {
  const tensors: SourceTensor[] =
    extent.kind === 'tensors'
      ? extent.tensors.map(({ source }) => source)
      : extent.experts.flatMap(({ gate, up, down }) => (gate ? [gate, up, down] : [up, down]));
  const most = tensors.reduce((bytes, tensor) => Math.max(bytes, checkpoint.bytes(tensor)), 0);
  const places = tensors
    .filter((tensor) => checkpoint.bytes(tensor) === most)
    .map((tensor) => checkpoint.place(tensor));
  return places.reduce((first, place) => (compare(place, first) < 0 ? place : first));
}

/** Files by name, then offsets; what is in no file stays in the order it has. */
function compare(a: Place | null, b: Place | null): number {
  if (!a || !b || (a.file === b.file && a.offset === b.offset)) return 0;
  if (a.file === b.file) return a.offset - b.offset;
  return a.file.name < b.file.name ? -1 : 1;
}
