/** Mean and percentiles of a sample; all null when it is empty. */
export interface Summary {
  mean: number | null;
  p50: number | null;
  p90: number | null;
  p99: number | null;
}

/** Percentiles by nearest rank: the smallest value that at least p percent of the sample do not exceed. */
export function summarize(sample: readonly number[]): Summary {
  if (sample.length === 0) return { mean: null, p50: null, p90: null, p99: null };
  const sorted = Float64Array.from(sample).sort();
  const rank = (percent: number) => sorted[Math.max(0, Math.ceil((percent / 100) * sorted.length) - 1)];
  const sum = sorted.reduce((total, value) => total + value, 0);
  return { mean: sum / sorted.length, p50: rank(50), p90: rank(90), p99: rank(99) };
}

/** The middle of a sample, or the mean of the two in the middle. The sample is not empty. */
export function median(sample: readonly number[]): number {
  const sorted = Float64Array.from(sample).sort();
  const half = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** The arithmetic mean of a sample that is not empty. */
export function mean(sample: readonly number[]): number {
  return sample.reduce((total, value) => total + value, 0) / sample.length;
}

/** Standard deviation of the population that the sample is from; 0 for a sample of one. */
export function deviation(sample: readonly number[]): number {
  if (sample.length < 2) return 0;
  const middle = mean(sample);
  return Math.sqrt(sample.reduce((total, value) => total + (value - middle) ** 2, 0) / (sample.length - 1));
}
