import type { EngineCounters } from '../engine/counters.js';
import type { Recall } from '../engine/recall.js';
import type { OperatingPoint, PredictorEntry } from '../format/manifest.js';
import { formatShare } from './format.js';

/** What prediction was set to, took and did while decoding. All null when every neuron that fires was computed. */
export interface PredictorReport {
  /** The operating point: of each bank's neurons those in memory for good, and perplexity as a multiple of exact mode's. */
  kept_share: number | null;
  perplexity_ratio: number | null;
  /** Neurons computed, and neurons left out because they were on flash, though they would have been computed in memory. */
  neurons_computed_per_token: number | null;
  neurons_skipped_per_token: number | null;
  /** Of all neurons that got a score, those computed. */
  neurons_computed_share: number | null;
  /** Time of the predictor, summed over threads, and its share of their time. */
  predictor_ms_per_token: number | null;
  predictor_share: number | null;
  /** With `--measure-recall`: of the neurons that fire in exact mode, those computed, by number and by |contribution|. */
  recall_share: number | null;
  recall_magnitude_share: number | null;
}

/**
 * The difference between two states of the counters. `decodeMs` is the time between them, `threads` how many compute; `point`
 * the setting in use, null in exact mode; `recall` is there if it was measured.
 */
export function predictorReport(
  before: EngineCounters,
  after: EngineCounters,
  decodeMs: number,
  threads: number,
  predictor: PredictorEntry | undefined,
  point: OperatingPoint | null,
  recall?: Recall,
): PredictorReport {
  if (point === null || predictor === undefined) return NOTHING_PREDICTED;
  const tokens = after.tokens - before.tokens;
  const since = (name: 'ns' | 'scored' | 'chosen' | 'skippedOnFlash') =>
    (after.predictor?.[name] ?? 0) - (before.predictor?.[name] ?? 0);
  const perToken = (count: number) => (tokens > 0 ? count / tokens : null);
  const predictorMs = since('ns') / 1e6;
  return {
    kept_share: point.kept_share,
    perplexity_ratio: point.perplexity / predictor.quality.exact_perplexity,
    neurons_computed_per_token: perToken(since('chosen')),
    neurons_skipped_per_token: perToken(since('skippedOnFlash')),
    neurons_computed_share: since('scored') > 0 ? since('chosen') / since('scored') : null,
    predictor_ms_per_token: perToken(predictorMs),
    predictor_share: decodeMs > 0 ? predictorMs / (threads * decodeMs) : null,
    recall_share: recall?.recallShare ?? null,
    recall_magnitude_share: recall?.recallMagnitudeShare ?? null,
  };
}

const NOTHING_PREDICTED: PredictorReport = {
  kept_share: null,
  perplexity_ratio: null,
  neurons_computed_per_token: null,
  neurons_skipped_per_token: null,
  neurons_computed_share: null,
  predictor_ms_per_token: null,
  predictor_share: null,
  recall_share: null,
  recall_magnitude_share: null,
};

/** Lines for people; none when nothing was predicted. */
export function predictorLines(report: PredictorReport): [string, string][] {
  if (report.kept_share === null || report.neurons_computed_share === null) return [];
  const skipped = (report.neurons_skipped_per_token as number).toFixed(1);
  const time = (report.predictor_ms_per_token as number).toFixed(2);
  const share = report.predictor_share === null ? '-' : formatShare(report.predictor_share);
  return [
    [
      'neurons predicted',
      `${formatShare(report.neurons_computed_share)} computed, ${skipped} a token left on flash; ` +
        `perplexity x${(report.perplexity_ratio as number).toFixed(4)} as measured`,
    ],
    ['predictor', `${time} ms a token, ${share} of thread time`],
    ...recallLines(report),
  ];
}

function recallLines({ recall_share: share, recall_magnitude_share: magnitude }: PredictorReport): [string, string][] {
  if (share === null) return [];
  const weighted = magnitude === null ? '' : `, ${formatShare(magnitude)} of their magnitude`;
  const twice = 'each token was computed twice: speeds and counts of this run mean nothing';
  return [['recall', `${formatShare(share)} of the neurons that fire${weighted}; ${twice}`]];
}
