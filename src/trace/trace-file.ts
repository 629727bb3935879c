import { closeSync, openSync, writeSync } from 'node:fs';
import { fileError } from '../base/error.js';
import { loadAddon } from '../engine/addon.js';
import type { NativeTrace } from '../engine/contract.js';
import type { TimedSpan } from '../engine/timed-span.js';
import { decodeTrace, FLASH_TRACK, JAVASCRIPT_TRACK, microseconds, type TraceEvent } from './records.js';

/** Records that each thread's ring holds (32 bytes each): what a step of a 7B model makes, several times. */
export const TRACE_RECORDS = 32_768;

/** What is traced of an engine: `takeTrace` gives what was recorded since the last call. */
export interface TracedEngine {
  readonly threads: number;
  takeTrace(): NativeTrace[];
}

/**
 * A file of Chrome's trace event format, written as things happen: what is there is whole up to the last token. Each engine is
 * a process in it.
 */
export class TraceFile {
  readonly #path: string;
  readonly #descriptor: number;
  readonly #stages = loadAddon().traceStages();
  readonly #origin = readClocks();
  #isFirst = true;
  #pid = 0;
  #nextId = 1;
  #dropped = 0;

  private constructor(path: string, descriptor: number) {
    this.#path = path;
    this.#descriptor = descriptor;
  }

  /** Makes the file, or empties it. Throws `Pi2Error`. */
  static open(path: string): TraceFile {
    try {
      const file = new TraceFile(path, openSync(path, 'w'));
      file.#append('{"displayTimeUnit":"ms","traceEvents":[');
      return file;
    } catch (error) {
      throw fileError(error, 'write', path);
    }
  }

  /** Events lost so far, the oldest of steps that made too many. */
  get dropped(): number {
    return this.#dropped;
  }

  /** What follows is of another engine. */
  beginEngine(name: string, engine: TracedEngine): void {
    this.#pid++;
    const label = (what: string, tid: number, text: string): TraceEvent => ({
      name: what,
      ph: 'M',
      pid: this.#pid,
      tid,
      args: { name: text },
    });
    const threads = Array.from({ length: engine.threads }, (_, i) => label('thread_name', 1 + i, `thread ${i}`));
    this.#write([
      label('process_name', JAVASCRIPT_TRACK, name),
      label('thread_name', JAVASCRIPT_TRACK, 'JavaScript'),
      ...threads,
      label('thread_name', FLASH_TRACK, 'flash'),
    ]);
  }

  /** Writes what JavaScript did and what the engine traced meanwhile. */
  add(spans: readonly TimedSpan[], engine: TracedEngine): void {
    this.#write(
      spans.map(({ name, beginMs, endMs }) => ({
        name,
        ph: 'X',
        pid: this.#pid,
        tid: JAVASCRIPT_TRACK,
        ts: 1000 * (beginMs - this.#origin.ms),
        dur: 1000 * (endMs - beginMs),
      })),
    );
    for (const trace of engine.takeTrace()) {
      this.#dropped += trace.dropped;
      const events = decodeTrace(trace, this.#stages, this.#pid, this.#origin.ns, this.#nextId);
      this.#nextId += events.length;
      this.#write(events);
    }
  }

  /** Ends the file. */
  close(): void {
    const seconds = microseconds(process.hrtime.bigint(), this.#origin.ns) / 1e6;
    this.#append(`\n],"otherData":{"dropped_events":${this.#dropped},"seconds":${seconds}}}\n`);
    closeSync(this.#descriptor);
  }

  #write(events: readonly TraceEvent[]): void {
    if (events.length === 0) return;
    const text = events.map((event) => JSON.stringify(event)).join(',\n');
    this.#append(`${this.#isFirst ? '\n' : ',\n'}${text}`);
    this.#isFirst = false;
  }

  #append(text: string): void {
    try {
      writeSync(this.#descriptor, text);
    } catch (error) {
      throw fileError(error, 'write', this.#path);
    }
  }
}

/** One moment by the clock of native code and by that of JavaScript: of some tries the one that was interrupted least. */
function readClocks(): { ns: bigint; ms: number } {
  let best = { ns: 0n, ms: 0, took: Number.POSITIVE_INFINITY };
  for (let i = 0; i < 10; i++) {
    const before = performance.now();
    const ns = process.hrtime.bigint();
    const after = performance.now();
    if (after - before < best.took) best = { ns, ms: (before + after) / 2, took: after - before };
  }
  return best;
}
