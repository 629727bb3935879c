// Predictors with random weights, for models that have none.
import { readFileSync, writeFileSync } from 'node:fs';
import { crc32 } from 'node:zlib';
import type {
  EngineRequest,
  NativeAddon,
  NativeExtent,
  NativeTensor,
  PredictorRequest,
} from '../../src/engine/contract.js';
import { rowBytes, weightBytes } from '../../src/format/encoding.js';
import { roundUpToPage } from '../../src/format/layout.js';
import { Random } from './numbers.js';

export interface RandomPredictorOptions {
  input?: PredictorRequest['input'];
  encoding?: 'q4' | 'q8' | 'f16';
  /** Of layer 0; every further layer has 8 more. */
  rank?: number;
  seed?: number;
}

/** Writes a predictor of random weights to `path`. Scores are of the order of 1, thresholds 0. */
export async function randomPredictor(
  addon: NativeAddon,
  request: EngineRequest,
  path: string,
  { input = 'ffn_norm', encoding = 'q8', rank = 24, seed = 1 }: RandomPredictorOptions = {},
): Promise<PredictorRequest> {
  const { layerCount, expertCount, hiddenSize, neuronCount } = request;
  const random = new Random(seed);
  const file: Buffer[] = [];
  const extents: NativeExtent[] = [];
  const tensors: NativeTensor[] = [];
  let offset = 0;
  for (let layer = 0; layer < layerCount; layer++) {
    const parts: Uint8Array[] = [];
    let bytes = 0;
    const add = async (kind: string, rows: number, columns: number, as: NativeTensor['encoding'], scale: number) => {
      const numbers = Float32Array.from({ length: rows * columns }, () => scale * random.normal());
      const stride = rowBytes(as, columns);
      const target = new Uint8Array(rows * stride);
      const placement = {
        perUnit: 1,
        unitBytes: stride,
        weightsOffset: 0,
        weightsStride: stride,
        scalesOffset: weightBytes(as, columns),
        scalesStride: stride,
      };
      const source = new Uint8Array(numbers.buffer);
      const shape = { rows, columns, encoding: as, firstVector: 0, threads: 1 } as const;
      await addon.encodeRows({ source, sourceType: 'F32', ...shape, target, placement });
      const gap = Math.ceil(bytes / 64) * 64 - bytes;
      parts.push(new Uint8Array(gap), target);
      const name = `layers.${layer}.predictor.${kind}`;
      tensors.push({ name, offset: offset + bytes + gap, bytes: target.length, encoding: as, rows, columns });
      bytes += gap + target.length;
    };
    const units = rank + 8 * layer;
    await add('fc1', expertCount * units, hiddenSize, encoding, 1 / Math.sqrt(hiddenSize));
    await add('fc2', expertCount * units, neuronCount, encoding, 1 / Math.sqrt(units));
    await add('bias', expertCount, neuronCount, 'f32', 0.3);
    const content = Buffer.concat(parts);
    extents.push({ name: `layers.${layer}.predictor`, file: 'predictor', offset, bytes, crc32: crc32(content) });
    file.push(content, Buffer.alloc(roundUpToPage(bytes) - bytes));
    offset += roundUpToPage(bytes);
  }
  writeFileSync(path, Buffer.concat(file));
  const thresholds = new Array<number>(layerCount).fill(0);
  return { path, extents, tensors, input, memoryThresholds: thresholds, flashThresholds: thresholds };
}

/** Scores of one expert's neurons by the definition (FORMAT.md section 6), for one token. */
export function scoreFunction(
  addon: NativeAddon,
  request: EngineRequest,
  predictor: PredictorRequest,
): (layer: number, expert: number, x: Float32Array) => Float64Array {
  const file = readFileSync(predictor.path);
  const matrices = new Map<string, Float32Array>();
  for (const { name, offset, bytes, encoding, rows, columns } of predictor.tensors) {
    const stride = rowBytes(encoding, columns);
    const placement = {
      perUnit: 1,
      unitBytes: stride,
      weightsOffset: 0,
      weightsStride: stride,
      scalesOffset: weightBytes(encoding, columns),
      scalesStride: stride,
    };
    matrices.set(
      name,
      addon.decodeRows({ source: file.subarray(offset, offset + bytes), rows, columns, encoding, placement }),
    );
  }
  const { hiddenSize, neuronCount, expertCount } = request;
  return (layer, expert, x) => {
    const part = (kind: string) => matrices.get(`layers.${layer}.predictor.${kind}`) as Float32Array;
    const fc1 = part('fc1');
    const fc2 = part('fc2');
    const rank = fc1.length / hiddenSize / expertCount;
    const scores = Float64Array.from(part('bias').subarray(expert * neuronCount, (expert + 1) * neuronCount));
    for (let unit = expert * rank; unit < (expert + 1) * rank; unit++) {
      let hidden = 0;
      for (let i = 0; i < hiddenSize; i++) hidden += fc1[unit * hiddenSize + i] * x[i];
      if (hidden <= 0) continue;
      for (let neuron = 0; neuron < neuronCount; neuron++) scores[neuron] += hidden * fc2[unit * neuronCount + neuron];
    }
    return scores;
  };
}
