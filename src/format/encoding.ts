/** How a vector of weights is stored; FORMAT.md section 1. Frozen: these names are on disk. */
export const ENCODINGS = ['f32', 'f16', 'q8', 'q4'] as const;
export type Encoding = (typeof ENCODINGS)[number];

/** Consecutive weights of a row that share one scale. */
export const BLOCK = 32;
/** Weights whose bytes are interleaved by block; rows are padded to a multiple of it. */
export const GROUP = 256;

/** Number of weights a row of `columns` is padded to. f32 rows are not padded. */
export function paddedLength(encoding: Encoding, columns: number): number {
  return encoding === 'f32' ? columns : Math.ceil(columns / GROUP) * GROUP;
}

/** Bytes of the weights of one row, without its scales. */
export function weightBytes(encoding: Encoding, columns: number): number {
  const n = paddedLength(encoding, columns);
  switch (encoding) {
    case 'f32':
      return 4 * n;
    case 'f16':
      return 2 * n;
    case 'q8':
      return n;
    case 'q4':
      return n / 2;
  }
}

/** Bytes of the scales of one row. */
export function scaleBytes(encoding: Encoding, columns: number): number {
  return encoding === 'q8' || encoding === 'q4' ? (2 * paddedLength(encoding, columns)) / BLOCK : 0;
}

/** Bytes of one row as tensors store it: weights, then scales. */
export function rowBytes(encoding: Encoding, columns: number): number {
  return weightBytes(encoding, columns) + scaleBytes(encoding, columns);
}
