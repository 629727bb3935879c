import { BLOCK, scaleBytes, weightBytes } from './encoding.js';
import { roundUpToPage } from './layout.js';
import type { Manifest } from './manifest.js';
import { clusterNeurons, graphShapes } from './npu.js';

/** No layout function packs more neurons together; bounds the memory that one unit can ask for. */
const NEURONS_PER_UNIT_MAX = 1024;
/** A predictor of more hidden units would cost more than the neurons it saves. */
const PREDICTOR_RANK_MAX = 65536;
/** A graph holds no weights: some kilobytes. */
const GRAPH_BYTES_MAX = 1024 * 1024;

/** What the hyper-parameters contradict each other in, in words; null if nothing. */
export function checkHyperparameters(manifest: Manifest): string | null {
  const { hyperparameters: h, quantization } = manifest;
  if (h.head_count % h.kv_head_count !== 0) {
    return `head_count ${h.head_count} is not a multiple of kv_head_count ${h.kv_head_count}`;
  }
  if (h.position.kind === 'rope' && h.head_dim % 2 !== 0)
    return `head_dim ${h.head_dim} is odd, rotary pairs need it even`;
  if (h.attention.windows.length !== h.layer_count) {
    return `attention.windows has ${h.attention.windows.length} entries for ${h.layer_count} layers`;
  }
  if (!h.ffn.gated && h.ffn.activation !== 'relu') return `ffn.activation ${h.ffn.activation} needs a gate`;
  if (h.experts && h.experts.used_per_token > h.experts.count) {
    return `experts.used_per_token ${h.experts.used_per_token} is more than experts.count ${h.experts.count}`;
  }
  if (h.experts && h.ffn.bias) return 'ffn.bias with experts is not known to the format';
  if (h.bos_token_id !== null && h.bos_token_id >= h.vocab_size) {
    return `bos_token_id ${h.bos_token_id} is outside the vocabulary of ${h.vocab_size}`;
  }
  if (quantization.ffn === 'f32') return 'quantization.ffn: bundles are f16, q8 or q4';
  return null;
}

/** Whether the bundle layout is one of the two that FORMAT.md section 4 describes; else what is wrong, in words. */
export function checkLayout(manifest: Manifest): string | null {
  const { layout, hyperparameters: h, quantization } = manifest;
  const matrices = h.ffn.gated ? 3 : 2;
  const weights = weightBytes(quantization.ffn, h.hidden_size);
  const part1 = weights + matrices * scaleBytes(quantization.ffn, h.hidden_size);
  const part2 = (matrices - 1) * weights;
  const count = layout.neurons_per_unit;
  if (layout.matrices !== matrices) return `layout.matrices is ${layout.matrices}, the model has ${matrices}`;
  if (layout.part1_bytes !== part1) return `layout.part1_bytes is ${layout.part1_bytes}, the model needs ${part1}`;
  if (layout.part2_bytes !== part2) return `layout.part2_bytes is ${layout.part2_bytes}, the model needs ${part2}`;
  if (count > NEURONS_PER_UNIT_MAX) return `layout.neurons_per_unit ${count} is above ${NEURONS_PER_UNIT_MAX}`;
  const split =
    layout.part1_stride === part1 &&
    layout.part2_stride === part2 &&
    layout.part2_offset === roundUpToPage(count * part1) &&
    layout.unit_bytes === layout.part2_offset + roundUpToPage(count * part2);
  const joint =
    layout.part1_stride === part1 + part2 &&
    layout.part2_stride === part1 + part2 &&
    layout.part2_offset === part1 &&
    layout.unit_bytes === roundUpToPage(count * (part1 + part2));
  return split || joint ? null : 'layout: offsets and strides are neither split nor joint parts of a unit';
}

/** What a predictor contradicts the model in, in words; null if nothing. */
export function checkPredictor({ predictor, hyperparameters: h }: Manifest): string | null {
  if (predictor === undefined) return null;
  if (predictor.ranks.length !== h.layer_count) {
    return `predictor.ranks has ${predictor.ranks.length} entries for ${h.layer_count} layers`;
  }
  if (predictor.fc1 === 'f32' || predictor.fc2 === 'f32') return 'predictor: fc1 and fc2 are f16, q8 or q4';
  if (predictor.ranks.some((rank) => rank > PREDICTOR_RANK_MAX)) return 'predictor.ranks: a rank is absurd';
  for (const [i, point] of predictor.points.entries()) {
    for (const kind of ['memory_thresholds', 'flash_thresholds'] as const) {
      if (point[kind].length !== h.layer_count) return `predictor.points.${i}.${kind} must have one entry a layer`;
    }
    if (i > 0 && point.kept_share <= predictor.points[i - 1].kept_share) {
      return `predictor.points.${i}.kept_share is not above the one before`;
    }
  }
  return null;
}

/** What graphs for a dense unit contradict the model in, in words; null if nothing. */
export function checkNpu({ npu, hyperparameters: h, quantization }: Manifest): string | null {
  const { ffn, down_tiles } = quantization;
  if (down_tiles !== undefined && ffn !== 'q4') return `quantization.down_tiles: bundles are ${ffn}, tiles are q4`;
  if ((npu === undefined) !== (down_tiles === undefined)) {
    return 'npu and quantization.down_tiles: a model has both or neither';
  }
  if (npu === undefined) return null;
  if (h.hidden_size % BLOCK !== 0) return `npu: hidden_size ${h.hidden_size} is not a multiple of ${BLOCK}`;
  const size = clusterNeurons(h.neuron_count);
  if (npu.cluster_neurons !== size) return `npu.cluster_neurons is ${npu.cluster_neurons}, the model needs ${size}`;
  const shapes = graphShapes(h.neuron_count);
  if (npu.graphs.length !== shapes.length) {
    return `npu.graphs has ${npu.graphs.length} entries, the model needs ${shapes.length}`;
  }
  for (const [i, { tokens, clusters, bytes }] of npu.graphs.entries()) {
    if (tokens !== shapes[i].tokens || clusters !== shapes[i].clusters) {
      return `npu.graphs.${i} is of ${tokens} tokens and ${clusters} clusters, expected ${shapes[i].tokens} and ${shapes[i].clusters}`;
    }
    if (bytes > GRAPH_BYTES_MAX) return `npu.graphs.${i} has ${bytes} bytes, more than any graph`;
  }
  return null;
}
