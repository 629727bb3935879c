import { Pi2Error } from '../../src/base/error.js';
import type { NativeAddon, PredictorNumbers } from '../../src/engine/contract.js';
import type { SourceTensor } from '../checkpoint/model.js';
import type { SourcePredictor } from '../checkpoint/predictors.js';
import type { TensorSource } from '../checkpoint/tensor-source.js';
import { rowPlacement } from '../steps/pieces.js';

/**
 * One expert's predictor of a checkpoint as this program computes it: fc2 turned over, its neurons in heat order (`order`, null
 * for that of the checkpoint), hidden units that are always 0 up to `rank`, no bias. Throws `E_NOT_FINITE`.
 */
export async function readPredictor(
  addon: NativeAddon,
  checkpoint: TensorSource,
  { fc1, fc2, rank: own }: SourcePredictor,
  order: Uint32Array | null,
  rank: number,
): Promise<PredictorNumbers> {
  const [neuronCount] = fc2.shape;
  const [, hiddenSize] = fc1.shape;
  const parameters = new Float32Array(rank * (hiddenSize + neuronCount) + neuronCount);
  parameters.set(await readMatrix(addon, checkpoint, fc1));
  const scores = await readMatrix(addon, checkpoint, fc2);
  const target = parameters.subarray(rank * hiddenSize);
  for (let j = 0; j < neuronCount; j++) {
    const row = order === null ? j : order[j];
    for (let k = 0; k < own; k++) target[k * neuronCount + j] = scores[row * own + k];
  }
  return { hiddenSize, neuronCount, rank, parameters };
}

/** A matrix of the checkpoint as floats. */
async function readMatrix(addon: NativeAddon, checkpoint: TensorSource, tensor: SourceTensor): Promise<Float32Array> {
  const [rows, columns] = tensor.shape;
  const source = new Uint8Array(checkpoint.bytes(tensor));
  await checkpoint.read(tensor, 0, source);
  const numbers = new Float32Array(rows * columns);
  const bad = await addon.encodeRows({
    ...{ source, sourceType: tensor.type, rows, columns, encoding: 'f32' },
    target: new Uint8Array(numbers.buffer),
    placement: rowPlacement('f32', columns),
    ...{ firstVector: 0, threads: 1 },
  });
  if (!bad) return numbers;
  throw new Pi2Error(
    'E_NOT_FINITE',
    `${tensor.name}: row ${bad.row}, column ${bad.column} is ${bad.value}, not a number that a model can compute with`,
    'the checkpoint is damaged: download or export it again, or convert with --predictor train or none',
  );
}
