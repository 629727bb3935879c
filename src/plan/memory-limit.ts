import os from 'node:os';
import { formatBytes, parseBytes } from '../base/bytes.js';
import { Pi2Error } from '../base/error.js';

/** How much memory the whole process may take: `--memory`. */
export type MemoryLimit = { kind: 'bytes'; bytes: number } | { kind: 'share'; percent: number } | { kind: 'min' };

/** Reads `3G`, `50%` or `min`. Throws E_USAGE for anything else. */
export function parseMemoryLimit(text: string): MemoryLimit {
  if (text === 'min') return { kind: 'min' };
  const percent = /^(\d+(?:\.\d+)?)%$/.exec(text)?.[1];
  if (percent === undefined) {
    try {
      return { kind: 'bytes', bytes: parseBytes(text) };
    } catch {
      throw new Pi2Error('E_USAGE', `"${text}" is no amount of memory`, 'give bytes, 3G, 50% of the machine, or min');
    }
  }
  if (!(Number(percent) > 0 && Number(percent) <= 100)) {
    throw new Pi2Error('E_USAGE', `${text} of the memory is not between 0% and 100%`, 'give for example 50%');
  }
  return { kind: 'share', percent: Number(percent) };
}

/**
 * The budget in bytes of the whole process, of which `processBytes` are taken already. Without a limit it is what the machine
 * can give today and still run its other programs; `min` is 0: the planner takes the least there is.
 */
export function budgetBytes(limit: MemoryLimit | undefined, processBytes: number): number {
  switch (limit?.kind) {
    case 'bytes':
      return limit.bytes;
    case 'share':
      return Math.floor((limit.percent / 100) * machineBytes());
    case 'min':
      return 0;
    default:
      return processBytes + availableBytes();
  }
}

/** Words for what set the budget. */
export function describeLimit(limit: MemoryLimit | undefined, bytes: number): string {
  if (limit === undefined) return `${formatBytes(bytes)} of memory are available`;
  const size = formatBytes(bytes);
  return limit.kind === 'share' ? `${limit.percent}% of the machine's memory are ${size}` : `the budget is ${size}`;
}

/** Memory of the machine, or of the control group that this process is confined to. */
function machineBytes(): number {
  const limit = process.constrainedMemory();
  return limit > 0 ? Math.min(limit, os.totalmem()) : os.totalmem();
}

/** Of a machine's memory, what nobody asked us to take is left to its other programs: this share, up to so many bytes. */
const LEFT_SHARE = 1 / 16;
const MOST_LEFT_BYTES = 2 ** 30;

/**
 * Memory this process can take without being asked to: what the kernel calls available but for what is left to others, under
 * the limit of its control group. Page cache does not count as taken, unlike in `process.availableMemory`.
 */
function availableBytes(): number {
  const limit = process.constrainedMemory();
  const left = limit > 0 ? limit - process.memoryUsage.rss() : Number.POSITIVE_INFINITY;
  const others = Math.min(LEFT_SHARE * os.totalmem(), MOST_LEFT_BYTES);
  return Math.floor(Math.max(0, Math.min(os.freemem() - others, left)));
}
