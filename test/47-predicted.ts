// Predicted mode: neurons that a predictor leaves out are not computed, all others as in exact mode, on every path.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import t from 'tap';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest, PredictorRequest, StreamRequest } from '../src/engine/contract.js';
import type { EngineCounters } from '../src/engine/counters.js';
import { Engine } from '../src/engine/engine.js';
import type { QuantizationName } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { Oracle } from './oracle/forward.js';
import { decodedWeights } from './support/decoded-weights.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY, makeModel } from './support/models.js';
import { oneRun } from './support/one-run.js';
import { type RandomPredictorOptions, randomPredictor, scoreFunction } from './support/predictor.js';

const addon = loadAddon();
const scratch = t.testdir();
const TOKENS = Array.from({ length: 24 }, (_, i) => (i * 41 + 7) % MODEL_VOCABULARY);

const MODELS: [CheckpointOptions, QuantizationName, RandomPredictorOptions][] = [
  [{ family: 'bamboo', hidden: 160, heads: 5, neurons: 700 }, 'f16', { encoding: 'f16', input: 'residual' }],
  [{ family: 'turbosparsemixtral', hidden: 192, headDim: 32, neurons: 300, experts: 5 }, 'q8', { input: 'residual' }],
  [{ family: 'sparsellama', hidden: 96, neurons: 257 }, 'q4', { encoding: 'q4', rank: 300 }],
  [{ family: 'turbosparsemixtral', hidden: 96, neurons: 130, experts: 3 }, 'q4', { encoding: 'q8' }],
  [{ family: 'opt', hidden: 320, heads: 5, neurons: 390 }, 'q8', { encoding: 'q4', rank: 1 }],
];

/** The request that opening a model would send, everything in memory. */
async function requestOf(directory: string): Promise<EngineRequest> {
  let captured: EngineRequest | undefined;
  const openEngine = (request: EngineRequest) => {
    captured = request;
    return addon.openEngine(request);
  };
  const model = await openModelDirectory(directory);
  const engine = await Engine.open(model, { context: 64, threads: 2, loadMode: 'resident' }, { ...addon, openEngine });
  await engine.close();
  return captured as EngineRequest;
}

interface Run {
  logits: Float32Array;
  counters: EngineCounters;
}

/** Logits of all tokens, computed in steps of `piece`. */
async function run(request: EngineRequest, piece = TOKENS.length, exact = false): Promise<Run> {
  const engine = await addon.openEngine(request);
  try {
    const { vocabSize } = request;
    const logits = new Float32Array(TOKENS.length * vocabSize);
    for (let position = 0; position < TOKENS.length; position += piece) {
      const tokens = Int32Array.from(TOKENS.slice(position, position + piece));
      const rows = logits.subarray(position * vocabSize, (position + tokens.length) * vocabSize);
      await engine.step({ ...oneRun(tokens, position), logits: rows, all: true, exact });
    }
    return { logits, counters: engine.counters() };
  } finally {
    await engine.close();
  }
}

const sameBits = (a: Run, b: Run) => Buffer.from(a.logits.buffer).equals(Buffer.from(b.logits.buffer));

function withThresholds(predictor: PredictorRequest, memory: number, flash = memory): PredictorRequest {
  const fill = (value: number) => predictor.memoryThresholds.map(() => value);
  return { ...predictor, memoryThresholds: fill(memory), flashThresholds: fill(flash) };
}

/** Makes a model with a random predictor. */
async function make(i: number): Promise<{ directory: string; request: EngineRequest; predictor: PredictorRequest }> {
  const [options, quantization, predictorOptions] = MODELS[i];
  const directory = await makeModel(join(scratch, `model-${i}`), { ...options, seed: i + 1 }, quantization);
  const request = await requestOf(directory);
  const path = join(scratch, `predictor-${i}.bin`);
  return {
    directory,
    request,
    predictor: await randomPredictor(addon, request, path, { ...predictorOptions, seed: i }),
  };
}

t.test('in memory: what is left out is left out, everything else is exact, bit for bit', async (t) => {
  for (const i of MODELS.keys()) {
    const { request, predictor } = await make(i);
    const name = `${MODELS[i][0].family} ${MODELS[i][1]}`;
    const exact = await run(request);
    const open = (changed: PredictorRequest, threads = 2) => ({ ...request, threads, predictor: changed });

    const all = withThresholds(predictor, Number.NEGATIVE_INFINITY);
    t.ok(sameBits(await run(open(all)), exact), `${name}: with all neurons chosen it is exact mode`);
    t.ok(sameBits(await run(open(all), 1), exact), `${name}: token by token too`);
    const none = await run(open(withThresholds(predictor, Number.POSITIVE_INFINITY)));
    t.equal(none.counters.neuronsFired, 0, `${name}: with none chosen no neuron fires`);
    t.ok(sameBits(await run(open(predictor), 7, true), exact), `${name}: an exact step does not ask the predictor`);

    const predicted = await run(open(predictor));
    t.notOk(sameBits(predicted, exact), `${name}: a predictor changes the result`);
    t.ok(sameBits(await run(open(predictor, 1), 1), predicted), `${name}: one token or several, one thread or two`);
    t.ok(sameBits(await run(open(predictor, 3), 16), predicted), `${name}: three threads`);
    const { scored, chosen } = predicted.counters.predictor ?? { scored: 0, chosen: 0 };
    t.equal(scored, predicted.counters.neuronsSeen, `${name}: every neuron has a score`);
    t.ok(chosen > 0.2 * scored && chosen < 0.8 * scored, `${name}: ${chosen} of ${scored} are chosen`);

    const split = { ...withThresholds(predictor, Number.NEGATIVE_INFINITY, 0), flashFrom: 0 };
    t.ok(sameBits(await run(open(split)), predicted), `${name}: thresholds of flash from neuron 0 on`);
    const half = {
      ...withThresholds(predictor, 0, Number.POSITIVE_INFINITY),
      flashFrom: Math.floor(request.neuronCount / 2),
    };
    t.ok(
      (await run(open(half))).counters.neuronsFired < predicted.counters.neuronsFired,
      `${name}: from the middle on`,
    );
  }
});

/** Any plan of memory for whole neurons, any way to read. */
function anyStream(request: EngineRequest): fc.Arbitrary<Partial<EngineRequest>> {
  const n = request.neuronCount;
  const banks = request.expertOffsets.length;
  const counts = fc.array(fc.oneof(fc.constantFrom(0, 1, n), fc.nat(n)), { minLength: banks, maxLength: banks });
  return fc
    .record({
      hotNeurons: counts,
      coldSlots: counts,
      stagingBytes: fc.constantFrom(0, 40_000, 1 << 20),
      mode: fc.constantFrom('direct' as const, 'buffered' as const),
      backend: fc.constantFrom('threads' as const, 'uring' as const),
      lanes: fc.integer({ min: 1, max: 5 }),
      threads: fc.integer({ min: 1, max: 3 }),
      trial: fc.record({ delayUs: fc.constantFrom(0, 0, 0, 30) }),
      prefetchBytes: fc.constantFrom(0, 5000, 1 << 18),
      twoPhase: fc.boolean(),
      bundles: fc.boolean(),
      pipeline: fc.boolean(),
    })
    .map(({ threads, ...stream }) => ({
      threads,
      stream: { ...stream, residentGates: new Array<number>(banks).fill(0) },
    }));
}

t.test('streamed: with one threshold for memory and flash it is the resident result, bit for bit', async (t) => {
  for (const i of MODELS.keys()) {
    const { request, predictor } = await make(i);
    const exact = await run(request);
    const predicted = await run({ ...request, predictor });
    const all = withThresholds(predictor, Number.NEGATIVE_INFINITY);
    const property = fc.asyncProperty(anyStream(request), fc.constantFrom(1, 1, 9, 24), async (changes, piece) => {
      const streamed = { ...request, ...changes };
      t.ok(sameBits(await run({ ...streamed, predictor }, piece), predicted), 'predicted');
      t.ok(sameBits(await run({ ...streamed, predictor: all }, piece), exact), 'with all neurons chosen');
      t.ok(sameBits(await run({ ...streamed, predictor }, piece, true), exact), 'exact steps');
    });
    const { failed, counterexample, errorInstance } = await fc.check(property, { numRuns: 4 });
    t.notOk(failed, `${MODELS[i][0].family}: ${JSON.stringify(counterexample)} ${errorInstance}`);
  }
});

t.test('streamed: what is left out on flash depends on what is in memory, never on threads or time', async (t) => {
  for (const i of MODELS.keys()) {
    const { request, predictor } = await make(i);
    const higher = withThresholds(predictor, -0.5, 0.5);
    const property = fc.asyncProperty(anyStream(request), anyStream(request), async (first, second) => {
      const a = await run({ ...request, ...first, predictor: higher }, 1);
      const b = await run(
        { ...request, ...second, stream: { ...second.stream!, ...shapeOf(first) }, predictor: higher },
        1,
      );
      t.ok(sameBits(a, b), 'same plan, same bits');
      const { stream, predictor: guesses } = a.counters;
      const { hotHits = 0, coldHits = 0, misses = 0 } = stream ?? {};
      t.equal(guesses?.chosen, hotHits + coldHits + misses, 'every chosen neuron is found or missing');
    });
    const { failed, counterexample, errorInstance } = await fc.check(property, { numRuns: 3 });
    t.notOk(failed, `${MODELS[i][0].family}: ${JSON.stringify(counterexample)} ${errorInstance}`);
  }
});

/** What decides which neurons are in memory: rounds are as long as staging is large. */
function shapeOf({ stream }: Partial<EngineRequest>) {
  const { hotNeurons, coldSlots, stagingBytes, bundles, pipeline } = stream as StreamRequest;
  return { hotNeurons, coldSlots, stagingBytes, bundles, pipeline };
}

t.test('streamed: a read that fails or ends early in either phase: words, and the next step is right', async (t) => {
  const { request, predictor } = await make(0);
  const banks = request.expertOffsets.length;
  const fill = (count: number) => new Array<number>(banks).fill(count);
  const stream = { residentGates: fill(0), hotNeurons: fill(50), coldSlots: fill(60), stagingBytes: 0 } as const;
  const expected = await run({ ...request, predictor });
  for (let number = 1; number < 400; number = number * 2 + 1) {
    for (const kind of ['failRead', 'shortRead']) {
      for (const backend of ['uring', 'threads'] as const) {
        const trial = { [kind]: number };
        const how = { ...stream, mode: 'direct', backend, lanes: 2, trial } as const;
        const engine = await addon.openEngine({ ...request, predictor, stream: how });
        let failures = 0;
        const logits = new Float32Array(TOKENS.length * request.vocabSize);
        for (let position = 0; position < TOKENS.length; ) {
          const row = logits.subarray(position * request.vocabSize, (position + 1) * request.vocabSize);
          try {
            await engine.step({ ...oneRun(Int32Array.of(TOKENS[position]), position), logits: row, all: false });
            position++;
          } catch (error) {
            failures++;
            t.match(error, { code: 'NATIVE_IO', message: /neurons\.bin/ });
          }
        }
        await engine.close();
        t.equal(failures, 1, `${backend}: ${kind} ${number} fails one step`);
        t.ok(sameBits({ logits, counters: expected.counters }, expected), 'the others are right');
      }
    }
  }
});

t.test('the oracle agrees with masks', async (t) => {
  for (const i of [0, 1]) {
    const { directory, request, predictor } = await make(i);
    const score = scoreFunction(addon, request, predictor);
    const checkpoint = await Checkpoint.open(directory.replace(/\.pi2$/, ''));
    const oracle = await Oracle.load(checkpoint, await decodedWeights(directory));
    await checkpoint.close();
    let chosen = 0;
    const sequence = oracle.sequence((layer, expert, x, residual) => {
      const scores = score(layer, expert, predictor.input === 'residual' ? residual : x);
      chosen += scores.filter((value) => value >= 0).length;
      return (neuron) => scores[neuron] >= 0;
    });
    const expected = TOKENS.map((token) => sequence.step(token));
    const predicted = await run({ ...request, predictor });
    const counted = predicted.counters.predictor?.chosen ?? 0;
    t.ok(Math.abs(counted - chosen) < 0.005 * chosen, `${counted} neurons are chosen, the oracle chooses ${chosen}`);
    const far = deviation(await run(request), expected);
    const near = deviation(predicted, expected);
    t.ok(near < 0.05 && near < far / 5, `logits differ by ${near} of their deviation, without a predictor by ${far}`);
  }
});

/** Root mean square of the differences, as a share of that of the expected logits. */
function deviation({ logits }: Run, expected: Float32Array[]): number {
  const flat = expected.flatMap((row) => [...row]);
  const square = (values: number[]) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
  return square(flat.map((value, i) => value - logits[i])) / square(flat);
}

t.test('predictors that do not fit are refused', async (t) => {
  const { request, predictor } = await make(0);
  const refuses = (changed: object, code: string, words: RegExp) =>
    t.rejects(addon.openEngine({ ...request, predictor: { ...predictor, ...changed } as PredictorRequest }), {
      code,
      message: words,
    });
  await refuses({ memoryThresholds: [0] }, 'NATIVE_ARGUMENT', /one entry a layer/);
  await refuses({ flashThresholds: [0, Number.NaN] }, 'NATIVE_ARGUMENT', /must be numbers/);
  await refuses({ input: 'logits' }, 'NATIVE_ARGUMENT', /residual or ffn_norm/);
  await refuses({ path: join(scratch, 'nothing') }, 'NATIVE_IO', /nothing/);
  const without = (kind: string) => predictor.tensors.filter(({ name }) => !name.endsWith(kind));
  for (const kind of ['fc1', 'fc2', 'bias']) await refuses({ tensors: without(kind) }, 'NATIVE_ARGUMENT', /missing/);
  const reshaped = (kind: string) =>
    predictor.tensors.map((tensor) =>
      tensor.name.endsWith(kind) ? { ...tensor, rows: tensor.rows / 2, bytes: tensor.bytes / 2 } : tensor,
    );
  for (const kind of ['fc1', 'fc2'])
    await refuses({ tensors: reshaped(kind) }, 'NATIVE_ARGUMENT', /wrong shape|missing/);
  const damaged = join(scratch, 'damaged.bin');
  writeFileSync(
    damaged,
    new Uint8Array(predictor.extents.reduce((end, { offset, bytes }) => Math.max(end, offset + bytes), 0)),
  );
  await refuses({ path: damaged }, 'NATIVE_CHECKSUM', /layers\.\d\.predictor/);
});
