import { Pi2Error } from '../base/error.js';
import { resetPeakMemory } from '../base/memory.js';
import type { Engine, EngineOptions } from '../engine/engine.js';
import { seededRandom } from '../engine/random.js';
import type { TimedSpan } from '../engine/timed-span.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { measureRoof } from '../report/roofline.js';
import type { TraceFile } from '../trace/trace-file.js';
import { type BenchRow, benchRow } from './row.js';
import {
  type BenchTest,
  joinCounters,
  randomPrompts,
  type Sample,
  TestRunner,
  testName,
  testPositions,
} from './runner.js';

/** A row to be measured. */
export interface BenchCase {
  model: ModelDirectory;
  test: BenchTest;
  options: Omit<EngineOptions, 'context'>;
  /** `--memory` as it was given. */
  memory: string | null;
}

export interface BenchSettings {
  repetitions: number;
  /** Whether each test is run once before it is timed: pages are touched, threads awake, the neuron cache is warm. */
  warmUp: boolean;
  seed: number;
  /** Text for prompts, of each model; null: random tokens. */
  text: ((model: ModelDirectory) => Promise<number[]>) | null;
  open(model: ModelDirectory, options: EngineOptions): Promise<Engine>;
  signal: AbortSignal;
  /** Gets all timed runs. */
  trace: TraceFile | null;
}

/**
 * Measures one case on an engine of its own, opened for just the positions that the test fills. Null when interrupted. Throws
 * what opening and computing throw, and E_USAGE for a text that is too short.
 */
export async function measureCase(
  { model, test, options, memory }: BenchCase,
  { repetitions, warmUp, seed, text, open, signal, trace }: BenchSettings,
): Promise<BenchRow | null> {
  const { bos_token_id, vocab_size } = model.manifest.hyperparameters;
  const random = seededRandom(seed);
  const prompts = text
    ? textPrompts(await text(model), test)
    : randomPrompts(vocab_size, bos_token_id, seededRandom(seed + 1));
  const hasOwnPeak = resetPeakMemory();
  const engine = await open(model, { ...options, context: testPositions(test), sequences: test.sequences });
  try {
    // What the warm-up traces is dropped.
    let isTimed = false;
    const onSpans = (spans: readonly TimedSpan[]) => (isTimed ? trace?.add(spans, engine) : engine.takeTrace());
    const runner = new TestRunner(engine, prompts, random, trace === null ? undefined : onSpans);
    if (warmUp) await runner.run(test, signal);
    isTimed = true;
    trace?.beginEngine(`${model.manifest.name} ${testName(test)}`, engine);
    const startedAt = new Date();
    const samples: Sample[] = [];
    for (let i = 0; i < repetitions; i++) {
      const sample = await runner.run(test, signal);
      if (sample === null) return null;
      samples.push(sample);
    }
    const { before, after } = joinCounters(samples);
    const roof = await measureRoof(engine, before, after);
    return benchRow({ model, engine, test, samples, startedAt, memory, hasOwnPeak, roof });
  } finally {
    await engine.close();
  }
}

function textPrompts(tokens: readonly number[], test: BenchTest): (count: number) => number[] {
  return (count) => {
    if (tokens.length >= count) return tokens.slice(0, count);
    throw new Pi2Error(
      'E_USAGE',
      `the text has ${tokens.length} tokens, ${testName(test)} takes ${count}`,
      'give a longer text with -f, or fewer tokens with -p and -d',
    );
  };
}
