/** Milliseconds for people: `8.42 ms`, `1.35 s`. */
export function formatMs(ms: number): string {
  return ms < 1000 ? `${ms.toFixed(ms < 100 ? 2 : 1)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

/** A share as a percentage with one digit: `91.8 %`. */
export function formatShare(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

/** Lines of `name  value` with the values in one column, each indented by `indent`. */
export function formatTable(rows: readonly (readonly [string, string])[], indent = '  '): string {
  const width = Math.max(...rows.map(([name]) => name.length));
  return rows.map(([name, value]) => `${indent}${name.padEnd(width)}  ${value}\n`).join('');
}
