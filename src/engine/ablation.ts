/** Steps of streaming that can be taken away one by one, to measure what each of them brings. */
import type { StreamShape } from '../plan/memory-plan.js';
import type { StreamRequest } from './contract.js';

/**
 *   bundles    gate, up and down row of a neuron are one read; without: a read each, as from three matrices
 *   two-phase  rows are read only if the gate, read before them, fires, on flash that likes it; without: gate and rows together
 *   cache      neurons stay in memory; without: each one is read whenever it is needed
 *   hot        the neurons that fire most stay for good; without: all places change hands
 *   pipeline   computing goes on while reads are on their way; without: one stage waits for the other
 *   prefetch   reads begin before attention for neurons that are guessed
 *   predictor  neurons that hardly contribute are left out; without: exact mode
 */
export const ABLATIONS = ['bundles', 'two-phase', 'cache', 'hot', 'pipeline', 'prefetch', 'predictor'] as const;
export type Ablation = (typeof ABLATIONS)[number];

/**
 * What the baseline `llmflash` lacks: it reads whole bundles, keeps what the last tokens used, and computes a matrix when all of
 * it is there (LLM in a flash, arXiv 2312.11514).
 */
export const LLMFLASH_ABLATIONS: readonly Ablation[] = ['two-phase', 'hot', 'pipeline', 'prefetch'];

/** The shape of a plan without some steps. Nothing takes more memory than before. */
export function ablateShape(shape: StreamShape, ablated: readonly Ablation[]): StreamShape {
  const { hotNeurons, coldSlots } = shape;
  const nothing = hotNeurons.map(() => 0);
  let kept = { hotNeurons, coldSlots };
  if (ablated.includes('hot'))
    kept = { hotNeurons: nothing, coldSlots: coldSlots.map((n, bank) => n + hotNeurons[bank]) };
  if (ablated.includes('cache')) kept = { hotNeurons: nothing, coldSlots: nothing };
  return { ...shape, ...kept, prefetchBytes: ablated.includes('prefetch') ? 0 : shape.prefetchBytes };
}

/** The switches of a stream without some steps. */
export function ablateStream(ablated: readonly Ablation[]): Pick<StreamRequest, 'bundles' | 'twoPhase' | 'pipeline'> {
  const has = (step: Ablation) => !ablated.includes(step);
  return { bundles: has('bundles'), pipeline: has('pipeline'), ...(has('two-phase') ? {} : { twoPhase: false }) };
}
