import { Pi2Error } from '../../src/base/error.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import type { TensorSource } from '../checkpoint/tensor-source.js';

/** What `convert --predictor` takes. */
export const PREDICTOR_MODES = ['auto', 'checkpoint', 'train', 'none'] as const;
export type PredictorMode = (typeof PREDICTOR_MODES)[number];

/** What `convert --quality` takes, and the share that perplexity may grow by. */
export const QUALITIES = { exact: 0, '0.5%': 0.005, '1%': 0.01, '2%': 0.02 } as const;
export type Quality = keyof typeof QUALITIES;

/** Where predictors come from, and how much perplexity they may cost. */
export interface PredictorChoice {
  source: 'checkpoint' | 'trained';
  budget: number;
  /** Whether it was asked for by name: then what keeps it from being made is an error. */
  isAsked: boolean;
}

/**
 * Decides whether a conversion makes predictors, and of what; null for none. `auto` takes those of the checkpoint if there are
 * any, else trains some, where neurons are sparse and there is a text to judge on. Throws `E_USAGE` for what cannot be asked.
 */
export function choosePredictor(
  checkpoint: TensorSource,
  mode: PredictorMode,
  quality: Quality,
  hasText: boolean,
): PredictorChoice | null {
  const budget = QUALITIES[quality];
  const isAsked = mode === 'checkpoint' || mode === 'train';
  const { hyperparameters } = checkpoint.model;
  if (isAsked) {
    const refuse = (what: string, hint: string) => new Pi2Error('E_USAGE', `--predictor ${mode}: ${what}`, hint);
    if (budget === 0) throw refuse('--quality exact has no use for a predictor', 'leave one of the two out');
    if (!isSparse(hyperparameters)) {
      throw refuse(`${checkpoint.directory} has no sparse neurons: each of them fires for each token`, 'leave it out');
    }
    if (!hasText) throw refuse('there is no text to judge it on', 'give --calibration TEXT');
  }
  if (mode === 'none' || budget === 0 || !hasText || !isSparse(hyperparameters)) return null;
  const isThere = mode !== 'train' && checkpoint.predictors() !== null;
  if (mode === 'checkpoint' && !isThere) {
    throw new Pi2Error(
      'E_USAGE',
      `--predictor checkpoint: ${checkpoint.directory} has no predictors`,
      'give --predictor train, or leave it out',
    );
  }
  return { source: isThere ? 'checkpoint' : 'trained', budget, isAsked };
}

/** Whether there are neurons that do not fire. */
function isSparse(h: Hyperparameters): boolean {
  return h.ffn.activation !== 'silu';
}
