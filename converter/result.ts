import type { Manifest, PredictorEntry } from '../src/format/manifest.js';
import type { ProfileStatistics } from './activation/statistics.js';
import type { Plan, PlannedTensor } from './steps/extents.js';

/** Bits of the file for each weight, by part; page padding and scales included. Null for a head that is the embedding. */
export interface BitsPerWeight {
  ffn: number;
  attention: number;
  embedding: number;
  head: number | null;
  total: number;
}

/** What a finished conversion has to say. */
export interface ConvertResult {
  output: string;
  quantization: Manifest['quantization'];
  /** Bytes of the whole directory. */
  bytes: number;
  residentBytes: number;
  neuronsBytes: number;
  /** Of what is there for a dense unit: weights and graphs. */
  npuBytes: number;
  bitsPerWeight: BitsPerWeight;
  seconds: number;
  /** Bytes of weights that this run read and encoded; fewer than all when it continued an earlier one. */
  sourceBytes: number;
  sourceBytesPerSecond: number;
  /** Most memory that the process had resident. */
  peakMemoryBytes: number;
  /** Tensors of the checkpoint that are left out on purpose. */
  ignored: string[];
  hasTokenizer: boolean;
  /** Whether an earlier run's work was used. */
  resumed: boolean;
  /** Of the profile that neurons are sorted by; null in the order of the checkpoint. */
  profile: ProfileStatistics | null;
  /** Of the predictor, with the bytes of its file; null without one. */
  predictor: (PredictorEntry & { bytes: number }) | null;
  /** Why a predictor that was made is not used; null if none was made, or if it is. */
  noPredictor: string | null;
}

/** Divides the bytes of a plan by its weights. */
export function bitsPerWeight(plan: Plan): BitsPerWeight {
  const parts = { ffn: [0, 0], attention: [0, 0], embedding: [0, 0], head: [0, 0] };
  const count = (part: keyof typeof parts, bytes: number, weights: number) => {
    parts[part][0] += 8 * bytes;
    parts[part][1] += weights;
  };
  for (const extent of plan.resident) {
    if (extent.kind !== 'tensors') continue;
    const part = extent.name === 'embedding' || extent.name === 'head' ? extent.name : 'attention';
    count(part, extent.bytes, weightsOf(extent.tensors));
  }
  for (const { bytes, experts, neuronCount, hiddenSize, layout } of plan.neurons) {
    count('ffn', bytes, experts.length * neuronCount * hiddenSize * layout.matrices);
  }
  const total = Object.values(parts).reduce((sum, part) => [sum[0] + part[0], sum[1] + part[1]]);
  const ratio = ([bits, weights]: number[]) => Math.round((100 * bits) / weights) / 100;
  const tied = !plan.resident.some(
    (extent) => extent.kind === 'tensors' && extent.tensors.some((t) => t.name === 'head'),
  );
  return {
    ffn: ratio(parts.ffn),
    attention: ratio(parts.attention),
    embedding: ratio(parts.embedding),
    head: tied ? null : ratio(parts.head),
    total: ratio(total),
  };
}

function weightsOf(tensors: PlannedTensor[]): number {
  return tensors.reduce((sum, tensor) => sum + tensor.rows * tensor.columns, 0);
}
