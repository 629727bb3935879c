import { readFileSync } from 'node:fs';
import { loadAddon } from '../../src/engine/addon.js';
import type { Placement } from '../../src/engine/contract.js';
import { type Encoding, rowBytes, scaleBytes, weightBytes } from '../../src/format/encoding.js';
import { expertBytes } from '../../src/format/layout.js';
import { openModelDirectory } from '../../src/format/model-directory.js';
import type { Transform } from '../oracle/load.js';

/**
 * A transform that gives the oracle the weights of a model directory instead of the checkpoint's: decoded from its bytes, by
 * FORMAT.md. What then differs from the engine is arithmetic alone.
 */
export async function decodedWeights(directory: string): Promise<Transform> {
  const model = await openModelDirectory(directory);
  const { hyperparameters: h, layout, quantization } = model.manifest;
  const files = { resident: readFileSync(model.residentPath), neurons: readFileSync(model.neuronsPath) };
  const addon = loadAddon();

  /** Matrix `index` (of gate, up, down, those there are) of an expert: one vector a neuron. */
  const bundleMatrix = (layer: number, expert: number, index: number): Float32Array => {
    const encoding = quantization.ffn as 'f16' | 'q8' | 'q4';
    const weights = weightBytes(encoding, h.hidden_size);
    const begin = model.expertOffset(layer, expert);
    const placement: Placement = {
      perUnit: layout.neurons_per_unit,
      unitBytes: layout.unit_bytes,
      weightsOffset: index === 0 ? 0 : layout.part2_offset + (index - 1) * weights,
      weightsStride: index === 0 ? layout.part1_stride : layout.part2_stride,
      scalesOffset: weights + index * scaleBytes(encoding, h.hidden_size),
      scalesStride: layout.part1_stride,
    };
    const source = files.neurons.subarray(begin, begin + expertBytes(layout, h.neuron_count));
    return addon.decodeRows({ source, rows: h.neuron_count, columns: h.hidden_size, encoding, placement });
  };

  return (name, { rows, columns }) => {
    const [, layer, expert, part] = /^layers\.(\d+)\.experts\.(\d+)\.(\w+)$/.exec(name) ?? [];
    if (part) {
      const index = ['gate', 'up', 'down'].indexOf(part) - (h.ffn.gated ? 0 : 1);
      const vectors = bundleMatrix(Number(layer), Number(expert), index);
      return part === 'down' ? transpose(vectors, h.neuron_count, h.hidden_size) : vectors;
    }
    const tensor = model.tensor(name);
    if (!tensor || tensor.rows !== rows || tensor.columns !== columns)
      throw new Error(`no ${rows} x ${columns} ${name}`);
    const begin = model.tensorOffset(tensor);
    const encoding = tensor.encoding as Encoding;
    const bytes = rowBytes(encoding, columns);
    const placement: Placement = {
      perUnit: 1,
      unitBytes: bytes,
      weightsOffset: 0,
      weightsStride: bytes,
      scalesOffset: weightBytes(encoding, columns),
      scalesStride: bytes,
    };
    return addon.decodeRows({
      source: files.resident.subarray(begin, begin + tensor.bytes),
      rows,
      columns,
      encoding,
      placement,
    });
  };
}

function transpose(values: Float32Array, rows: number, columns: number): Float32Array {
  const result = new Float32Array(values.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) result[c * rows + r] = values[r * columns + c];
  return result;
}
