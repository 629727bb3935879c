/**
 * Memory caps that count page cache: a control group with a limit, so that direct I/O is not compared with memory that nobody
 * counted. Needs root and the memory controller of cgroup v1 or v2.
 */
import { mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Pi2Error } from '../src/base/error.js';

/** What a group saw of the processes in it. */
export interface GroupUsage {
  /** Most bytes at once: anonymous memory, page cache and what the kernel holds for them. */
  peakBytes: number;
  /** Processes that the kernel ended because the limit was reached and nothing could be given back. */
  oomKills: number;
  /** Times that the limit was reached and the kernel had to give page cache back before going on. */
  limitHits: number;
}

/** Names of the files of a control group. */
interface Controller {
  /** The folder that groups are made in. */
  root: string;
  limit: string;
  peak: string;
  events: string;
  /** A file, and where in it the number of limit hits is. */
  hits: readonly [string, RegExp];
  /** Files, and what they are set to, that keep what is capped from going to swap. */
  noSwap: readonly [string, string];
  /** Written to, it gives the page cache back that a group holds. */
  empty: readonly [string, string];
}

const V1 = {
  limit: 'memory.limit_in_bytes',
  peak: 'memory.max_usage_in_bytes',
  events: 'memory.oom_control',
  hits: ['memory.failcnt', /^(\d+)$/m],
  noSwap: ['memory.swappiness', '0'],
  empty: ['memory.force_empty', '0'],
} as const;
const V2 = {
  limit: 'memory.max',
  peak: 'memory.peak',
  events: 'memory.events',
  hits: ['memory.events', /^max (\d+)$/m],
  noSwap: ['memory.swap.max', '0'],
  empty: ['memory.reclaim', '1T'],
} as const;

const REMOVE_ATTEMPTS = 50;
const REMOVE_PAUSE_MS = 100;
const DROP_CACHES = '/proc/sys/vm/drop_caches';
let groupsMade = 0;

/** A control group of memory, removed by `remove`. */
export class MemoryGroup {
  readonly #path: string;
  readonly #controller: Controller;

  private constructor(path: string, controller: Controller) {
    this.#path = path;
    this.#controller = controller;
  }

  /** Makes a group; `limitBytes` null only counts. Throws `Pi2Error` where that is not possible. */
  static create(limitBytes: number | null): MemoryGroup {
    const controller = findController();
    const path = join(controller.root, `powerinfer2-bench-${process.pid}-${++groupsMade}`);
    try {
      mkdirSync(path);
      const group = new MemoryGroup(path, controller);
      group.#tryWrite(...controller.noSwap);
      if (limitBytes !== null) writeFileSync(join(path, controller.limit), String(limitBytes));
      group.usage();
      return group;
    } catch (error) {
      throw noGroup(`${path}: ${(error as Error).message}`);
    }
  }

  /** A command line that joins the group, then becomes `command`: all of its memory is counted. */
  wrap(command: readonly string[]): string[] {
    return ['/bin/sh', '-c', 'echo $$ > "$0" && exec "$@"', join(this.#path, 'cgroup.procs'), ...command];
  }

  usage(): GroupUsage {
    const kills = /^oom_kill (\d+)$/m.exec(this.#read(this.#controller.events))?.[1];
    const [hitsFile, hitsPattern] = this.#controller.hits;
    const hits = hitsPattern.exec(this.#read(hitsFile))?.[1];
    const peakBytes = Number(this.#read(this.#controller.peak));
    return { peakBytes, oomKills: Number(kills ?? 0), limitHits: Number(hits ?? 0) };
  }

  /** Removes the group, once its processes have ended. */
  async remove(): Promise<void> {
    this.#tryWrite(...this.#controller.empty);
    for (let attempt = 1; ; attempt++) {
      try {
        return rmdirSync(this.#path);
      } catch (error) {
        if (attempt === REMOVE_ATTEMPTS) {
          throw new Pi2Error('E_IO', `the control group ${this.#path} is still in use: ${(error as Error).message}`);
        }
        await sleep(REMOVE_PAUSE_MS);
      }
    }
  }

  #read(file: string): string {
    return readFileSync(join(this.#path, file), 'latin1');
  }

  /** For what not every kernel has. */
  #tryWrite(file: string, text: string): void {
    try {
      writeFileSync(join(this.#path, file), text);
    } catch {
      // A kernel without swap accounting has no swap to keep from; a group that stays full is emptied with the group.
    }
  }
}

/** Empties the page cache of the machine: what was read earlier must be read again. Throws `Pi2Error` without root. */
export function dropPageCache(): void {
  try {
    writeFileSync(DROP_CACHES, '1');
  } catch (error) {
    const hint = 'run this as root';
    throw new Pi2Error('E_IO', `the page cache cannot be dropped: ${(error as Error).message}`, hint);
  }
}

/** The memory controller of this machine. Throws `Pi2Error` if there is none. */
function findController(): Controller {
  const mounts = readFileSync('/proc/self/mounts', 'latin1').split('\n');
  for (const mount of mounts) {
    const [, folder, type, options] = mount.split(' ');
    if (type === 'cgroup' && options.split(',').includes('memory')) return { root: folder, ...V1 };
  }
  for (const mount of mounts) {
    const [, folder, type] = mount.split(' ');
    if (type !== 'cgroup2') continue;
    try {
      const controllers = readFileSync(join(folder, 'cgroup.controllers'), 'latin1').trim().split(' ');
      if (!controllers.includes('memory')) continue;
      writeFileSync(join(folder, 'cgroup.subtree_control'), '+memory');
    } catch (error) {
      throw noGroup(`${folder}: ${(error as Error).message}`);
    }
    return { root: folder, ...V2 };
  }
  throw noGroup('no memory controller is mounted');
}

function noGroup(why: string): Pi2Error {
  const hint = 'run this as root on a machine with the memory controller of cgroups; a container needs --privileged';
  return new Pi2Error('E_IO', `memory cannot be capped here: ${why}`, hint);
}
