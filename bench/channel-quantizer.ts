/**
 * Quantizations of a matrix to compare with the one that is stored: what a unit without scales for groups has (paper section
 * 1.8): int4 with one scale for a whole row, and, after AWQ and MixQ, the inputs that matter most kept as int8 beside it.
 * Numbers are quantized and decoded in place.
 */

/** Where candidates put the largest weight of a row: int4 is -8 .. 7, and clipping the largest of many weights pays. */
const LEVELS = [-16, -14.4, -12.8, -11.6, -10.4, -9.6, -8.8, -8, -7.2, 6.4, 7.2, 8, 8.8, 9.6, 10.4, 11.6, 12.8, 14.4];
const INT8_MOST = 127;

/** [rows x columns] numbers, row by row: a row is one output, a column one input. */
export interface FloatMatrix {
  rows: number;
  columns: number;
  values: Float32Array;
}

/** int4 with one scale a row; the inputs in `kept` are int8 instead, with one scale a row for all of them. */
export function quantizeChannels(matrix: FloatMatrix, kept: ReadonlySet<number>): void {
  const { rows, columns, values } = matrix;
  const low = Array.from({ length: columns }, (_, k) => k).filter((k) => !kept.has(k));
  const row4 = new Float32Array(low.length);
  for (let n = 0; n < rows; n++) {
    const row = values.subarray(n * columns, (n + 1) * columns);
    for (let i = 0; i < low.length; i++) row4[i] = row[low[i]];
    const scale = chooseScale(row4);
    for (const k of low) row[k] = scale * integerOf(row[k], scale, -8, 7);
    let most = 0;
    for (const k of kept) most = Math.max(most, Math.abs(row[k]));
    for (const k of kept) row[k] = (most / INT8_MOST) * integerOf(row[k], most / INT8_MOST, -INT8_MOST, INT8_MOST);
  }
}

/**
 * The inputs that int4 with one scale a row costs most: by the squared error that each adds to the outputs, which is that of its
 * weights times its mean square. `share` of all inputs, at least one.
 */
export function chooseOutliers(matrix: FloatMatrix, meanSquares: Float64Array, share: number): Set<number> {
  const { rows, columns, values } = matrix;
  const rounded = { rows, columns, values: values.slice() };
  quantizeChannels(rounded, new Set());
  const costs = new Float64Array(columns);
  for (let i = 0; i < values.length; i++) {
    const error = values[i] - rounded.values[i];
    costs[i % columns] += error * error * meanSquares[i % columns];
  }
  const order = Array.from({ length: columns }, (_, k) => k).sort((a, b) => costs[b] - costs[a] || a - b);
  return new Set(order.slice(0, Math.max(1, Math.round(share * columns))));
}

/** The scale of least squared error, as native/quantize/group.h searches it for a block. */
function chooseScale(row: Float32Array): number {
  let largest = 0;
  for (const value of row) if (Math.abs(value) > Math.abs(largest)) largest = value;
  let best = 0;
  let scale = 0;
  for (const level of LEVELS) {
    let product = 0;
    let square = 0;
    for (const value of row) {
      const q = integerOf(value, largest / level, -8, 7);
      product += value * q;
      square += q * q;
    }
    if (square > 0 && (product * product) / square > best) {
      best = (product * product) / square;
      scale = product / square;
    }
  }
  return scale;
}

function integerOf(value: number, scale: number, low: number, high: number): number {
  return scale === 0 ? 0 : Math.min(high, Math.max(low, Math.round(value / scale)));
}
