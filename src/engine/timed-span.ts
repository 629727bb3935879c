/** Something that JavaScript did, in milliseconds of `performance.now()`. */
export interface TimedSpan {
  name: 'token' | 'prompt' | 'sampling';
  beginMs: number;
  endMs: number;
}

/** Is told of each token once its time was taken: what it does itself is not part of it. */
export type SpanListener = (spans: readonly TimedSpan[]) => void;
