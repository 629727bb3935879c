/** `run --n-parallel` and `run --best-of`: several continuations of one prompt, decoded together. */
import { Pi2Error } from '../base/error.js';
import { BatchDecoder, type Continuation, type ContinuationOptions } from '../engine/batch.js';
import type { EngineCounters } from '../engine/counters.js';
import type { Engine } from '../engine/engine.js';
import { seededRandom } from '../engine/random.js';
import type { SamplingOptions } from '../engine/sampler.js';
import type { SpanListener } from '../engine/timed-span.js';
import type { BatchFacts, RunFacts } from '../report/run-report.js';
import { TokenStream } from '../text/token-stream.js';
import type { TextTokenizer } from '../text/tokenizer.js';
import { SEED_MAX } from './options.js';
import { writeJson, writeOut } from './output.js';

/** What is asked for besides an open engine. */
export interface BatchRun {
  prompt: readonly number[];
  /** Null when the prompt was given as tokens. */
  text: string | null;
  tokenizer: TextTokenizer | null;
  count: number;
  /** Only the best is printed, by mean log-probability, when all have ended. */
  best: boolean;
  /** Most tokens of each; -1 is as many as there is room for. */
  maxTokens: number;
  sampling: SamplingOptions;
  /** Of the first; each of the others has the next. */
  seed: number;
  endTokens: readonly number[];
  json: boolean;
  signal: AbortSignal;
  onSpans?: SpanListener;
}

/** What a report says of them. */
export type BatchOutcome = Pick<RunFacts, 'timings' | 'stopReason' | 'countersAfterPrompt'> & { batch: BatchFacts };

/** Positions that each of `count` continuations may add. Throws `Pi2Error` E_CONTEXT_FULL when that is none. */
export function shareOfContext(contextLength: number, promptTokens: number, count: number): number {
  const share = Math.floor((contextLength - promptTokens) / count);
  if (share >= 1) return share;
  throw new Pi2Error(
    'E_CONTEXT_FULL',
    `the prompt has ${promptTokens} tokens, the context ${contextLength}: no room for ${count} continuations`,
    'ask for fewer of them, or give a larger context with -c',
  );
}

/** Generates the continuations and prints them. The engine has a sequence for each. */
export async function runBatch(engine: Engine, run: BatchRun): Promise<BatchOutcome> {
  const share = shareOfContext(engine.contextLength, run.prompt.length, run.count);
  const isCut = run.maxTokens < 0 || run.maxTokens > share;
  const seeds = Array.from({ length: run.count }, (_, k) => (run.seed + k) % (SEED_MAX + 1));
  const decoder = new BatchDecoder(engine, run.onSpans);
  const options = seeds.map((seed): ContinuationOptions => {
    const { sampling, endTokens } = run;
    const random = seededRandom(seed);
    const maxTokens = isCut ? share : run.maxTokens;
    return { maxTokens, limitReason: isCut ? 'context' : 'length', sampling, random, endTokens, scored: run.best };
  });
  const continuations = decoder.join(run.prompt, options);
  const printer = run.json ? new JsonPrinter(run, continuations) : new TextPrinter(run, continuations, seeds);
  let countersAfterPrompt: EngineCounters | null = null;
  for await (const { continuation, token } of decoder.tokens(run.signal)) {
    countersAfterPrompt ??= engine.counters();
    if (!run.best) await printer.token(continuations.indexOf(continuation), token);
  }
  const best = run.best ? bestOf(continuations) : null;
  if (best !== null) {
    for (const token of continuations[best].tokens) await printer.token(best, token);
  }
  await printer.end(best);
  const generatedTokens = continuations.reduce((sum, { tokens }) => sum + tokens.length, 0);
  const { promptTokens, promptMs, firstTokenMs, stepsMs, liveSizes } = decoder.timings;
  return {
    timings: { promptTokens, promptMs, generatedTokens, firstTokenMs, latenciesMs: stepsMs },
    stopReason: continuations[best ?? 0].stopReason,
    countersAfterPrompt: countersAfterPrompt ?? engine.counters(),
    batch: { continuations, seeds, best, liveSizes },
  };
}

/** The number of the likeliest, the first of equals; one without tokens is the last choice. */
export function bestOf(continuations: readonly Continuation[]): number {
  const scores = continuations.map(({ meanLogProbability }) => meanLogProbability ?? Number.NEGATIVE_INFINITY);
  return scores.indexOf(Math.max(...scores));
}

interface BatchPrinter {
  token(index: number, id: number): Promise<void>;
  /** `best`: the only one that was printed, if there is one. */
  end(best: number | null): Promise<void>;
}

function textStreams({ tokenizer, count }: BatchRun): TokenStream[] {
  return Array.from({ length: count }, () => new TokenStream(tokenizer ?? { bytes: () => new Uint8Array(0) }));
}

/**
 * One continuation behind another, each below a line that says which: the first that has not ended is printed as it grows, those
 * behind it when it has. The best alone has no line.
 */
class TextPrinter implements BatchPrinter {
  readonly #run: BatchRun;
  readonly #continuations: readonly Continuation[];
  readonly #seeds: readonly number[];
  readonly #streams: TokenStream[];
  /** Text that waits for its turn, how many tokens came, and the one whose turn it is; -1 before the first. */
  readonly #waiting: string[];
  readonly #counts: number[];
  #current = -1;

  constructor(run: BatchRun, continuations: readonly Continuation[], seeds: readonly number[]) {
    this.#run = run;
    this.#continuations = continuations;
    this.#seeds = seeds;
    this.#streams = textStreams(run);
    this.#waiting = continuations.map(() => run.text ?? '');
    this.#counts = continuations.map(() => 0);
  }

  async token(index: number, id: number): Promise<void> {
    this.#waiting[index] += this.#streams[index].push(id);
    this.#counts[index]++;
    if (this.#run.best) return;
    if (this.#current < 0) await this.#begin(0);
    await this.#write(this.#current);
    while (this.#current + 1 < this.#run.count && this.#hasEnded(this.#current)) await this.#next();
  }

  async end(best: number | null): Promise<void> {
    if (best !== null) {
      await this.#write(best);
      return writeOut(`${this.#streams[best].flush()}\n`);
    }
    if (this.#current < 0) await this.#begin(0);
    while (this.#current + 1 < this.#run.count) await this.#next();
    await this.#finish();
  }

  /** Whether its last token has come: others of the same step may be on their way. */
  #hasEnded(index: number): boolean {
    const { stopReason, tokens } = this.#continuations[index];
    return stopReason !== 'interrupted' && this.#counts[index] === tokens.length;
  }

  async #begin(index: number): Promise<void> {
    this.#current = index;
    await writeOut(`--- continuation ${index + 1} of ${this.#run.count}, seed ${this.#seeds[index]}\n`);
    await this.#write(index);
  }

  async #next(): Promise<void> {
    await this.#finish();
    await this.#begin(this.#current + 1);
  }

  async #finish(): Promise<void> {
    await this.#write(this.#current);
    await writeOut(`${this.#streams[this.#current].flush()}\n`);
  }

  async #write(index: number): Promise<void> {
    const text = this.#waiting[index];
    this.#waiting[index] = '';
    if (text !== '') await writeOut(text);
  }
}

/** One object for each token as it comes; one whose character is unfinished waits for the next of its continuation. */
class JsonPrinter implements BatchPrinter {
  readonly #streams: TokenStream[];
  readonly #waiting: ({ type: 'token'; continuation: number; id: number; text: string } | null)[];

  constructor(run: BatchRun, continuations: readonly Continuation[]) {
    this.#streams = textStreams(run);
    this.#waiting = continuations.map(() => null);
  }

  async token(index: number, id: number): Promise<void> {
    await this.#write(index, '');
    const text = this.#streams[index].push(id);
    this.#waiting[index] = { type: 'token', continuation: index, id, text };
    if (!this.#streams[index].isWaiting) await this.#write(index, '');
  }

  async end(): Promise<void> {
    for (const [index, stream] of this.#streams.entries()) await this.#write(index, stream.flush());
  }

  async #write(index: number, rest: string): Promise<void> {
    const waiting = this.#waiting[index];
    this.#waiting[index] = null;
    if (waiting) await writeJson({ ...waiting, text: waiting.text + rest });
  }
}
