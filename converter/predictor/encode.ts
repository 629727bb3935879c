import { Pi2Error } from '../../src/base/error.js';
import type { NativeAddon, PredictorNumbers } from '../../src/engine/contract.js';
import { type Encoding, rowBytes } from '../../src/format/encoding.js';
import type { TensorEntry } from '../../src/format/manifest.js';
import { TENSOR_ALIGNMENT } from '../steps/extents.js';
import { rowPlacement } from '../steps/pieces.js';

/** How the matrices of predictors are stored; the bias is f32. */
export interface PredictorEncodings {
  fc1: 'f16' | 'q8' | 'q4';
  fc2: 'f16' | 'q8' | 'q4';
}

/** One layer's extent of `predictor.bin`, without the zeros that fill its last page. */
export interface EncodedLayer {
  bytes: Uint8Array;
  /** fc1, fc2, bias; FORMAT.md section 6. */
  tensors: TensorEntry[];
}

/** Stores the predictors of a layer's experts, all of one rank. Throws `E_NOT_FINITE`. */
export async function encodeLayer(
  addon: NativeAddon,
  layer: number,
  banks: readonly PredictorNumbers[],
  encodings: PredictorEncodings,
  threads: number,
): Promise<EncodedLayer> {
  const { tensors, bytes } = layerTensors(layer, banks.length, banks[0], encodings);
  const target = new Uint8Array(bytes);
  for (const [bank, { parameters, hiddenSize, neuronCount, rank }] of banks.entries()) {
    let from = 0;
    for (const [t, tensor] of tensors.entries()) {
      const rows = tensor.rows / banks.length;
      const columns = [hiddenSize, neuronCount, neuronCount][t];
      const count = [rank, rank, 1][t] * columns;
      const encoding = tensor.encoding as Encoding;
      const bad = await addon.encodeRows({
        source: new Uint8Array(parameters.buffer, parameters.byteOffset + 4 * from, 4 * count),
        sourceType: 'F32',
        ...{ rows, columns, encoding, threads },
        target: target.subarray(tensor.offset, tensor.offset + tensor.bytes),
        placement: rowPlacement(encoding, columns),
        firstVector: bank * rows,
      });
      if (bad) {
        throw new Pi2Error(
          'E_NOT_FINITE',
          `${tensor.name} of expert ${bank}: row ${bad.row}, column ${bad.column} is ${bad.value}`,
          'convert with --predictor none',
        );
      }
      from += count;
    }
  }
  return { bytes: target, tensors };
}

/** The predictors of a layer's experts as they are after being stored. */
export function decodeLayer(
  addon: NativeAddon,
  { bytes, tensors }: EncodedLayer,
  hiddenSize: number,
  neuronCount: number,
): PredictorNumbers[] {
  const [fc1, fc2, bias] = tensors.map(({ offset, bytes: size, rows, columns, encoding }) =>
    addon.decodeRows({
      source: bytes.subarray(offset, offset + size),
      ...{ rows, columns, encoding: encoding as Encoding },
      placement: rowPlacement(encoding as Encoding, columns),
    }),
  );
  const experts = tensors[2].rows;
  const rank = tensors[0].rows / experts;
  return Array.from({ length: experts }, (_, e) => {
    const part = (matrix: Float32Array) =>
      matrix.subarray((e * matrix.length) / experts, ((e + 1) * matrix.length) / experts);
    const parameters = new Float32Array((fc1.length + fc2.length + bias.length) / experts);
    parameters.set(part(fc1));
    parameters.set(part(fc2), rank * hiddenSize);
    parameters.set(part(bias), rank * (hiddenSize + neuronCount));
    return { hiddenSize, neuronCount, rank, parameters };
  });
}

/** Bytes that one token reads of one expert's predictor. */
export function predictorBytes(
  { hiddenSize, neuronCount, rank }: Omit<PredictorNumbers, 'parameters'>,
  { fc1, fc2 }: PredictorEncodings,
): number {
  return rank * (rowBytes(fc1, hiddenSize) + rowBytes(fc2, neuronCount)) + rowBytes('f32', neuronCount);
}

function layerTensors(
  layer: number,
  experts: number,
  { hiddenSize, neuronCount, rank }: PredictorNumbers,
  encodings: PredictorEncodings,
): { tensors: TensorEntry[]; bytes: number } {
  const extent = `layers.${layer}.predictor`;
  const tensors: TensorEntry[] = [];
  let end = 0;
  const add = (kind: string, rows: number, columns: number, encoding: Encoding) => {
    const offset = Math.ceil(end / TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT;
    const bytes = rows * rowBytes(encoding, columns);
    tensors.push({ name: `${extent}.${kind}`, extent, offset, bytes, encoding, rows, columns });
    end = offset + bytes;
  };
  add('fc1', experts * rank, hiddenSize, encodings.fc1);
  add('fc2', experts * rank, neuronCount, encodings.fc2);
  add('bias', experts, neuronCount, 'f32');
  return { tensors, bytes: end };
}
