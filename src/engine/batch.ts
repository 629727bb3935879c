/** Sequences decoded together: they join and leave between steps, and each gets the tokens that it gets alone. */
import { Pi2Error } from '../base/error.js';
import type { BatchEngine } from './engine.js';
import { negativeLogLikelihood } from './evaluate.js';
import { requirePrompt, type StopReason } from './generate.js';
import type { Random } from './random.js';
import { type SamplingOptions, sampleToken } from './sampler.js';
import type { SpanListener, TimedSpan } from './timed-span.js';

/** How one text goes on from its prompt. */
export interface ContinuationOptions {
  /** Most tokens to generate, at least 1; positions are set aside for so many. */
  maxTokens: number;
  /** What is said of a text that reached `maxTokens`. Default: `length`. */
  limitReason?: StopReason;
  sampling: SamplingOptions;
  random: Random;
  /** A token that ends the text is not yielded. Empty to go on regardless. */
  endTokens: readonly number[];
  /** Whether the model's own log-probability of each token is summed up. */
  scored?: boolean;
}

/** A text that is generated beside others. Fills up while its decoder runs. */
export class Continuation {
  /** Generated so far. */
  readonly tokens: number[] = [];
  stopReason: StopReason = 'interrupted';
  /** From its first token on: time of the steps that it was part of, with the choices made then. */
  decodeMs = 0;
  readonly options: ContinuationOptions;
  /** The prompt and `tokens`. */
  readonly #text: number[];
  #logProbability = 0;

  constructor(prompt: readonly number[], options: ContinuationOptions) {
    this.#text = [...prompt];
    this.options = options;
  }

  /** Mean log-probability of its tokens under the model, before penalties and temperature; null without any or unasked. */
  get meanLogProbability(): number | null {
    const count = this.tokens.length;
    return this.options.scored && count > 0 ? this.#logProbability / count : null;
  }

  /** Chooses the next token from `logits`, which penalties change. Null when that ends the text. */
  choose(logits: Float32Array): number | null {
    const { sampling, random, endTokens, scored, maxTokens, limitReason = 'length' } = this.options;
    const unchanged = scored && sampling.repeatPenalty !== 1 ? logits.slice() : logits;
    const token = sampleToken(logits, sampling, this.#text, random);
    if (endTokens.includes(token)) {
      this.stopReason = 'end_token';
      return null;
    }
    if (scored) this.#logProbability -= negativeLogLikelihood(unchanged, token);
    this.tokens.push(token);
    this.#text.push(token);
    if (this.tokens.length >= maxTokens) this.stopReason = limitReason;
    return token;
  }
}

/** What a batch took. Clocks are monotonic. */
export interface BatchTimings {
  promptTokens: number;
  promptMs: number;
  /** From the first step to the first token that was chosen. */
  firstTokenMs: number;
  /** One for each decode step: its time and that of the choices from it. */
  stepsMs: number[];
  /** One for each decode step: sequences that it had a token of. */
  liveSizes: number[];
}

/** A generated token and whose it is. */
export interface BatchToken {
  continuation: Continuation;
  token: number;
}

interface Prompt {
  tokens: readonly number[];
  continuations: readonly Continuation[];
  /** Positions set aside: the prompt once, and what each continuation may add. */
  positions: number;
  /** Sequences of the continuations once it is admitted; the first computes the prompt. */
  sequences: number[];
  computed: number;
}

interface Live {
  prompt: Prompt;
  continuation: Continuation;
  sequence: number;
}

/**
 * Decodes several sequences together. A round is a piece of at most a batch of the oldest prompt that is not computed yet, and
 * then a token of each live sequence: whoever joins delays the others by one piece a round, and none of them waits for a whole
 * prompt. Prompts wait, in order, for as many free sequences as they have continuations and for the positions that these may
 * need: one that was let in never runs out of room. Continuations of one prompt share its keys and values.
 */
export class BatchDecoder {
  readonly timings: BatchTimings = { promptTokens: 0, promptMs: 0, firstTokenMs: 0, stepsMs: [], liveSizes: [] };
  readonly #engine: BatchEngine;
  readonly #onSpans: SpanListener | undefined;
  readonly #free: number[];
  #freePositions: number;
  readonly #waiting: Prompt[] = [];
  readonly #prefilling: Prompt[] = [];
  #live: Live[] = [];
  readonly #logits: Float32Array;
  #start = 0;

  /** The engine's sequences must be empty. `onSpans` is for a trace. */
  constructor(engine: BatchEngine, onSpans?: SpanListener) {
    this.#engine = engine;
    this.#onSpans = onSpans;
    this.#free = Array.from({ length: engine.sequences }, (_, sequence) => sequence);
    this.#freePositions = engine.contextLength;
    this.#logits = new Float32Array(engine.sequences * engine.vocabSize);
  }

  /**
   * A prompt joins, with its continuations; between tokens, at any time. Throws `Pi2Error`: E_USAGE, E_EMPTY_PROMPT or
   * E_CONTEXT_FULL for a prompt that the engine cannot have, alone or with so many continuations.
   */
  join(tokens: readonly number[], options: readonly ContinuationOptions[]): readonly Continuation[] {
    const { contextLength, sequences } = this.#engine;
    requirePrompt(tokens, this.#engine);
    if (options.length < 1 || options.length > sequences) {
      throw new Pi2Error(
        'E_USAGE',
        `${options.length} continuations of a prompt: the engine was opened for ${sequences} sequences`,
        `ask for 1 to ${sequences}`,
      );
    }
    const positions = options.reduce((sum, { maxTokens }) => sum + maxTokens, tokens.length);
    if (!(positions <= contextLength)) {
      throw new Pi2Error(
        'E_CONTEXT_FULL',
        `the prompt and its continuations may take ${positions} positions, the context has ${contextLength}`,
        'generate fewer tokens with -n, or give a larger context with -c',
      );
    }
    const continuations = options.map((each) => new Continuation(tokens, each));
    this.#waiting.push({ tokens, continuations, positions, sequences: [], computed: 0 });
    return continuations;
  }

  /** The tokens of all continuations, as they are chosen, until none is left or `signal` is aborted. Iterate once at a time. */
  async *tokens(signal?: AbortSignal): AsyncGenerator<BatchToken, void, undefined> {
    this.#start = performance.now();
    try {
      while (!signal?.aborted) {
        this.#admit();
        if (this.#prefilling.length === 0 && this.#live.length === 0) return;
        if (this.#prefilling.length > 0) yield* await this.#prefill(this.#prefilling[0]);
        if (this.#live.length > 0 && !signal?.aborted) yield* await this.#decode();
      }
    } finally {
      // Nothing is left behind by whoever stopped listening.
      for (const { sequences } of this.#prefilling.splice(0)) for (const one of sequences) this.#leave(one);
      for (const { sequence } of this.#live.splice(0)) this.#leave(sequence);
      this.#waiting.splice(0);
      this.#freePositions = this.#engine.contextLength;
    }
  }

  #admit(): void {
    for (let [next] = this.#waiting; next !== undefined; [next] = this.#waiting) {
      if (next.continuations.length > this.#free.length || next.positions > this.#freePositions) return;
      this.#waiting.shift();
      next.sequences = this.#free.splice(0, next.continuations.length);
      this.#freePositions -= next.positions;
      this.#prefilling.push(next);
    }
  }

  /** A piece of a prompt, exactly (paper section 1.2); behind its last one the first tokens of its continuations. */
  async #prefill(prompt: Prompt): Promise<BatchToken[]> {
    const { tokens, computed, sequences, continuations } = prompt;
    const piece = Int32Array.from(tokens.slice(computed, computed + this.#engine.batchSize));
    const run = { sequence: sequences[0], position: computed, count: piece.length };
    const row = this.#logits.subarray(0, this.#engine.vocabSize);
    const beginMs = performance.now();
    await this.#engine.stepRuns(piece, [run], row, { exact: true, prompt: true });
    const endMs = performance.now();
    this.timings.promptTokens += piece.length;
    this.timings.promptMs += endMs - beginMs;
    prompt.computed += piece.length;
    const spans: TimedSpan[] = [{ name: 'prompt', beginMs, endMs }];
    if (prompt.computed < tokens.length) {
      this.#onSpans?.(spans);
      return [];
    }
    this.#prefilling.shift();
    // What the prompt gives is shared, keys and values and the logits of its last token.
    for (const sequence of sequences.slice(1)) this.#engine.fork(sequences[0], sequence, tokens.length);
    const begun = continuations.map((continuation, i) => ({ prompt, continuation, sequence: sequences[i] }));
    this.#live.push(...begun);
    const chosen = begun.flatMap((one) => this.#choose(one, row.slice()));
    if (this.timings.firstTokenMs === 0) this.timings.firstTokenMs = performance.now() - this.#start;
    this.#onSpans?.([...spans, { name: 'sampling', beginMs: endMs, endMs: performance.now() }]);
    return chosen;
  }

  /** A token of each live sequence. */
  async #decode(): Promise<BatchToken[]> {
    const live = [...this.#live];
    const { vocabSize } = this.#engine;
    const tokens = Int32Array.from(live, ({ continuation }) => continuation.tokens.at(-1) as number);
    const runs = live.map(({ prompt, continuation, sequence }) => {
      return { sequence, position: prompt.tokens.length + continuation.tokens.length - 1, count: 1 };
    });
    const beginMs = performance.now();
    await this.#engine.stepRuns(tokens, runs, this.#logits);
    const computedMs = performance.now();
    const chosen = live.flatMap((one, i) =>
      this.#choose(one, this.#logits.subarray(i * vocabSize, (i + 1) * vocabSize)),
    );
    const endMs = performance.now();
    for (const { continuation } of live) continuation.decodeMs += endMs - beginMs;
    this.timings.stepsMs.push(endMs - beginMs);
    this.timings.liveSizes.push(live.length);
    this.#onSpans?.([
      { name: 'token', beginMs, endMs },
      { name: 'sampling', beginMs: computedMs, endMs },
    ]);
    return chosen;
  }

  /** Lets a continuation take its next token; one that has ended leaves. */
  #choose(live: Live, logits: Float32Array): BatchToken[] {
    const { prompt, continuation, sequence } = live;
    const token = continuation.choose(logits);
    if (continuation.stopReason !== 'interrupted') {
      this.#live.splice(this.#live.indexOf(live), 1);
      this.#leave(sequence);
      this.#freePositions += continuation.options.maxTokens;
      if (!this.#live.some((other) => other.prompt === prompt)) this.#freePositions += prompt.tokens.length;
    }
    return token === null ? [] : [{ continuation, token }];
  }

  #leave(sequence: number): void {
    this.#engine.release(sequence);
    this.#free.push(sequence);
  }
}
