import { readFileSync, writeFileSync } from 'node:fs';

/**
 * Most memory that this process had resident, in bytes. From /proc where there is one: the kernel's other count, `maxRSS`,
 * begins with the size of the process that started this one.
 */
export function peakMemoryBytes(): number {
  try {
    const kibibytes = /^VmHWM:\s+(\d+) kB$/m.exec(readFileSync('/proc/self/status', 'latin1'))?.[1];
    if (kibibytes) return Number(kibibytes) * 1024;
  } catch {
    // Without /proc the other count has to do.
  }
  return process.resourceUsage().maxRSS * 1024;
}

/** Lets `peakMemoryBytes` begin again with what is resident now; false where the kernel has no way to. */
export function resetPeakMemory(): boolean {
  try {
    writeFileSync('/proc/self/clear_refs', '5');
    return true;
  } catch {
    return false;
  }
}
