import { Pi2Error } from './error.js';

const SUFFIXES = ['', 'K', 'M', 'G', 'T'] as const;

/**
 * Reads a size such as `4096`, `512M`, `1.5G` or `2GiB`: bytes, or binary multiples by suffix K, M, G, T (`B` or `iB` may
 * follow). Throws `E_USAGE` for anything else, for zero and for sizes beyond what a number counts exactly.
 */
export function parseBytes(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?$/i.exec(text.trim());
  const exponent = SUFFIXES.indexOf((match?.[2] ?? '').toUpperCase() as (typeof SUFFIXES)[number]);
  const bytes = match ? Math.floor(Number(match[1]) * 1024 ** exponent) : Number.NaN;
  if (!Number.isSafeInteger(bytes) || bytes < 1) {
    throw new Pi2Error(
      'E_USAGE',
      `"${text}" is not a size in bytes`,
      'give a number with K, M, G or T, for example 512M or 2G',
    );
  }
  return bytes;
}

/** A size for people: three digits and a binary unit, e.g. `1.91 GiB`. */
export function formatBytes(bytes: number): string {
  if (bytes < 1024) return `${bytes} B`;
  const exponent = Math.min(SUFFIXES.length - 1, Math.floor(Math.log2(bytes) / 10));
  const number = bytes / 1024 ** exponent;
  // What three digits round up to a thousand would be written with an exponent.
  return `${number.toPrecision(number >= 999.5 ? 4 : 3)} ${SUFFIXES[exponent]}iB`;
}
