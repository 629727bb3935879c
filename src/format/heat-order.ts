import { open } from 'node:fs/promises';
import { crc32 } from 'node:zlib';
import { fileError, Pi2Error } from '../base/error.js';
import { expertCount } from './hyperparameters.js';
import type { ModelDirectory } from './model-directory.js';

/**
 * The heat order of a layer, [experts x neurons]: bundle j of an expert is neuron `order[expert * neurons + j]` of the
 * checkpoint. Null when the bundles are in the order of the checkpoint. Throws `Pi2Error`: E_CHECKSUM, E_MODEL when it is no
 * permutation, E_IO.
 */
export async function readHeatOrder(model: ModelDirectory, layer: number): Promise<Uint32Array | null> {
  const { hyperparameters: h, heat_order } = model.manifest;
  if (heat_order === 'identity') return null;
  const { name, offset, bytes, crc32: expected } = model.extent(`layers.${layer}.heat_order`);
  const order = new Uint32Array(expertCount(h) * h.neuron_count);
  const target = new Uint8Array(order.buffer);
  try {
    const file = await open(model.residentPath, 'r');
    try {
      for (let done = 0; done < bytes; ) {
        const { bytesRead } = await file.read(target, done, bytes - done, offset + done);
        if (bytesRead === 0) throw new Pi2Error('E_IO', `${model.residentPath} ended while it was read`);
        done += bytesRead;
      }
    } finally {
      await file.close();
    }
  } catch (error) {
    throw fileError(error, 'read', model.residentPath);
  }
  const again = 'convert the checkpoint again, or copy the directory again';
  if (crc32(target) !== Number.parseInt(expected, 16)) {
    throw new Pi2Error('E_CHECKSUM', `${model.path}: ${name} has another checksum than its manifest says`, again);
  }
  const wrong = findWrongOrder(order, h.neuron_count);
  if (wrong) throw new Pi2Error('E_MODEL', `${model.path}: ${name}: ${wrong}`, again);
  return order;
}

/** What keeps `order` [experts x neurons] from naming every neuron of every expert once, in words; null if nothing. */
export function findWrongOrder(order: Uint32Array, neurons: number): string | null {
  const seen = new Uint32Array(neurons);
  for (let i = 0; i < order.length; i++) {
    // An expert marks its neurons with its own number, counted from 1.
    const mark = Math.floor(i / neurons) + 1;
    const neuron = order[i];
    if (neuron >= neurons) return `there is no neuron ${neuron}`;
    if (seen[neuron] === mark) return `neuron ${neuron} of expert ${mark - 1} is there twice`;
    seen[neuron] = mark;
  }
  return null;
}
