import type { Encoding } from './encoding.js';
import { expertCount, type Hyperparameters } from './hyperparameters.js';
import { type Extent, type Manifest, NEURONS_FILE, PREDICTOR_FILE, RESIDENT_FILE } from './manifest.js';
import { bankExtent, NPU_WEIGHTS_FILE } from './npu.js';

/** A tensor that a model with certain hyper-parameters has; FORMAT.md section 3. */
export interface ExpectedTensor {
  name: string;
  extent: string;
  rows: number;
  columns: number;
  encodings: readonly (Encoding | 'u32')[];
}

/** The extents of a model. Their order in the manifest is that of their offsets. */
export function expectedExtents(
  manifest: Pick<Manifest, 'hyperparameters' | 'heat_order' | 'predictor' | 'npu'>,
): { name: string; file: Extent['file'] }[] {
  const { hyperparameters: h } = manifest;
  const layers = Array.from({ length: h.layer_count }, (_, layer) => `layers.${layer}`);
  const ordered = manifest.heat_order === 'identity' ? [] : layers;
  const predicted = manifest.predictor === undefined ? [] : layers;
  const experts = expertCount(h);
  const banks = manifest.npu === undefined ? 0 : h.layer_count * experts;
  return [
    { name: 'embedding', file: RESIDENT_FILE },
    ...layers.map((layer) => ({ name: `${layer}.attention`, file: RESIDENT_FILE }) as const),
    { name: 'head', file: RESIDENT_FILE },
    ...layers.map((layer) => ({ name: `${layer}.checksums`, file: RESIDENT_FILE }) as const),
    ...ordered.map((layer) => ({ name: `${layer}.heat_order`, file: RESIDENT_FILE }) as const),
    ...layers.map((layer) => ({ name: `${layer}.neurons`, file: NEURONS_FILE }) as const),
    ...predicted.map((layer) => ({ name: `${layer}.predictor`, file: PREDICTOR_FILE }) as const),
    ...Array.from({ length: banks }, (_, bank) => {
      return { name: bankExtent(Math.floor(bank / experts), bank % experts), file: NPU_WEIGHTS_FILE } as const;
    }),
  ];
}

/** Every tensor that the hyper-parameters demand, with its shape and how it may be stored. */
export function expectedTensors(
  manifest: Pick<Manifest, 'hyperparameters' | 'quantization' | 'heat_order' | 'predictor'>,
): ExpectedTensor[] {
  const { hyperparameters: h, quantization } = manifest;
  const tensors: ExpectedTensor[] = [];
  const layerNorm = h.norm.kind === 'layer';
  const matrix = (extent: string, name: string, rows: number, columns: number, encoding: Encoding) =>
    tensors.push({ extent, name, rows, columns, encodings: [encoding] });
  const vector = (extent: string, name: string, columns: number, rows = 1) =>
    tensors.push({ extent, name, rows, columns, encodings: ['f32'] });

  matrix('embedding', 'embedding', h.vocab_size, h.hidden_size, quantization.embedding);
  if (h.position.kind === 'learned') {
    matrix('embedding', 'position_embedding', h.context_length, h.hidden_size, quantization.embedding);
  }
  for (let layer = 0; layer < h.layer_count; layer++) {
    layerTensors(h, quantization.attention, `layers.${layer}`, matrix, vector);
    const rows = expertCount(h) * h.neuron_count;
    const checksums = `layers.${layer}.checksums`;
    tensors.push({ extent: checksums, name: checksums, rows, columns: 2, encodings: ['u32'] });
    if (manifest.heat_order !== 'identity') {
      const name = `layers.${layer}.heat_order`;
      tensors.push({ extent: name, name, rows: expertCount(h), columns: h.neuron_count, encodings: ['u32'] });
    }
  }
  const { predictor } = manifest;
  for (const [layer, rank] of (predictor?.ranks ?? []).entries()) {
    const extent = `layers.${layer}.predictor`;
    const rows = expertCount(h) * rank;
    matrix(extent, `${extent}.fc1`, rows, h.hidden_size, predictor?.fc1 as Encoding);
    matrix(extent, `${extent}.fc2`, rows, h.neuron_count, predictor?.fc2 as Encoding);
    vector(extent, `${extent}.bias`, h.neuron_count, expertCount(h));
  }
  vector('head', 'output_norm', h.hidden_size);
  if (layerNorm) vector('head', 'output_norm_bias', h.hidden_size);
  if (!h.tied_embeddings) matrix('head', 'head', h.vocab_size, h.hidden_size, quantization.head);
  return tensors;
}

function layerTensors(
  h: Hyperparameters,
  encoding: Encoding,
  layer: string,
  matrix: (extent: string, name: string, rows: number, columns: number, encoding: Encoding) => void,
  vector: (extent: string, name: string, columns: number, rows?: number) => void,
): void {
  const extent = `${layer}.attention`;
  const queries = h.head_count * h.head_dim;
  const keys = h.kv_head_count * h.head_dim;
  for (const norm of ['attention_norm', 'ffn_norm']) {
    vector(extent, `${layer}.${norm}`, h.hidden_size);
    if (h.norm.kind === 'layer') vector(extent, `${layer}.${norm}_bias`, h.hidden_size);
  }
  matrix(extent, `${layer}.q`, queries, h.hidden_size, encoding);
  matrix(extent, `${layer}.k`, keys, h.hidden_size, encoding);
  matrix(extent, `${layer}.v`, keys, h.hidden_size, encoding);
  matrix(extent, `${layer}.o`, h.hidden_size, queries, encoding);
  if (h.attention.qkv_bias) {
    vector(extent, `${layer}.q_bias`, queries);
    vector(extent, `${layer}.k_bias`, keys);
    vector(extent, `${layer}.v_bias`, keys);
  }
  if (h.attention.output_bias) vector(extent, `${layer}.o_bias`, h.hidden_size);
  if (h.attention.qk_norm) {
    vector(extent, `${layer}.q_norm`, h.head_dim);
    vector(extent, `${layer}.k_norm`, h.head_dim);
  }
  if (h.experts) vector(extent, `${layer}.router`, h.hidden_size, h.experts.count);
  if (h.ffn.bias) {
    vector(extent, `${layer}.up_bias`, h.neuron_count);
    vector(extent, `${layer}.down_bias`, h.hidden_size);
  }
}
