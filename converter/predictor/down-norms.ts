import { open } from 'node:fs/promises';
import { fileError, Pi2Error } from '../../src/base/error.js';
import type { NativeAddon } from '../../src/engine/contract.js';
import { expertCount } from '../../src/format/hyperparameters.js';
import { expertBytes } from '../../src/format/layout.js';
import type { ModelDirectory } from '../../src/format/model-directory.js';
import { bundlePlacement } from '../steps/pieces.js';

/** Bytes of bundles that are read at once. */
const READ_BYTES = 1024 * 1024;

/** For each bank (layer-major): the Euclidean norm of each neuron's down column, in heat order. Throws `E_IO`. */
export async function readDownNorms(model: ModelDirectory, addon: NativeAddon): Promise<Float32Array[]> {
  const { hyperparameters: h, layout, quantization } = model.manifest;
  const placement = bundlePlacement(layout, quantization.ffn as 'q4', h.hidden_size, layout.matrices - 1);
  const units = Math.max(1, Math.floor(READ_BYTES / layout.unit_bytes));
  const buffer = new Uint8Array(units * layout.unit_bytes);
  const end = expertBytes(layout, h.neuron_count);
  const norms: Float32Array[] = [];
  try {
    const file = await open(model.neuronsPath, 'r');
    try {
      for (let bank = 0; bank < h.layer_count * expertCount(h); bank++) {
        const offset = model.expertOffset(Math.floor(bank / expertCount(h)), bank % expertCount(h));
        const own = new Float32Array(h.neuron_count);
        for (let done = 0; done < end; done += buffer.length) {
          const source = buffer.subarray(0, Math.min(buffer.length, end - done));
          const { bytesRead } = await file.read(source, 0, source.length, offset + done);
          if (bytesRead !== source.length) throw new Pi2Error('E_IO', `${model.neuronsPath} ended while it was read`);
          const first = (done / layout.unit_bytes) * layout.neurons_per_unit;
          const rows = Math.min(h.neuron_count - first, (source.length / layout.unit_bytes) * layout.neurons_per_unit);
          const columns = h.hidden_size;
          const decoded = addon.decodeRows({
            source,
            rows,
            columns,
            encoding: quantization.ffn as 'q4',
            placement,
          });
          for (let i = 0; i < rows; i++) own[first + i] = norm(decoded.subarray(i * columns, (i + 1) * columns));
        }
        norms.push(own);
      }
    } finally {
      await file.close();
    }
  } catch (error) {
    throw fileError(error, 'read', model.neuronsPath);
  }
  return norms;
}

function norm(vector: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < vector.length; i++) sum += vector[i] * vector[i];
  return Math.sqrt(sum);
}
