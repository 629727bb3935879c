import { readFileSync } from 'node:fs';
import os from 'node:os';

/** Clock ticks a second of /proc/stat, on every Linux that Node runs on. */
const TICKS_PER_SECOND = 100;

/** Measures how much of the machine's cores anybody but this process uses, host of a virtual machine included. */
export class OthersMeter {
  readonly #start = performance.now();
  readonly #busySeconds = busySeconds();
  readonly #ownSeconds = ownSeconds();

  /** Share of all cores' time since construction, 0 to 1; null where the kernel does not tell. */
  share(): number | null {
    const busy = busySeconds();
    if (busy === null || this.#busySeconds === null) return null;
    const others = busy - this.#busySeconds - (ownSeconds() - this.#ownSeconds);
    const seconds = ((performance.now() - this.#start) / 1000) * os.cpus().length;
    return Math.min(1, Math.max(0, others / seconds));
  }
}

/** Core seconds since boot that were neither idle nor waiting for a disk; null without /proc/stat. */
function busySeconds(): number | null {
  try {
    const [user, nice, system, , , irq, softirq, steal] = readFileSync('/proc/stat', 'latin1')
      .slice('cpu  '.length)
      .split(' ', 8)
      .map(Number);
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_SECOND;
  } catch {
    return null;
  }
}

function ownSeconds(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
}
