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
