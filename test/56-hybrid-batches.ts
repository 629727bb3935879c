// Sequences that join and leave beside a dense unit: the hot ratio follows their number at that very step.
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { convert } from '../converter/convert.js';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest, NativeEngine } from '../src/engine/contract.js';
import { Engine, type EngineOptions } from '../src/engine/engine.js';
import { likeliest } from '../src/engine/sampler.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { findOnnxruntime } from '../src/npu/onnxruntime-library.js';
import { clusterEnd } from '../src/plan/hot-ratio.js';
import { oneRun } from './support/one-run.js';
import { REPOSITORY } from './support/shared.js';

const addon = loadAddon();
const directory = join(t.testdir(), 'demo.pi2');

/** Clusters that are the unit's, of 1 to 4 tokens computed together and of a chunk of a prompt. */
const SCHEDULE = [1, 4, 8, 6, 0];
/** Which sequences are live at each step of decoding; one that was not at the step before begins with its prompt. */
const LIVE = [
  [0],
  [0],
  [0, 1],
  [0, 1, 2, 3],
  [0, 1, 2, 3],
  [0, 2, 3],
  [2],
  [2],
  [2, 1],
  [2, 1, 0, 3],
  [1],
  [1, 3, 0],
  [0],
];
const PROMPTS = [
  [1, 420, 439, 264, 299, 1057, 12, 77],
  [1, 300, 55, 91, 17],
  [1, 9, 18, 27, 36, 45, 54],
  [1, 77, 12, 8, 99, 1000],
];

/** The request that opening the model would send, with the schedule above in place of one ratio for all. */
async function requestOf(options: Partial<EngineOptions>): Promise<EngineRequest> {
  let captured: EngineRequest | undefined;
  const openEngine = (request: EngineRequest) => {
    captured = request;
    return addon.openEngine(request);
  };
  const model = await openModelDirectory(directory);
  const engine = await Engine.open(
    model,
    { context: 512, sequences: 4, threads: 2, hotRatio: 1, ...options },
    { ...addon, openEngine },
  );
  await engine.close();
  const request = captured as EngineRequest;
  return { ...request, unit: request.unit && { ...request.unit, clusters: SCHEDULE } };
}

/** The greedy texts of a script's sequences, each from its prompt on, decoded together. `watch` sees each step of decoding. */
async function decode(engine: NativeEngine, vocabSize: number, live: number[][], watch: (count: number) => void) {
  const texts: { sequence: number; tokens: number[] }[] = [];
  const running = new Map<number, { next: number; position: number; tokens: number[] }>();
  for (const now of live) {
    for (const sequence of [...running.keys()].filter((sequence) => !now.includes(sequence))) {
      running.delete(sequence);
      engine.release({ sequence });
    }
    for (const sequence of now) {
      if (running.has(sequence)) continue;
      const logits = new Float32Array(vocabSize);
      const { tokens, runs } = oneRun(Int32Array.from(PROMPTS[sequence]), 0);
      await engine.step({ tokens, runs: [{ ...runs[0], sequence }], logits, all: false, exact: true, prompt: true });
      const text = { sequence, tokens: [] as number[] };
      texts.push(text);
      running.set(sequence, { next: likeliest(logits), position: PROMPTS[sequence].length, tokens: text.tokens });
    }
    const states = now.map((sequence) => running.get(sequence) as { next: number; position: number; tokens: number[] });
    const logits = new Float32Array(now.length * vocabSize);
    await engine.step({
      tokens: Int32Array.from(states, ({ next }) => next),
      runs: now.map((sequence, i) => ({ sequence, position: states[i].position, count: 1 })),
      logits,
      all: false,
    });
    for (const [i, state] of states.entries()) {
      state.tokens.push(state.next);
      state.next = likeliest(logits.subarray(i * vocabSize, (i + 1) * vocabSize));
      state.position++;
    }
    watch(now.length);
  }
  return texts;
}

async function check(t: Test, options: Partial<EngineOptions>): Promise<void> {
  const request = await requestOf(options);
  const banks = request.expertOffsets.length;
  const alone = await addon.openEngine({ ...request, unit: undefined });
  const expected = await decode(alone, request.vocabSize, LIVE, () => {});
  await alone.close();

  const engine = await addon.openEngine(request);
  const unit = () => engine.counters().unit as NonNullable<ReturnType<NativeEngine['counters']>['unit']>;
  const bytes = () => {
    const { weightBytes, kvBytes, scratchBytes, unitBytes } = engine.counters();
    return [weightBytes, kvBytes, scratchBytes, unitBytes];
  };
  const held = bytes();
  let before = unit();
  const found = await decode(engine, request.vocabSize, LIVE, (count) => {
    const now = unit();
    const neurons = count * banks * clusterEnd(SCHEDULE[count - 1], request.neuronCount);
    t.equal(now.neurons - before.neurons, neurons, `${count} live: the unit computes the clusters of ${count}`);
    t.equal(now.jobs - before.jobs, banks, 'of every bank');
    t.ok(now.activations - before.activations <= 1, 'with one change of graphs at most');
    t.strictSame(bytes(), held, 'no memory is taken or given back');
    before = now;
  });
  await engine.close();
  t.strictSame(found, expected, 'the texts are those of the CPU alone');
}

t.before(async () => {
  const checkpoint = join(REPOSITORY, 'demo', 'stories-drelu');
  const request = {
    checkpoint,
    output: directory,
    quantization: 'q4',
    maxMemoryBytes: 2 ** 31,
    npu: true,
    force: true,
  } as const;
  await convert(request, () => {}, new AbortController().signal);
});

t.test('threads of the host, everything in memory', (t) => check(t, { npu: 'host' }));
t.test('threads of the host, neurons on flash', (t) => check(t, { npu: 'host', loadMode: 'direct' }));
const skip = findOnnxruntime().includes('/') ? false : 'the package onnxruntime-node is not installed';
t.test('ONNX Runtime, everything in memory', { skip }, (t) => check(t, { npu: 'onnxruntime' }));
t.test('ONNX Runtime, neurons on flash', { skip }, (t) => check(t, { npu: 'onnxruntime', loadMode: 'direct' }));
