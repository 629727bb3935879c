import { loadAddon } from '../src/engine/addon.js';
import type { EngineCounters, KernelSet } from '../src/engine/contract.js';
import { Engine } from '../src/engine/engine.js';
import { Generation } from '../src/engine/generate.js';
import { type Random, seededRandom } from '../src/engine/random.js';
import { SAMPLING_DEFAULTS } from '../src/engine/sampler.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { OthersMeter } from './others.js';

/** Far beyond any cache: the probe must read memory. */
const PROBE_BYTES = 1024 ** 3;
/** Tokens of the run before the first measurement: it touches every weight and wakes the threads. */
const WARM_UP_TOKENS = 4;
const PROMPT_SEED = 1;

export interface MeasureOptions {
  promptTokens: number;
  generatedTokens: number;
  repetitions: number;
  /** 0 takes all cores. */
  threads: number;
  kernelSet?: KernelSet;
}

/** One test of a model, a number for each repetition. */
export interface TestResult {
  /** `pp512`: a prompt of 512 tokens, batched; `tg128`: 128 tokens one after another, the choice of each included. */
  test: string;
  tokensPerSecond: number[];
  weightBytesPerToken: number;
  kvBytesPerToken: number;
  /** Of the FFN's neurons, those that fired. */
  firedShare: number;
}

export interface ModelResult {
  model: string;
  quantization: string;
  threads: number;
  kernelSet: KernelSet;
  loadMs: number;
  /** Held by the engine: weights, KV cache, scratch. */
  engineBytes: number;
  /** Bytes a second that the same threads read from memory: before, between and after the repetitions. */
  bandwidths: number[];
  /** Share of the cores that other processes took meanwhile; null where unknown. */
  othersShare: number | null;
  tests: TestResult[];
}

/** Measures prefill and decode of the model in `directory`, in turn with the bandwidth of memory. Throws `Pi2Error`. */
export async function measureModel(directory: string, options: MeasureOptions): Promise<ModelResult> {
  const model = await openModelDirectory(directory);
  const { promptTokens, generatedTokens, repetitions, threads, kernelSet } = options;
  const context = Math.max(promptTokens, generatedTokens, WARM_UP_TOKENS) + 2;
  const engine = await Engine.open(model, { context, threads, kernelSet });
  try {
    const bench = new Bench(engine);
    const tests = [
      { name: `pp${promptTokens}`, tokens: promptTokens, run: () => bench.prefill(promptTokens) },
      { name: `tg${generatedTokens}`, tokens: generatedTokens, run: () => bench.decode(generatedTokens) },
    ].filter(({ tokens }) => tokens > 0);
    const samples = new Map<string, Sample[]>(tests.map(({ name }) => [name, []]));
    await bench.decode(WARM_UP_TOKENS);
    const others = new OthersMeter();
    const bandwidths = [await bench.bandwidth()];
    for (let i = 0; i < repetitions; i++) {
      for (const { name, run } of tests) samples.get(name)?.push(await run());
      bandwidths.push(await bench.bandwidth());
    }
    const { weightBytes, kvBytes, scratchBytes } = engine.counters();
    return {
      model: model.manifest.name,
      quantization: model.manifest.quantization.name,
      threads: engine.threads,
      kernelSet: engine.kernelSet,
      loadMs: engine.loadMs,
      engineBytes: weightBytes + kvBytes + scratchBytes,
      bandwidths,
      othersShare: others.share(),
      tests: [...samples].map(([test, runs]) => summarizeTest(test, runs)),
    };
  } finally {
    await engine.close();
  }
}

/** A timed run and what the engine counted meanwhile. */
interface Sample {
  tokens: number;
  ms: number;
  before: EngineCounters;
  after: EngineCounters;
}

class Bench {
  readonly #engine: Engine;
  readonly #random: Random = seededRandom(PROMPT_SEED);

  constructor(engine: Engine) {
    this.#engine = engine;
  }

  bandwidth(): Promise<number> {
    return loadAddon().measureReadBandwidth({ threads: this.#engine.threads, bytes: PROBE_BYTES });
  }

  /** The time of a prompt of random tokens, from an empty cache. */
  async prefill(tokens: number): Promise<Sample> {
    const { generation, before } = await this.#generate(tokens, 0);
    return { tokens, ms: generation.timings.promptMs, before, after: this.#engine.counters() };
  }

  /** The time of `tokens` greedy tokens after a prompt of one. */
  async decode(tokens: number): Promise<Sample> {
    const { generation, before } = await this.#generate(1, tokens + 1);
    const ms = generation.timings.latenciesMs.reduce((total, latency) => total + latency, 0);
    return { tokens, ms, before, after: this.#engine.counters() };
  }

  async #generate(promptTokens: number, maxTokens: number) {
    const before = this.#engine.counters();
    const prompt = Array.from({ length: promptTokens }, () => Math.floor(this.#random() * this.#engine.vocabSize));
    const sampling = { ...SAMPLING_DEFAULTS, temperature: 0 };
    const generation = new Generation(this.#engine, {
      prompt,
      maxTokens,
      sampling,
      random: this.#random,
      endTokens: [],
    });
    for await (const _ of generation.tokens());
    return { generation, before };
  }
}

/** Bytes are of all tokens that were computed, the prompt of one of a decode test included: it reads what the others read. */
function summarizeTest(test: string, samples: Sample[]): TestResult {
  const counted = (key: Exclude<keyof EngineCounters, 'stream' | 'predictor'>) =>
    samples.reduce((total, { before, after }) => total + after[key] - before[key], 0);
  return {
    test,
    tokensPerSecond: samples.map(({ tokens, ms }) => (1000 * tokens) / ms),
    weightBytesPerToken: counted('weightBytesRead') / counted('tokens'),
    kvBytesPerToken: counted('kvBytesRead') / counted('tokens'),
    firedShare: counted('neuronsFired') / counted('neuronsSeen'),
  };
}
