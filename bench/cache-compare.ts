import type { NativeAddon } from '../src/engine/contract.js';
import { beladyHits, countNeeds, hottest, lruHits, windowHits } from './cache-policies.js';
import { type HeatRates, listNeeds, type NeuronTrace } from './cache-trace.js';

/** Of the neurons that fit, those that the paper's cache would keep for good. */
const HOT_SHARE = 0.6;

/** What one policy finds with one share of all neurons kept. */
export interface PolicyResult {
  policy: string;
  keptShare: number;
  /** Of the neurons needed, those in memory. */
  foundShare: number;
  /** Of the misses that Belady's optimum has less than LRU, the part this policy has less. LRU 0, Belady 1; null if they are alike. */
  gapClosed: number | null;
}

/**
 * Replays a trace through the engine's cache and through other policies, each with places for `keptShare` of all neurons. Tokens
 * before `countFrom` fill the caches and are not counted.
 */
export async function comparePolicies(
  addon: NativeAddon,
  trace: NeuronTrace,
  rates: HeatRates,
  keptShares: readonly number[],
  countFrom: number,
): Promise<PolicyResult[]> {
  const needs = listNeeds(trace);
  const { bankCount, neuronCount } = needs;
  const needed = countNeeds(needs, countFrom);
  const results: PolicyResult[] = [];
  for (const keptShare of keptShares) {
    const places = Math.floor(keptShare * bankCount * neuronCount);
    const equal = Array.from({ length: bankCount }, (_, bank) =>
      Math.floor((places + bankCount - 1 - bank) / bankCount),
    );
    const byRate = placesByRate(rates.ofTokens, places, neuronCount);
    const hot = Math.floor(HOT_SHARE * places);
    const engine = async (coldSlots: number[], firingRates?: Float32Array) => {
      const hotNeurons = coldSlots.map(() => 0);
      const request = { ...trace, hotNeurons, coldSlots, countFrom, ...(firingRates && { firingRates }) };
      const { hotHits, coldHits } = await addon.replayCache(request);
      return hotHits + coldHits;
    };
    const lru = lruHits(needs, places, countFrom);
    const belady = beladyHits(needs, places, countFrom);
    const found: [string, number][] = [
      ['LRU, one pool', lru],
      ['LRU, banks alike', lruHits(needs, equal, countFrom)],
      ['LRU, banks by rate', lruHits(needs, byRate, countFrom)],
      ['window of the last tokens', windowHits(needs, places, countFrom).hits],
      ['hottest by profile, fixed', lruHits(needs, 0, countFrom, hottest(rates.ofTokens, places))],
      ['60 % hottest, LRU', lruHits(needs, places - hot, countFrom, hottest(rates.ofTokens, hot))],
      ['engine without profile', await engine(equal)],
      ['engine', await engine(byRate, rates.ofBank)],
      ['Belady, banks by rate', beladyHits(needs, byRate, countFrom)],
      ['Belady, one pool', belady],
    ];
    for (const [policy, hits] of found) {
      const gapClosed = belady === lru ? null : (hits - lru) / (belady - lru);
      results.push({ policy, keptShare, foundShare: hits / needed, gapClosed });
    }
  }
  return results;
}

/** Of each bank how many of its neurons are among the `places` that fire most: how the memory plan shares places out. */
export function placesByRate(rates: Float32Array, places: number, neuronCount: number): number[] {
  const marks = hottest(rates, places);
  return Array.from({ length: rates.length / neuronCount }, (_, bank) =>
    marks.subarray(bank * neuronCount, (bank + 1) * neuronCount).reduce((sum, mark) => sum + mark, 0),
  );
}
