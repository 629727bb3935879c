/** Normal numbers: making them, and how they are distributed. */
import type { Random } from '../src/engine/random.js';

/** A normal number of deviation 1, by Box and Muller. */
export function normal(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

/** The probability that a normal number is below x. Abramowitz and Stegun 26.2.17, within 7.5e-8. */
export function normalIntegral(x: number): number {
  const t = 1 / (1 + 0.2316419 * Math.abs(x));
  const series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
  const tail = (Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI)) * series;
  return x < 0 ? tail : 1 - tail;
}

/** The number below which a normal number lies with probability p. */
export function inverseNormal(p: number): number {
  return bisect(-8, 8, (x) => normalIntegral(x) < p);
}

/** The probability that two normal numbers, of which they share `shared` of the variance, are both above `least`. */
export function bothAbove(least: number, shared: number): number {
  const a = Math.sqrt(shared);
  const b = Math.sqrt(1 - shared);
  let sum = 0;
  for (const [i, x] of NODES.entries()) sum += WEIGHTS[i] * normalIntegral((a * x - least) / b) ** 2;
  return sum;
}

/** Where `isBelow` turns from true to false between `low` and `high`. */
export function bisect(low: number, high: number, isBelow: (x: number) => boolean): number {
  let [from, to] = [low, high];
  for (let i = 0; i < 40; i++) {
    const middle = (from + to) / 2;
    if (isBelow(middle)) from = middle;
    else to = middle;
  }
  return (from + to) / 2;
}

/** An integral over a normal number: equal steps from -5 to 5. */
const NODES = Array.from({ length: 41 }, (_, i) => (i - 20) / 4);
const DENSITIES = NODES.map((x) => Math.exp((-x * x) / 2));
const DENSITY_SUM = DENSITIES.reduce((sum, density) => sum + density, 0);
const WEIGHTS = DENSITIES.map((density) => density / DENSITY_SUM);
