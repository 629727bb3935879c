import type { SequenceRun } from '../engine/contract.js';
import type { EngineCounters } from '../engine/counters.js';
import type { BatchEngine } from '../engine/engine.js';
import type { Random } from '../engine/random.js';
import { SAMPLING_DEFAULTS, sampleToken } from '../engine/sampler.js';
import type { SpanListener } from '../engine/timed-span.js';

/**
 * What is timed: a prompt, generation, or one after the other, behind `depth` positions that are not timed. All of it for each of
 * `sequences`: prompts one after another, tokens together.
 */
export interface BenchTest {
  promptTokens: number;
  generatedTokens: number;
  depth: number;
  sequences: number;
}

/** The name llama-bench gives a test: `pp512`, `tg128`, `pp512+tg128`, `tg128 @ d512`. */
export function testName({ promptTokens, generatedTokens, depth }: Omit<BenchTest, 'sequences'>): string {
  const parts = [
    ...(promptTokens > 0 ? [`pp${promptTokens}`] : []),
    ...(generatedTokens > 0 ? [`tg${generatedTokens}`] : []),
  ];
  return `${parts.join('+')}${depth > 0 ? ` @ d${depth}` : ''}`;
}

/** Positions that a test fills, of all sequences. */
export function testPositions({ promptTokens, generatedTokens, depth, sequences }: BenchTest): number {
  return sequences * (depth + promptTokens + generatedTokens);
}

/** One timed run, with the engine's counters around what was timed. */
export interface Sample {
  ms: number;
  /** Of each step that generates, a token of each sequence. */
  latenciesMs: number[];
  before: EngineCounters;
  after: EngineCounters;
}

/** Gives the first `count` tokens of a text; another text each time, or the same. */
export type PromptSource = (count: number) => number[];

/** Prompts as llama-bench has them: the token that begins a text, if the model has one, then random ones. */
export function randomPrompts(vocabSize: number, bosTokenId: number | null, random: Random): PromptSource {
  return (count) =>
    Array.from({ length: count }, (_, i) =>
      i === 0 && bosTokenId !== null ? bosTokenId : Math.floor(random() * vocabSize),
    );
}

type BenchEngine = BatchEngine & { counters(): EngineCounters };

/**
 * Runs tests on an open engine, each from position 0. What a model skips depends on its tokens, so generation does not feed
 * random ones: each token is drawn from the model's own logits with the default sampling of `run`, behind the prompt or, without
 * one, behind one token of `prompts`. Choosing is not timed. Prompts are computed exactly, as `run` does; each sequence has its own.
 */
export class TestRunner {
  readonly #engine: BenchEngine;
  readonly #prompts: PromptSource;
  readonly #random: Random;
  readonly #logits: Float32Array;
  readonly #onSpans: SpanListener | undefined;

  /** `onSpans` is for a trace. */
  constructor(engine: BenchEngine, prompts: PromptSource, random: Random, onSpans?: SpanListener) {
    this.#onSpans = onSpans;
    this.#engine = engine;
    this.#prompts = prompts;
    this.#random = random;
    this.#logits = new Float32Array(engine.sequences * engine.vocabSize);
  }

  /** One run. Null when `signal` was aborted meanwhile. */
  async run(
    { promptTokens, generatedTokens, depth, sequences }: BenchTest,
    signal?: AbortSignal,
  ): Promise<Sample | null> {
    const start = depth + promptTokens;
    const all = Array.from({ length: sequences }, () => this.#prompts(Math.max(1, start)));
    const prefill = async (begin: number, end: number) => {
      let ms = 0;
      for (const [i, tokens] of all.entries()) ms += await this.#prefill(tokens.slice(begin, end), i, begin, signal);
      return ms;
    };
    await prefill(0, depth);
    const before = this.#engine.counters();
    let ms = await prefill(depth, start);
    const latenciesMs: number[] = [];
    for (let position = start; position < start + generatedTokens && !signal?.aborted; position++) {
      const beginMs = performance.now();
      const tokens = Int32Array.from(all, ([first], sequence) => (position === 0 ? first : this.#choose(sequence)));
      const chosenMs = performance.now();
      const runs = all.map((_, sequence) => ({ sequence, position, count: 1 }));
      const latency = await this.#step(tokens, runs, this.#logits, false);
      latenciesMs.push(latency);
      ms += latency;
      this.#onSpans?.([
        { name: 'token', beginMs, endMs: chosenMs + latency },
        { name: 'sampling', beginMs, endMs: chosenMs },
      ]);
    }
    return signal?.aborted ? null : { ms, latenciesMs, before, after: this.#engine.counters() };
  }

  async #prefill(tokens: readonly number[], sequence: number, begin: number, signal?: AbortSignal): Promise<number> {
    const { batchSize } = this.#engine;
    let ms = 0;
    for (let done = 0; done < tokens.length && !signal?.aborted; done += batchSize) {
      const beginMs = performance.now();
      const batch = Int32Array.from(tokens.slice(done, done + batchSize));
      const run = { sequence, position: begin + done, count: batch.length };
      const batchMs = await this.#step(batch, [run], this.#logitsOf(sequence), true);
      ms += batchMs;
      this.#onSpans?.([{ name: 'prompt', beginMs, endMs: beginMs + batchMs }]);
    }
    return ms;
  }

  async #step(tokens: Int32Array, runs: SequenceRun[], logits: Float32Array, prompt: boolean): Promise<number> {
    const start = performance.now();
    // As `run` computes prompts.
    await this.#engine.stepRuns(tokens, runs, logits, { exact: prompt, prompt });
    return performance.now() - start;
  }

  #choose(sequence: number): number {
    return sampleToken(this.#logitsOf(sequence), SAMPLING_DEFAULTS, [], this.#random);
  }

  #logitsOf(sequence: number): Float32Array {
    const { vocabSize } = this.#engine;
    return this.#logits.subarray(sequence * vocabSize, (sequence + 1) * vocabSize);
  }
}

/**
 * Two states of the counters with everything between them that was counted in the samples: the first one's beginning, and that
 * plus what each sample added.
 */
export function joinCounters(samples: readonly Sample[]): Pick<Sample, 'before' | 'after'> {
  const [{ before }] = samples;
  return { before, after: samples.reduce((sum, sample) => addCounters(sum, sample.before, sample.after), before) };
}

/** `sum` with the difference between two states added to every count; what is no number is that of `after`. */
function addCounters<Counters extends object>(sum: Counters, before: Counters, after: Counters): Counters {
  const entries = Object.entries(after).map(([key, value]) => {
    const [summed, start] = [sum, before].map((counters) => counters[key as keyof Counters]);
    if (typeof value === 'number') return [key, (summed as number) + value - (start as number)];
    return [key, typeof value === 'object' ? addCounters(summed as object, start as object, value) : value];
  });
  return Object.fromEntries(entries);
}
