import { Pi2Error } from '../base/error.js';
import type { StepEngine } from './engine.js';
import type { Random } from './random.js';
import { type SamplingOptions, sampleToken } from './sampler.js';
import type { SpanListener } from './timed-span.js';

export interface GenerateOptions {
  /** Token ids of the prompt, checked by `requirePrompt`. */
  prompt: readonly number[];
  /** Most tokens to generate; -1 goes on until an end token or a full context. */
  maxTokens: number;
  sampling: SamplingOptions;
  random: Random;
  /** A token that ends the text is not yielded. Empty to go on regardless. */
  endTokens: readonly number[];
  signal?: AbortSignal;
  /** For a trace. */
  onSpans?: SpanListener;
}

/** Why generation ended: an end token, `maxTokens`, a full context, an abort. */
export type StopReason = 'end_token' | 'length' | 'context' | 'interrupted';

/**
 * What a generation took. Clocks are monotonic. Prompt time begins with the first step over the prompt (tokenizing and loading
 * are not in it) and ends when all of it is computed; the time to the first token begins there too and ends when that token is
 * chosen. The latency of each later token is its step and its choice, without what the consumer did in between.
 */
export interface GenerationTimings {
  promptTokens: number;
  promptMs: number;
  generatedTokens: number;
  firstTokenMs: number;
  /** One for each generated token but the first. */
  latenciesMs: number[];
}

/** One run of prompt and continuation. Iterate `tokens()` once; `timings` and `stopReason` fill up meanwhile. */
export class Generation {
  readonly timings: GenerationTimings;
  stopReason: StopReason = 'interrupted';
  readonly #engine: StepEngine;
  readonly #options: GenerateOptions;
  readonly #logits: Float32Array;

  constructor(engine: StepEngine, options: GenerateOptions) {
    requirePrompt(options.prompt, engine);
    this.#engine = engine;
    this.#options = options;
    this.#logits = new Float32Array(engine.vocabSize);
    const promptTokens = options.prompt.length;
    this.timings = { promptTokens, promptMs: 0, generatedTokens: 0, firstTokenMs: 0, latenciesMs: [] };
  }

  /** The generated token ids, each as soon as it is chosen. */
  async *tokens(): AsyncGenerator<number, void, undefined> {
    const { prompt, maxTokens, signal } = this.#options;
    const { timings } = this;
    const start = performance.now();
    if (!(await this.#prefill())) return;
    timings.promptMs = performance.now() - start;
    const text = [...prompt];
    const limit = maxTokens < 0 ? Number.POSITIVE_INFINITY : maxTokens;
    for (let stepStart = start; ; stepStart = performance.now()) {
      if (timings.generatedTokens >= limit) return this.#stop('length');
      if (text.length >= this.#engine.contextLength) return this.#stop('context');
      if (signal?.aborted) return this.#stop('interrupted');
      const first = timings.generatedTokens === 0;
      if (!first) await this.#engine.step(Int32Array.of(text[text.length - 1]), text.length - 1, this.#logits);
      const computed = performance.now();
      const token = sampleToken(this.#logits, this.#options.sampling, text, this.#options.random);
      const chosen = performance.now();
      const elapsed = chosen - stepStart;
      this.#options.onSpans?.([
        { name: first ? 'prompt' : 'token', beginMs: stepStart, endMs: chosen },
        { name: 'sampling', beginMs: computed, endMs: chosen },
      ]);
      if (this.#options.endTokens.includes(token)) return this.#stop('end_token');
      if (first) timings.firstTokenMs = elapsed;
      else timings.latenciesMs.push(elapsed);
      timings.generatedTokens++;
      text.push(token);
      yield token;
    }
  }

  /** Computes the prompt in batches, exactly (paper section 1.2); false when aborted between two of them. */
  async #prefill(): Promise<boolean> {
    const { prompt, signal } = this.#options;
    const { batchSize } = this.#engine;
    for (let position = 0; position < prompt.length; position += batchSize) {
      if (signal?.aborted) return false;
      const batch = Int32Array.from(prompt.slice(position, position + batchSize));
      await this.#engine.step(batch, position, this.#logits, { exact: true, prompt: true });
    }
    return true;
  }

  #stop(reason: StopReason): void {
    this.stopReason = reason;
  }
}

/** Refuses a prompt that is empty, that leaves no room for a token, or that names tokens the model has not. */
export function requirePrompt(prompt: readonly number[], model: Pick<StepEngine, 'contextLength' | 'vocabSize'>): void {
  requireTokens(prompt, model.vocabSize);
  if (prompt.length >= model.contextLength) {
    throw new Pi2Error(
      'E_CONTEXT_FULL',
      `the prompt has ${prompt.length} tokens, the context ${model.contextLength}: no room for an answer`,
      'shorten the prompt, or give a larger context with -c',
    );
  }
}

/** Refuses an empty list of tokens, and ids that the vocabulary does not have. */
export function requireTokens(tokens: readonly number[], vocabSize: number): void {
  if (tokens.length === 0)
    throw new Pi2Error('E_EMPTY_PROMPT', 'the prompt is empty', 'give -p TEXT, -f FILE or --tokens 1,2,3');
  const at = tokens.findIndex((id) => id < 0 || id >= vocabSize);
  if (at >= 0) {
    throw new Pi2Error(
      'E_USAGE',
      `token ${tokens[at]} (number ${at + 1} of the prompt) is not in the vocabulary of ${vocabSize}`,
      `give ids from 0 to ${vocabSize - 1}`,
    );
  }
}
