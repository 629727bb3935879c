/** Which activation statistics a synthetic model has when it is run, next to those of real models. */
import { createHash } from 'node:crypto';
import { type ActivationProfile, layerCounts } from '../converter/activation/profile.js';
import { profileWindows } from '../converter/activation/profiler.js';
import { type ProfileStatistics, profileStatistics } from '../converter/activation/statistics.js';
import { Engine } from '../src/engine/engine.js';
import { seededRandom } from '../src/engine/random.js';
import { readHeatOrder } from '../src/format/heat-order.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import { type LayerFacts, TOPIC_KEPT } from './activation-settings.js';
import { markdownTable } from './report.js';
import type { SparseStream } from './sparse-stream.js';
import type { SyntheticCheckpoint } from './synthetic-checkpoint.js';

/** Tokens that are counted. */
const WINDOWS = 4;
const WINDOW_TOKENS = 256;
/** Positions whose next token is looked at. */
const HEAD_TOKENS = 64;

/** What was asked for, and what came of it. */
interface Pair {
  real: number | null;
  reached: number | null;
}

/** Shares are from 0 to 1; see `LayerFacts`. */
interface LayerReached {
  rate: Pair;
  /** Of all firing, what the hottest `neurons` of the layer do: those that lie first in heat order. */
  skew: Pair & { neurons: number };
  /** The same of the hottest half. */
  hottest_half: number;
  overlap: Pair & { by_chance: number | null };
}

/** The statistics of a model as they are stored beside it. */
export interface ReachedStatistics {
  /** The mark of the checkpoint. */
  made_of: string;
  tokens: number;
  layers: LayerReached[];
  /** Probability that the next token is of the same topic, at temperature 1; null where there are no topics. */
  topic_kept: { asked: number; reached: number } | null;
  /** All that the profiler says. */
  profile: ProfileStatistics;
}

/**
 * Runs a model over tokens as it would sample them at temperature 1, uniformly of a topic that lasts, and counts what fires with
 * the profiler of the converter.
 */
export async function reachedStatistics(
  modelPath: string,
  checkpoint: SyntheticCheckpoint,
  seed: number,
): Promise<ReachedStatistics> {
  const model = await openModelDirectory(modelPath);
  const stream = checkpoint.stream as SparseStream;
  const { vocabSize, contextLength, expertCount = 1, expertsPerToken = 1 } = checkpoint.shape;
  const length = Math.min(WINDOW_TOKENS, contextLength);
  const next = tokenSource(vocabSize, stream.topics, seed);
  const windows = Array.from({ length: WINDOWS }, () => Array.from({ length }, next));
  const engine = await Engine.open(model, { context: length, threads: 0, exact: true });
  try {
    const sha256 = createHash('sha256').update(JSON.stringify(windows)).digest('hex');
    const profile = await profileWindows(model, engine, { sha256, windows }, async () => true);
    const statistics = profileStatistics(profile);
    const layers = [];
    for (const [layer, facts] of stream.facts.entries()) {
      layers.push(await layerReached(model, profile, statistics, layer, facts, expertCount / expertsPerToken));
    }
    const tokens = windows[0].slice(0, HEAD_TOKENS);
    const kept = stream.topics === 0 ? null : await topicKept(engine, tokens, vocabSize, stream.topics);
    return {
      made_of: checkpoint.mark,
      tokens: statistics.tokens,
      layers,
      topic_kept: kept === null ? null : { asked: TOPIC_KEPT, reached: kept },
      profile: statistics,
    };
  } finally {
    await engine.close();
  }
}

/** Statistics for people, a line a layer. */
export function describeReached({ tokens, layers, topic_kept }: ReachedStatistics): string {
  const header = ['layer', 'fire %', 'real', 'hottest', 'do %', 'real', 'half does %', 'again %', 'real', 'chance'];
  const lines = layers.map(({ rate, skew, hottest_half, overlap }, layer) => [
    String(layer),
    percent(rate.reached),
    percent(rate.real),
    `${percent(skew.neurons)} %`,
    percent(skew.reached),
    percent(skew.real),
    percent(hottest_half),
    percent(overlap.reached),
    percent(overlap.real),
    percent(overlap.by_chance),
  ]);
  const mean = (pick: (layer: LayerReached) => number | null) => {
    const values = layers.map(pick);
    if (values.includes(null)) return '-';
    return percent((values as number[]).reduce((sum, value) => sum + value, 0) / values.length);
  };
  lines.push([
    'mean',
    mean(({ rate }) => rate.reached),
    mean(({ rate }) => rate.real),
    `${mean(({ skew }) => skew.neurons)} %`,
    mean(({ skew }) => skew.reached),
    mean(({ skew }) => skew.real),
    mean((layer) => layer.hottest_half),
    mean(({ overlap }) => overlap.reached),
    mean(({ overlap }) => overlap.real),
    mean(({ overlap }) => overlap.by_chance),
  ]);
  const topics = topic_kept
    ? `\nThe next token is of the same topic with probability ${percent(topic_kept.reached)} % (asked: ${percent(topic_kept.asked)} %).`
    : '';
  return `${markdownTable(header, lines)}
fire: neurons of an expert that computes the token; hottest: share of a layer's neurons that does so much of its firing;
again: of the neurons of a layer that fire, those that did for the token before; ${tokens} tokens.${topics}
`;
}

async function layerReached(
  model: ModelDirectory,
  profile: ActivationProfile,
  statistics: ProfileStatistics,
  layer: number,
  facts: LayerFacts,
  expertsPerUsed: number,
): Promise<LayerReached> {
  const { rate, overlap, overlap_by_chance } = statistics.layers[layer];
  const order = (await readHeatOrder(model, layer)) as Uint32Array;
  const counts = layerCounts(profile, layer);
  const { experts, neurons } = profile.shape;
  const total = counts.reduce((sum, count) => sum + count, 0);
  const firingOf = (share: number) => {
    let firing = 0;
    for (let expert = 0; expert < experts; expert++) {
      const first = expert * neurons;
      for (const neuron of order.subarray(first, first + Math.round(share * neurons))) firing += counts[first + neuron];
    }
    return firing / total;
  };
  const { skew } = facts;
  return {
    rate: { real: facts.rate, reached: rate * expertsPerUsed },
    skew: { neurons: skew.neurons, real: skew.firing, reached: firingOf(skew.neurons) },
    hottest_half: firingOf(0.5),
    overlap: { real: facts.overlap, reached: overlap, by_chance: overlap_by_chance },
  };
}

/** Draws tokens: any of the vocabulary, or of a topic that goes on or is followed by any. */
function tokenSource(vocabSize: number, topics: number, seed: number): () => number {
  const random = seededRandom(seed);
  const below = (count: number) => Math.floor(random() * count);
  if (topics === 0) return () => below(vocabSize);
  let topic = below(topics);
  return () => {
    if (random() > TOPIC_KEPT) topic = below(topics);
    return topic + topics * below(Math.floor((vocabSize - 1 - topic) / topics) + 1);
  };
}

/** The mean probability that the model gives to tokens of the same topic. */
async function topicKept(engine: Engine, tokens: number[], vocabSize: number, topics: number): Promise<number> {
  const logits = new Float32Array(tokens.length * vocabSize);
  const step = Math.min(tokens.length, engine.batchSize);
  for (let at = 0; at < tokens.length; at += step) {
    const part = tokens.slice(at, at + step);
    const own = logits.subarray(at * vocabSize, (at + part.length) * vocabSize);
    await engine.step(Int32Array.from(part), at, own, { all: true, exact: true });
  }
  let kept = 0;
  for (const [i, token] of tokens.entries()) {
    const own = logits.subarray(i * vocabSize, (i + 1) * vocabSize);
    const most = own.reduce((a, b) => Math.max(a, b));
    let all = 0;
    let same = 0;
    for (const [other, logit] of own.entries()) {
      const weight = Math.exp(logit - most);
      all += weight;
      if (other % topics === token % topics) same += weight;
    }
    kept += same / all;
  }
  return kept / tokens.length;
}

function percent(share: number | null): string {
  return share === null ? '-' : (100 * share).toFixed(1);
}
