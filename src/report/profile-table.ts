import type { FiringStatistics, ProfileStatistics } from '../../converter/activation/statistics.js';

const COLUMNS = ['layer', 'fire %', '2 tokens', '3 tokens', '4 tokens', '80 % by', 'never %', 'again %', 'chance'];
const WIDTH = 9;

/** The statistics of an activation profile for people: a line a layer, then what the columns mean. */
export function describeProfile(statistics: ProfileStatistics): string {
  const { tokens, layers, mean, covering_80_whole_model: whole } = statistics;
  const lines = [
    `${tokens} tokens`,
    COLUMNS.map((name) => name.padStart(WIDTH)).join(''),
    ...layers.map((layer, l) => line(String(l), layer)),
    line('mean', mean),
    `Of all neurons of the model, ${percent(whole)} % do 80 % of all firing.`,
  ];
  for (const [l, { experts }] of layers.entries()) {
    if (experts) lines.push(`Experts of layer ${l} are used for ${experts.map(percent).join(' ')} % of tokens.`);
  }
  return `${[...lines, ...LEGEND].join('\n')}\n`;
}

/** A profile in three numbers. */
export interface ProfileSummary {
  tokens: number;
  /** Mean share of neurons that fire for a token. */
  rate: number;
  /** Least share of all neurons that together do 80 % of all firing; null when none fired. */
  covering_80: number | null;
}

/** The three numbers of a profile. */
export function profileSummary(statistics: ProfileStatistics): ProfileSummary {
  const { tokens, mean, covering_80_whole_model } = statistics;
  return { tokens, rate: mean.rate, covering_80: covering_80_whole_model };
}

/** A summary as one line for a person. */
export function describeSummary({ tokens, rate, covering_80 }: ProfileSummary): string {
  return `${tokens} tokens, ${percent(rate)} % fire for a token, ${percent(covering_80)} % do 80 % of all firing`;
}

const LEGEND = [
  '',
  'fire %     neurons that fire for a token; for at least one of 2, 3, 4 tokens in a row',
  '80 % by    least share of neurons that do 80 % of the firing of their layer',
  'never %    neurons that never fired',
  'again %    neurons that fire and had fired for the token before; chance: in random order',
];

function line(name: string, layer: FiringStatistics): string {
  const { rates_by_batch, covering_80, never, overlap, overlap_by_chance } = layer;
  const shares = [...rates_by_batch, covering_80, never, overlap, overlap_by_chance];
  return [name, ...shares.map(percent)].map((cell) => cell.padStart(WIDTH)).join('');
}

function percent(share: number | null): string {
  return share === null ? '-' : (100 * share).toFixed(1);
}
