import { formatBytes } from '../base/bytes.js';
import type { PredictorEntry } from '../format/manifest.js';

/** A predictor for `--json`: the manifest's section without its thresholds. */
export function predictorFacts({ points, curve, ...facts }: PredictorEntry): object {
  const measured = points.map(({ memory_thresholds: _, flash_thresholds: __, ...point }) => point);
  return {
    ...{ source: facts.source, input: facts.input, fc1: facts.fc1, fc2: facts.fc2, ranks: facts.ranks },
    ...{ quality: facts.quality, points: measured, curve },
  };
}

/** A predictor as one line for a person; `bytes` is the size of its file. */
export function describePredictor({ source, ranks, quality, points }: PredictorEntry, bytes: number): string {
  const { computed_share, perplexity } = points[points.length - 1];
  const from = source === 'trained' ? 'trained' : 'of the checkpoint';
  return (
    `predictor ${from}: ${rankText(ranks)}, ${formatBytes(bytes)}; all in memory it computes ${percent(computed_share)} % of the ` +
    `neurons at ${times(perplexity, quality)} of the perplexity`
  );
}

const COLUMNS = ['in memory %', 'computed %', 'fetched %', 'magnitude %', 'perplexity', ''];
const WIDTH = 13;

/** The settings of a predictor and the whole curve they were chosen from, as a table. */
export function describeCurve({ quality, points, curve }: PredictorEntry): string {
  const chosen = new Set(points.map((point) => keyOf(point)));
  const lines = curve.map((measured) =>
    [
      percent(measured.kept_share),
      percent(measured.computed_share),
      percent(measured.fetched_share),
      percent(measured.magnitude_share),
      times(measured.perplexity, quality),
      chosen.has(keyOf(measured)) ? 'chosen' : '',
    ]
      .map((cell) => cell.padStart(WIDTH))
      .join('')
      .trimEnd(),
  );
  return `${[
    COLUMNS.map((name) => name.padStart(WIDTH))
      .join('')
      .trimEnd(),
    ...lines,
  ].join('\n')}\n`;
}

/** The ranks of the layers: one number if they are all the same. */
export function rankText(ranks: readonly number[]): string {
  return new Set(ranks).size === 1 ? `rank ${ranks[0]}` : `ranks ${ranks.join(' ')}`;
}

type Measured = PredictorEntry['curve'][number];

function keyOf({ kept_share, computed_share, fetched_share, perplexity }: Measured): string {
  return [kept_share, computed_share, fetched_share, perplexity].join();
}

/** A perplexity relative to that of exact mode. */
function times(perplexity: number, quality: PredictorEntry['quality']): string {
  return `x${(perplexity / quality.exact_perplexity).toFixed(4)}`;
}

function percent(share: number): string {
  return (100 * share).toFixed(1);
}
