/**
 * An engine in a process of its own, so that a cap and a peak of memory are its alone. The process reads one request a line and
 * answers each with one line; several of them stay open, so that engines are measured in turn without being loaded again.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { Pi2Error } from '../src/base/error.js';
import { type GroupUsage, MemoryGroup } from './memory-group.js';
import { OthersMeter } from './others.js';

/** A test: a prompt of `tokens` random tokens, or so many tokens one after another, as many of them as `seconds` allow. */
export interface PeerTest {
  kind: 'pp' | 'tg';
  tokens: number;
  seconds: number;
}

/** What an engine counted during a test, all of it a token; null where it does not count that. */
export interface PeerCounts {
  /** Weights that the kernels read from memory. */
  weightBytes: number | null;
  /** Of the neurons needed, those found in memory; null when all are. */
  hitShare: number | null;
}

/** One run of a test. */
export interface PeerSample extends PeerCounts {
  /** Tokens that were really computed: fewer than asked for if time ran out. */
  tokens: number;
  ms: number;
  /** Of each token of `tg`. */
  latenciesMs: number[];
  /** Bytes that the kernel fetched from the device for this process, a token: page faults and read-ahead included. */
  readBytes: number;
  majorFaults: number;
  /** Share of the cores that other processes took meanwhile; null where unknown. */
  othersShare: number | null;
}

/** What a process says once its engine is open. */
export interface PeerFacts {
  /** Words for how it computes: "direct, io_uring, 512 tokens at once", "CPU_Mapped". */
  how: string;
  threads: number;
  loadMs: number;
}

/** An engine as its process drives it. Both calls give the time of each token or, of a prompt, of all of it. */
export interface PeerEngine {
  facts: Omit<PeerFacts, 'loadMs'>;
  prefill(tokens: number): Promise<PeerCounts>;
  /** Computes one token; position 0 begins anew. Only `ms` of it is what counts. */
  decode(position: number): Promise<{ ms: number }>;
  /** Counts of the tokens decoded since position 0. */
  decodeCounts(tokens: number): PeerCounts;
}

type Answer = { error: string } | { facts: PeerFacts } | { sample: PeerSample };

/** The side of the child: opens an engine, then answers requests until stdin ends. */
export async function serveEngine(open: () => Promise<PeerEngine>): Promise<void> {
  const answer = (line: Answer) => process.stdout.write(`${JSON.stringify(line)}\n`);
  try {
    const start = performance.now();
    const engine = await open();
    answer({ facts: { ...engine.facts, loadMs: performance.now() - start } });
    for await (const line of createInterface({ input: process.stdin })) {
      answer({ sample: await runTest(engine, JSON.parse(line) as PeerTest) });
    }
  } catch (error) {
    answer({ error: error instanceof Error ? error.message : String(error) });
  }
  process.exit();
}

async function runTest(engine: PeerEngine, { kind, tokens, seconds }: PeerTest): Promise<PeerSample> {
  const readBefore = deviceBytesRead();
  const faultsBefore = process.resourceUsage().majorPageFault;
  const others = new OthersMeter();
  const start = performance.now();
  const latenciesMs: number[] = [];
  let counts: PeerCounts;
  let ms: number;
  if (kind === 'pp') {
    counts = await engine.prefill(tokens);
    ms = performance.now() - start;
  } else {
    while (latenciesMs.length < tokens && (latenciesMs.length === 0 || performance.now() - start < 1000 * seconds)) {
      latenciesMs.push((await engine.decode(latenciesMs.length)).ms);
    }
    counts = engine.decodeCounts(latenciesMs.length);
    ms = latenciesMs.reduce((total, latency) => total + latency, 0);
  }
  const othersShare = others.share();
  const done = kind === 'pp' ? tokens : latenciesMs.length;
  return {
    tokens: done,
    ms,
    latenciesMs,
    readBytes: (deviceBytesRead() - readBefore) / done,
    majorFaults: (process.resourceUsage().majorPageFault - faultsBefore) / done,
    othersShare,
    ...counts,
  };
}

/** Bytes that all threads of this process had fetched from a device. */
function deviceBytesRead(): number {
  return Number(/^read_bytes: (\d+)$/m.exec(readFileSync('/proc/self/io', 'latin1'))?.[1]);
}

/** The side of the parent: a process with an engine, in a control group of its own. */
export class PeerProcess {
  readonly #child: ChildProcess;
  readonly #group: MemoryGroup;
  readonly #answers: AsyncIterator<string>;
  readonly #closed: Promise<unknown>;

  private constructor(child: ChildProcess, group: MemoryGroup) {
    this.#child = child;
    this.#group = group;
    this.#answers = createInterface({ input: child.stdout as NodeJS.ReadableStream })[Symbol.asyncIterator]();
    this.#closed = new Promise((resolve) => child.on('close', resolve).on('error', resolve));
  }

  /** Starts `program` with Node under a cap, without waiting for it. Throws `Pi2Error` where memory cannot be capped. */
  static start(program: string, request: object, capBytes: number | null): PeerProcess {
    const group = MemoryGroup.create(capBytes);
    const [shell, ...args] = group.wrap([process.execPath, program, JSON.stringify(request)]);
    const child = spawn(shell, args, { stdio: ['pipe', 'pipe', 'ignore'] });
    child.stdin?.on('error', () => {});
    return new PeerProcess(child, group);
  }

  /** Waits until the engine is open. Throws `Pi2Error` when it did not open, or was ended for its memory. */
  async facts(): Promise<PeerFacts> {
    const answer = await this.#next();
    if ('facts' in answer) return answer.facts;
    throw new Pi2Error('E_IO', 'error' in answer ? answer.error : 'the process answered out of turn');
  }

  async run(test: PeerTest): Promise<PeerSample> {
    this.#child.stdin?.write(`${JSON.stringify(test)}\n`);
    const answer = await this.#next();
    if ('sample' in answer) return answer.sample;
    throw new Pi2Error('E_IO', 'error' in answer ? answer.error : 'the process answered out of turn');
  }

  usage(): GroupUsage {
    return this.#group.usage();
  }

  /** Ends the process and removes its group; what it used at most. */
  async close(): Promise<GroupUsage> {
    this.#child.kill('SIGKILL');
    await this.#closed;
    const usage = this.#group.usage();
    await this.#group.remove();
    return usage;
  }

  async #next(): Promise<Answer> {
    const { value, done } = await this.#answers.next();
    if (!done) return JSON.parse(value) as Answer;
    await this.#closed;
    const { oomKills } = this.#group.usage();
    return {
      error: oomKills > 0 ? 'killed: it takes more memory than the cap' : 'the process ended without an answer',
    };
  }
}
