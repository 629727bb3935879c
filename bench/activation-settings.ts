import { bisect, bothAbove, inverseNormal } from './normal.js';

/** How neurons of a synthetic sparse model fire: as published for TurboSparse models, or as measured on small trained ones. */
export const SETTINGS = ['published', 'measured'] as const;
export type Setting = (typeof SETTINGS)[number];

/** What is known of a layer of real models. Shares are from 0 to 1. */
export interface LayerFacts {
  /** Of an expert's neurons (a dense FFN is one expert), those that fire for a token that is routed to it. */
  rate: number;
  /** Skew: the hottest `neurons` of a layer do `firing` of all its firing. */
  skew: { neurons: number; firing: number };
  /** Of the neurons of a layer that fire for a token, those that fired for the one before; null: not known, as by chance. */
  overlap: number | null;
}

/** Probability that a neuron's gate, and its up, are above zero; a dReLU neuron fires when both are. */
export interface FiringShares {
  gate: number;
  up: number;
}

/** How firing rates are distributed in a layer, and how much of what a neuron reacts to is the topic. */
export interface LayerModel {
  /** Rates are exp(logRate + deviation * z) of normal z, at most `RATE_MOST`. */
  logRate: number;
  deviation: number;
  /** Share of the variance of gates (and of ups) that tokens of a topic have in common. */
  topicShare: number;
}

/** A topic goes on with the next token with this probability: 33 tokens in the mean, a few sentences. */
export const TOPIC_KEPT = 0.97;
/** No neuron fires more often. */
const RATE_MOST = 0.9;
/** Half of the ups are above zero, as in the trained models (gates 16.6 %, both 8.2 %), but for neurons that fire more often. */
const UP_SHARE = 0.5;
const TOPIC_SHARE_MOST = 0.98;

/**
 * TurboSparse (arXiv 2406.05955): 78 % to 94 % of the neurons rest, by layer; 90 % in the mean of the Mistral, 85 % inside the
 * experts of the Mixtral. The first layers fire most; the curve between the ends is ours, with that mean. PowerInfer-2 (arXiv
 * 2406.06282): 95 % of the neurons that fire are found with half of them kept. Nothing is published of neighbouring tokens.
 */
const PUBLISHED = {
  firstRate: 0.22,
  lastRate: 0.06,
  dense: { meanRate: 0.1 },
  mixture: { meanRate: 0.15 },
  skew: { neurons: 0.5, firing: 0.95 },
};

/**
 * Small trained models (the demo's, and a mixture of 8 experts of 256 neurons), in float32 on 29 260 held-out tokens of
 * stories: by layer the rate, the share of neurons that do 80 % of all firing, and the overlap of neighbouring tokens.
 */
const MEASURED = {
  firing: 0.8,
  dense: {
    rates: [0.2, 0.006, 0.025, 0.035, 0.046, 0.072, 0.101, 0.17],
    neurons: [0.72, 0.452, 0.531, 0.541, 0.547, 0.562, 0.577, 0.607],
    overlaps: [0.226, 0.014, 0.077, 0.135, 0.179, 0.253, 0.321, 0.41],
  },
  mixture: {
    rates: [0.12, 0.015, 0.072, 0.161],
    neurons: [0.625, 0.204, 0.551, 0.632],
    overlaps: [0.046, 0.046, 0.076, 0.112],
  },
};

/** The facts of each layer of a model with so many layers, by depth. */
export function layerFacts(setting: Setting, layerCount: number, isMixture: boolean): LayerFacts[] {
  const kind = isMixture ? 'mixture' : 'dense';
  return Array.from({ length: layerCount }, (_, layer) => {
    const depth = layer / Math.max(1, layerCount - 1);
    if (setting === 'published') {
      const { firstRate, lastRate, skew } = PUBLISHED;
      // The mean of (1 - depth)^power over all depths is 1 / (power + 1).
      const power = (firstRate - lastRate) / (PUBLISHED[kind].meanRate - lastRate) - 1;
      return { rate: lastRate + (firstRate - lastRate) * (1 - depth) ** power, skew, overlap: null };
    }
    const { rates, neurons, overlaps } = MEASURED[kind];
    const skew = { neurons: interpolate(neurons, depth), firing: MEASURED.firing };
    return { rate: interpolate(rates, depth), skew, overlap: interpolate(overlaps, depth) };
  });
}

/**
 * The model of a layer that has these facts. `usedShare`: of its experts, those that a token is routed to; the next token's
 * are others, by chance.
 */
export function layerModel({ rate, skew, overlap }: LayerFacts, usedShare: number): LayerModel {
  const rates = (logRate: number, deviation: number) =>
    HEATS.map((heat) => rateOf({ logRate, deviation, topicShare: 0 }, heat));
  const levelOf = (deviation: number) => bisect(-30, 5, (level) => mean(rates(level, deviation)) < rate);
  const kept = Math.round(skew.neurons * HEATS.length);
  const deviation = bisect(0.01, 6, (x) => {
    const all = rates(levelOf(x), x);
    return sum(all.slice(0, kept)) < skew.firing * sum(all);
  });
  const logRate = levelOf(deviation);
  if (overlap === null) return { logRate, deviation, topicShare: 0 };
  const all = rates(logRate, deviation);
  const chance = sum(all.map((own) => own * own)) / sum(all);
  const topicShare = bisect(0, TOPIC_SHARE_MOST, (share) => {
    const inTopic = sum(all.map((own) => bothFire(own, share))) / sum(all);
    return usedShare * (TOPIC_KEPT * inTopic + (1 - TOPIC_KEPT) * chance) < overlap;
  });
  return { logRate, deviation, topicShare };
}

/** The firing rate of the neuron whose heat is `heat`, a normal number of its own. */
export function rateOf({ logRate, deviation }: LayerModel, heat: number): number {
  return Math.min(RATE_MOST, Math.exp(logRate + deviation * heat));
}

/** How a rate comes about. */
export function sharesOf(rate: number): FiringShares {
  return rate <= UP_SHARE * UP_SHARE ? { gate: rate / UP_SHARE, up: UP_SHARE } : both(Math.sqrt(rate));
}

function both(share: number): FiringShares {
  return { gate: share, up: share };
}

/** The probability that a neuron fires for both of two tokens of a topic. */
function bothFire(rate: number, topicShare: number): number {
  const { gate, up } = sharesOf(rate);
  return bothAbove(-inverseNormal(gate), topicShare) * bothAbove(-inverseNormal(up), topicShare);
}

/** Heats of equally likely neurons, the hottest first. */
const HEATS = Array.from({ length: 200 }, (_, i) => -inverseNormal((i + 0.5) / 200));

/** A value between those of `values`, which are at equal distances from depth 0 to 1. */
function interpolate(values: readonly number[], depth: number): number {
  const place = depth * (values.length - 1);
  const before = Math.min(Math.floor(place), values.length - 2);
  return values[before] + (place - before) * (values[before + 1] - values[before]);
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

function mean(values: readonly number[]): number {
  return sum(values) / values.length;
}
