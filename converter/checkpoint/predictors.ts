import { Pi2Error } from '../../src/base/error.js';
import { expertCount, type Hyperparameters } from '../../src/format/hyperparameters.js';
import type { SourceTensor } from './model.js';
import { quoted, WEIGHT_TYPES } from './safetensors.js';
import type { LocatedTensor } from './tensors.js';

/** The predictor of one expert: fc1 [rank x hidden], fc2 [neurons x rank]; ranks differ from expert to expert. */
export interface SourcePredictor {
  fc1: SourceTensor;
  fc2: SourceTensor;
  rank: number;
}

/** More hidden units than any predictor has. */
const RANK_MOST = 65536;

/**
 * The predictors that a checkpoint brings, for each layer and expert; null if its family has none or it leaves them out. The
 * tensors of a part of the experts, or of a wrong shape, throw `E_TENSOR`.
 */
export function findPredictors(
  h: Hyperparameters,
  tensors: ReadonlyMap<string, LocatedTensor>,
): SourcePredictor[][] | null {
  const nameOf = PREDICTOR_NAMES[h.family];
  if (!nameOf || ![...tensors.keys()].some((name) => name.includes('.predictor.'))) return null;
  const take = (name: string, fits: (shape: readonly number[]) => boolean, expected: string): SourceTensor => {
    const tensor = tensors.get(name);
    const type = WEIGHT_TYPES.find((known) => known === tensor?.type);
    if (tensor && type && fits(tensor.shape)) return { name, type, shape: tensor.shape };
    throw new Pi2Error(
      'E_TENSOR',
      tensor
        ? `${tensor.file}: tensor ${quoted(name)} is ${tensor.type} of shape [${tensor.shape.join(', ')}]; a predictor needs ${expected}`
        : `the checkpoint has predictors, but no tensor ${quoted(name)}`,
      'get the predictors of this very checkpoint, or convert with --predictor train or none',
    );
  };
  return Array.from({ length: h.layer_count }, (_, layer) =>
    Array.from({ length: expertCount(h) }, (_, expert) => {
      const name = nameOf(layer, expert);
      const isFc1 = ([rows, columns, ...more]: readonly number[]) =>
        more.length === 0 && rows > 0 && rows <= RANK_MOST && columns === h.hidden_size;
      const fc1 = take(`${name}.fc1.weight`, isFc1, `[rank, ${h.hidden_size}]`);
      const rank = fc1.shape[0];
      const isFc2 = (shape: readonly number[]) => shape.join() === `${h.neuron_count},${rank}`;
      return { fc1, fc2: take(`${name}.fc2.weight`, isFc2, `[${h.neuron_count}, ${rank}]`), rank };
    }),
  );
}

/** What predictors are called, in the families that have them. */
const PREDICTOR_NAMES: Partial<Record<Hyperparameters['family'], (layer: number, expert: number) => string>> = {
  bamboo: (layer) => `model.layers.${layer}.mlp.predictor`,
  turbosparsemixtral: (layer, expert) => `model.layers.${layer}.block_sparse_moe.experts.${expert}.predictor`,
};
