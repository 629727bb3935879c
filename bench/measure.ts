import { type BenchTest, joinCounters, randomPrompts, type Sample, TestRunner, testName } from '../src/bench/runner.js';
import type { KernelSet } from '../src/engine/contract.js';
import type { EngineCounters } from '../src/engine/counters.js';
import { Engine } from '../src/engine/engine.js';
import { seededRandom } from '../src/engine/random.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { OthersMeter } from './others.js';

/** The run before the first measurement: it touches every weight and wakes the threads. */
const WARM_UP: BenchTest = { promptTokens: 0, generatedTokens: 4, depth: 0, sequences: 1 };
const SEED = 1;

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
  /** As `powerinfer2 bench` names them: `pp512`, `tg128`. */
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
  /** Bytes a second that the same threads read from these weights: before, between and after the repetitions. */
  bandwidths: number[];
  /** Share of the cores that other processes took meanwhile; null where unknown. */
  othersShare: number | null;
  tests: TestResult[];
}

/**
 * Measures prefill and decode of the model in `directory`, all of it in memory, in turn with the bandwidth of memory. Throws
 * `Pi2Error`.
 */
export async function measureModel(directory: string, options: MeasureOptions): Promise<ModelResult> {
  const model = await openModelDirectory(directory);
  const { promptTokens, generatedTokens, repetitions, threads, kernelSet } = options;
  const context = Math.max(promptTokens, generatedTokens, WARM_UP.generatedTokens);
  const engine = await Engine.open(model, { context, threads, kernelSet, loadMode: 'resident' });
  try {
    const { bos_token_id, vocab_size } = model.manifest.hyperparameters;
    const prompts = randomPrompts(vocab_size, bos_token_id, seededRandom(SEED));
    const runner = new TestRunner(engine, prompts, seededRandom(SEED));
    const bandwidth = async () => (await engine.measureBandwidths(0)).memory as number;
    const run = async (test: BenchTest) => (await runner.run(test)) as Sample;
    const tests = [
      { promptTokens, generatedTokens: 0, depth: 0, sequences: 1 },
      { promptTokens: 0, generatedTokens, depth: 0, sequences: 1 },
    ].filter((test) => test.promptTokens + test.generatedTokens > 0);
    const samples = new Map<BenchTest, Sample[]>(tests.map((test) => [test, []]));
    await run(WARM_UP);
    const others = new OthersMeter();
    const bandwidths = [await bandwidth()];
    for (let i = 0; i < repetitions; i++) {
      for (const [test, done] of samples) done.push(await run(test));
      bandwidths.push(await bandwidth());
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
      tests: [...samples].map(([test, done]) => summarizeTest(test, done)),
    };
  } finally {
    await engine.close();
  }
}

function summarizeTest(test: BenchTest, samples: readonly Sample[]): TestResult {
  const { before, after } = joinCounters(samples);
  const counted = (key: Exclude<keyof EngineCounters, 'stream' | 'predictor' | 'unit'>) => after[key] - before[key];
  return {
    test: testName(test),
    tokensPerSecond: samples.map(({ ms }) => (1000 * (test.promptTokens + test.generatedTokens)) / ms),
    weightBytesPerToken: counted('weightBytesRead') / counted('tokens'),
    kvBytesPerToken: counted('kvBytesRead') / counted('tokens'),
    firedShare: counted('neuronsFired') / counted('neuronsSeen'),
  };
}
