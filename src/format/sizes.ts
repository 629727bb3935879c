import { expertCount } from './hyperparameters.js';
import { type Manifest, NEURONS_FILE } from './manifest.js';
import { NPU_WEIGHTS_FILE } from './npu.js';

/** The parts that `inspect` tells apart, in the order it shows them. */
const PARTS = [
  'embedding',
  'attention',
  'norms and biases',
  'router',
  'ffn',
  'predictor',
  'head',
  'checksums',
  'heat order',
  'dense unit',
] as const;
export type Part = (typeof PARTS)[number];

export interface PartSize {
  part: Part;
  /** Weights of the model, without padding. */
  weights: number;
  /** Bytes on flash, padding and scales included. */
  bytes: number;
}

/** What each part of a model takes. Parts that a model has not are left out. Gaps between tensors are in no part. */
export function partSizes(manifest: Manifest): PartSize[] {
  const sizes = new Map<Part, PartSize>(PARTS.map((part) => [part, { part, weights: 0, bytes: 0 }]));
  const add = (part: Part, weights: number, bytes: number) => {
    const size = sizes.get(part) as PartSize;
    size.weights += weights;
    size.bytes += bytes;
  };
  for (const { name, rows, columns, bytes } of manifest.tensors) {
    const part = partOf(name);
    add(part, part === 'checksums' || part === 'heat order' ? 0 : rows * columns, bytes);
  }
  const { hyperparameters: h, layout } = manifest;
  const ffnWeights = h.layer_count * expertCount(h) * h.neuron_count * layout.matrices * h.hidden_size;
  const fileBytes = (file: string) =>
    manifest.extents.reduce((sum, extent) => sum + (extent.file === file ? extent.bytes : 0), 0);
  add('ffn', ffnWeights, fileBytes(NEURONS_FILE));
  const graphBytes = (manifest.npu?.graphs ?? []).reduce((sum, graph) => sum + graph.bytes, 0);
  // The weights are those of the FFN once more.
  add('dense unit', 0, fileBytes(NPU_WEIGHTS_FILE) + graphBytes);
  return [...sizes.values()].filter((size) => size.bytes > 0);
}

function partOf(tensor: string): Part {
  const kind = tensor.split('.').at(-1) as string;
  if (tensor.includes('.predictor.')) return 'predictor';
  if (kind === 'embedding' || kind === 'position_embedding') return 'embedding';
  if (kind === 'head' || kind === 'router' || kind === 'checksums') return kind;
  if (kind === 'heat_order') return 'heat order';
  return ['q', 'k', 'v', 'o'].includes(kind) ? 'attention' : 'norms and biases';
}
