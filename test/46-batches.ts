// Several sequences in one engine: each gets the bits that it gets alone, whatever joins, leaves, forks or goes back beside it.
import { execFileSync, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { loadAddon } from '../src/engine/addon.js';
import { BatchDecoder, type ContinuationOptions } from '../src/engine/batch.js';
import type { EngineRequest, NativeEngine, SequenceRun, StreamRequest } from '../src/engine/contract.js';
import { type BatchEngine, Engine, type EngineOptions, type StepOptions } from '../src/engine/engine.js';
import { Generation } from '../src/engine/generate.js';
import { type Random, seededRandom } from '../src/engine/random.js';
import { SAMPLING_DEFAULTS } from '../src/engine/sampler.js';
import type { QuantizationName } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY, makeModel } from './support/models.js';
import { oneRun } from './support/one-run.js';
import { randomPredictor } from './support/predictor.js';
import { REPOSITORY } from './support/shared.js';

const addon = loadAddon();
const scratch = t.testdir();
const CONTEXT = 96;

/** The request that opening a model would send, everything in memory. */
async function requestOf(directory: string): Promise<EngineRequest> {
  let captured: EngineRequest | undefined;
  const openEngine = (request: EngineRequest) => {
    captured = request;
    return addon.openEngine(request);
  };
  const options = { context: CONTEXT, threads: 2, loadMode: 'resident' as const };
  await (await Engine.open(await openModelDirectory(directory), options, { ...addon, openEngine })).close();
  return captured as EngineRequest;
}

async function openNative(t: Test, request: EngineRequest): Promise<NativeEngine> {
  const engine = await addon.openEngine(request);
  t.teardown(() => engine.close());
  return engine;
}

/** Fails like the native calls that are synchronous do, as a promise. */
async function call(work: () => void): Promise<void> {
  work();
}

/**
 * A random pattern of arrivals: sequences join with a prompt, decode together, fork, go back, leave. Every step's logits are
 * compared with those of each text alone, on an engine of its own. Returns how many steps had several sequences.
 */
async function pattern(
  t: Test,
  shared: EngineRequest,
  alone: EngineRequest,
  seed: number,
  name: string,
): Promise<number> {
  const random = seededRandom(seed);
  const below = (end: number) => Math.floor(random() * end);
  const { sequences = 1, vocabSize } = shared;
  const engine = await addon.openEngine(shared);
  const single = await addon.openEngine(alone);
  const kvBytes = engine.counters().kvBytes;
  const texts: number[][] = Array.from({ length: sequences }, () => []);
  let mixed = 0;
  let wrong = 0;
  try {
    for (let round = 0; round < 26; round++) {
      const runs: SequenceRun[] = [];
      const tokens: number[] = [];
      for (const [sequence, text] of texts.entries()) {
        const what = below(12);
        if (what === 0) {
          engine.release({ sequence });
          texts[sequence] = [];
          continue;
        }
        if (what === 1 && text.length > 0) {
          const to = texts.findIndex(({ length }) => length === 0);
          // In a window only the last positions are there; all are of a text shorter than a page.
          const positions = text.length < 16 ? 1 + below(text.length) : text.length;
          if (to >= 0) {
            engine.fork({ from: sequence, to, positions });
            texts[to] = text.slice(0, positions);
          }
        }
        if (what === 2) continue;
        const back = what === 3 && text.length > 1 ? 1 : 0;
        const position = text.length - back;
        const count = position === 0 ? 3 + below(20) : what === 4 ? 1 + below(4) : 1;
        if (position + count > CONTEXT) continue;
        const more = Array.from({ length: count }, () => below(vocabSize));
        runs.push({ sequence, position, count });
        tokens.push(...more);
        texts[sequence] = [...text.slice(0, position), ...more];
      }
      if (runs.length === 0) continue;
      if (runs.length > 1) mixed++;
      const logits = new Float32Array(tokens.length * vocabSize);
      await engine.step({ tokens: Int32Array.from(tokens), runs, logits, all: true });
      let row = 0;
      for (const { sequence, count } of runs) {
        const text = texts[sequence];
        const all = new Float32Array(text.length * vocabSize);
        await single.step({ ...oneRun(Int32Array.from(text), 0), logits: all, all: true });
        const expected = Buffer.from(all.buffer, 4 * (text.length - count) * vocabSize);
        const got = Buffer.from(logits.buffer, 4 * row * vocabSize, 4 * count * vocabSize);
        if (!got.equals(expected)) wrong++;
        row += count;
      }
    }
    t.equal(wrong, 0, `${name}: every run has the bits of its text alone`);
    t.equal(engine.counters().kvBytes, kvBytes, `${name}: no byte more than at open`);
    return mixed;
  } finally {
    await engine.close();
    await single.close();
  }
}

const MODELS: [CheckpointOptions, QuantizationName, number[]?][] = [
  [{ family: 'bamboo', hidden: 160, heads: 5, neurons: 700, layers: 3 }, 'q4', [0, 7, 20]],
  [{ family: 'mistral', hidden: 96, headDim: 20, heads: 3, neurons: 150 }, 'q8', [5, 5]],
  [{ family: 'turbosparsemixtral', hidden: 96, neurons: 130, experts: 3 }, 'q4'],
  [{ family: 'opt', hidden: 128, heads: 4, neurons: 390 }, 'f16'],
];

async function make(i: number): Promise<EngineRequest> {
  const [options, quantization, windows] = MODELS[i];
  const directory = await makeModel(join(scratch, `model-${i}`), { ...options, seed: i + 1 }, quantization);
  const request = await requestOf(directory);
  return windows === undefined ? request : { ...request, windows };
}

function streamOf(request: EngineRequest, kept: number, slots: number, gates = 0): StreamRequest {
  const fill = (count: number) => request.expertOffsets.map(() => Math.min(count, request.neuronCount));
  const places = { residentGates: fill(gates), hotNeurons: fill(kept), coldSlots: fill(slots) };
  return { ...places, stagingBytes: 1 << 18, mode: 'direct', backend: 'threads', lanes: 2 };
}

t.test('any pattern of arrivals: the bits that each sequence gets alone', async (t) => {
  for (const i of MODELS.keys()) {
    const request = await make(i);
    const [{ family }] = MODELS[i];
    // The pattern's longest texts together are more than one context.
    const shared = { ...request, sequences: 5, contextLength: 5 * CONTEXT };
    if (family === 'opt') Object.assign(shared, { contextLength: 128, sequences: 2 });
    let mixed = 0;
    for (const [at, kernelSet] of addon.cpu().kernelSets.entries()) {
      const ways = { kernelSet, batchSize: [3, 64][at % 2], threads: 1 + (at % 3) };
      const name = `${family} ${kernelSet}`;
      mixed += await pattern(t, { ...shared, ...ways }, { ...request, kernelSet }, at, name);
    }
    const gates = streamOf(request, 40, 60, 128);
    mixed += await pattern(t, { ...shared, stream: gates }, request, 7, `${family}, streamed`);

    const predictor = await randomPredictor(addon, request, join(scratch, `predictor-${i}.bin`), { seed: i });
    const predicted = { ...request, predictor };
    mixed += await pattern(t, { ...shared, predictor }, predicted, 8, `${family}, predicted`);
    const whole = streamOf(request, 30, 50);
    mixed += await pattern(t, { ...shared, predictor, stream: whole }, predicted, 9, `${family}, predicted, streamed`);
    t.ok(mixed > 60, `${family}: ${mixed} steps of several sequences`);
  }
});

t.test('prompts of several sequences in one step, whatever pieces they come in', async (t) => {
  const request = await make(0);
  const { vocabSize } = request;
  const prompts = [31, 18, 40].map((length, s) => Array.from({ length }, (_, i) => (i * 41 + s * 7 + 3) % vocabSize));
  const single = await openNative(t, request);
  const expected: Float32Array[] = [];
  for (const prompt of prompts) {
    const row = new Float32Array(vocabSize);
    await single.step({ ...oneRun(Int32Array.from(prompt), 0), logits: row, all: false, exact: true, prompt: true });
    expected.push(row);
  }
  const engine = await openNative(t, { ...request, sequences: 3, batchSize: 50 });
  const filled = [0, 0, 0];
  for (const pieces of [
    [9, 0, 40],
    [1, 17, 0],
    [21, 1, 0],
  ]) {
    const runs = pieces
      .map((count, sequence) => ({ sequence, position: filled[sequence], count }))
      .filter(({ count }) => count > 0);
    const tokens = runs.flatMap(({ sequence, position, count }) => prompts[sequence].slice(position, position + count));
    const logits = new Float32Array(runs.length * vocabSize);
    await engine.step({ tokens: Int32Array.from(tokens), runs, logits, all: false, exact: true, prompt: true });
    for (const [row, { sequence, count }] of runs.entries()) {
      filled[sequence] += count;
      if (filled[sequence] < prompts[sequence].length) continue;
      t.strictSame(logits.slice(row * vocabSize, (row + 1) * vocabSize), expected[sequence], `sequence ${sequence}`);
    }
  }
  t.strictSame(filled, [31, 18, 40]);
});

t.test('the context is shared: what forks have in common counts once', async (t) => {
  const request = { ...(await make(2)), contextLength: 64, sequences: 5, batchSize: 16 };
  const one = addon.memoryNeeded({ ...request, sequences: 1 });
  const five = addon.memoryNeeded(request);
  const engine = await openNative(t, request);
  t.equal(engine.counters().kvBytes, five.kvBytes, 'as was said before');
  t.ok(five.kvBytes < 3.2 * one.kvBytes, 'eight pages more than four, not five times as many');
  const { vocabSize } = request;
  const logits = new Float32Array(4 * vocabSize);
  const prompt = Int32Array.from({ length: 45 }, (_, i) => (i * 5) % vocabSize);
  await engine.step({ ...oneRun(prompt, 0), logits, all: false });
  for (const to of [1, 2, 3]) engine.fork({ from: 0, to, positions: 45 });
  const runsAt = (position: number, count = 1) => [0, 1, 2, 3].map((sequence) => ({ sequence, position, count }));
  const four_tokens = Int32Array.of(1, 2, 3, 4);
  // 45 + 4 * 4 = 61 positions; each sequence copies its part of the page that it shares.
  for (const position of [45, 46, 47, 48]) {
    await engine.step({ tokens: four_tokens, runs: runsAt(position), logits, all: false });
  }
  t.pass('45 positions that four share and 16 of their own');

  const before = logits.slice();
  const rest = Int32Array.from({ length: 63 }, () => 1);
  const full = {
    code: 'NATIVE_ARGUMENT',
    message: /KV cache is full: .* takes 4 pages of 16 positions where 2 are free/,
  };
  engine.fork({ from: 0, to: 4, positions: 1 });
  await t.rejects(
    engine.step({
      tokens: rest,
      runs: [{ sequence: 4, position: 1, count: 63 }],
      logits: new Float32Array(vocabSize),
      all: false,
    }),
    full,
  );
  const other = new Float32Array(4 * vocabSize);
  await engine.step({ tokens: four_tokens, runs: runsAt(48), logits: other, all: false });
  t.strictSame(other, before, 'what was refused changed nothing');
  engine.release({ sequence: 2 });
  engine.fork({ from: 1, to: 2, positions: 49 });
  const again = new Float32Array(vocabSize);
  await engine.step({
    tokens: Int32Array.of(2),
    runs: [{ sequence: 2, position: 48, count: 1 }],
    logits: again,
    all: false,
  });
  t.strictSame(again, before.slice(vocabSize, 2 * vocabSize), 'a fork of a fork, a position back');
});

t.test('requests that cannot be are refused in words and change nothing', async (t) => {
  const request = { ...(await make(0)), sequences: 3 };
  const engine = await openNative(t, request);
  const { vocabSize } = request;
  const logits = new Float32Array(3 * vocabSize);
  const step = (runs: SequenceRun[], tokens = Int32Array.of(5, 6), target = logits) =>
    engine.step({ tokens, runs, logits: target, all: false });
  await step([{ sequence: 1, position: 0, count: 2 }]);
  const expected = logits.slice(0, vocabSize);
  const refused = (work: Promise<void>, message: RegExp, code = 'NATIVE_ARGUMENT') =>
    t.rejects(work, { code, message });
  const one = (sequence: number, position: number, count = 2) => step([{ sequence, position, count }]);
  await refused(one(3, 0), /there is no sequence 3: the engine was opened for 3, numbered from 0/);
  await refused(one(0, 1), /does not hold the positions before 1 of sequence 0/);
  await refused(one(1, 3), /positions before 3 of sequence 1/);
  await refused(one(1, 2, 1), /name each of its tokens once/);
  await refused(one(1, 2, 3), /name each of its tokens once/);
  await refused(one(1, 2, 0), /name each of its tokens once/);
  await refused(step([]), /name each of its tokens once/);
  await refused(step([], new Int32Array(0)), /at least one token/);
  await refused(one(1, CONTEXT - 1), /past the context of 96/);
  const twice = [0, 1].map((i) => ({ sequence: 1, position: 2 + i, count: 1 }));
  await refused(step(twice), /sequence 1 is in the step twice/);
  const both = [0, 1].map((sequence) => ({ sequence, position: 2 * sequence, count: 1 }));
  await refused(step(both, undefined, logits.subarray(0, vocabSize)), /logits is too small/);
  await refused(step([{ sequence: 0.5, position: 0, count: 2 }]), /runs: sequence must be a whole number/);
  await refused(step('x' as never), /runs must be an array/);

  const fork = (from: number, to: number, positions: number) => call(() => engine.fork({ from, to, positions }));
  await refused(fork(1, 4, 2), /no sequence 4/);
  await refused(fork(7, 0, 2), /no sequence 7/);
  await refused(fork(1, 1, 2), /forked to itself/);
  await refused(fork(1, 0, 3), /sequence 1 does not hold the positions before 3/);
  engine.fork({ from: 1, to: 0, positions: 2 });
  await refused(fork(1, 0, 2), /sequence 0 is in use: release it/);
  await refused(
    call(() => engine.release({ sequence: 9 })),
    /no sequence 9/,
  );
  engine.release({ sequence: 2 });
  const long = new Int32Array(CONTEXT - 2);
  const running = step([{ sequence: 0, position: 2, count: CONTEXT - 2 }], long);
  await Promise.all([
    refused(fork(1, 2, 2), /wait for it/, 'NATIVE_BUSY'),
    refused(
      call(() => engine.release({ sequence: 1 })),
      /wait for it/,
      'NATIVE_BUSY',
    ),
  ]);
  await running;
  await step([{ sequence: 1, position: 0, count: 2 }]);
  t.strictSame(logits.slice(0, vocabSize), expected, 'and sequence 1 is as it was');
  t.throws(() => addon.memoryNeeded({ ...request, sequences: 0 }), /a size is zero/);
  t.throws(() => addon.memoryNeeded({ ...request, sequences: 1 << 20 }), /a size is absurd/);
});

t.test('pages of the cache against lists, under sanitizers', async (t) => {
  const flags = ['-std=c++20', '-O1', '-g', '-fno-exceptions', '-fno-rtti', '-fno-sanitize-recover=all'];
  const sanitizers = '-fsanitize=address,undefined';
  const probe = spawnSync('g++', [sanitizers, '-x', 'c++', '-', '-o', join(scratch, 'probe')], {
    input: 'int main() {}',
  });
  const usable = probe.status === 0 && spawnSync(join(scratch, 'probe')).status === 0;
  const sources = ['engine/kv_cache_test.cc', 'engine/kv_cache.cc', 'base/memory_test.cc'];
  const program = join(scratch, 'kv_cache_test');
  const paths = sources.map((name) => join(REPOSITORY, 'native', name));
  execFileSync('g++', [...flags, ...(usable ? [sanitizers] : []), '-I', REPOSITORY, ...paths, '-o', program]);
  t.match(execFileSync(program).toString(), /^4\d{3} steps, \d{3} refused\n$/);
});

const GREEDY = { ...SAMPLING_DEFAULTS, temperature: 0 };

function continuation(changes: Partial<ContinuationOptions> = {}): ContinuationOptions {
  return { maxTokens: 12, sampling: SAMPLING_DEFAULTS, random: seededRandom(1), endTokens: [], ...changes };
}

async function openModel(t: Test, directory: string, options: Partial<EngineOptions>): Promise<Engine> {
  const model = await openModelDirectory(directory);
  const engine = await Engine.open(model, { context: 0, threads: 2, ...options });
  t.teardown(() => engine.close());
  return engine;
}

t.test('texts that join and leave are those that each is alone, by its seed', async (t) => {
  const checkpoint = { family: 'mistral', hidden: 96, heads: 3, neurons: 150, config: { sliding_window: 9 } } as const;
  const directory = await makeModel(join(scratch, 'decoder'), checkpoint, 'q4');
  const random = seededRandom(5);
  const below = (end: number) => Math.floor(random() * end);
  const texts = Array.from({ length: 9 }, (_, i) => ({
    prompt: Array.from({ length: 1 + below(i === 4 ? 60 : 30) }, () => below(MODEL_VOCABULARY)),
    seeds: Array.from({ length: 1 + (i % 3) }, (_, k) => 100 * i + k),
    maxTokens: 1 + below(20),
    sampling: { ...SAMPLING_DEFAULTS, repeatPenalty: i % 2 === 0 ? 1 : 1.3, temperature: 1.5 },
    endTokens: i % 3 === 0 ? Array.from({ length: 20 }, (_, k) => 13 * k) : [],
    arrivesAt: 4 * i,
  }));
  const single = await openModel(t, directory, {});
  const engine = await openModel(t, directory, { sequences: 4 });
  const decoder = new BatchDecoder(engine);
  const joined: { text: (typeof texts)[number]; continuations: ReturnType<BatchDecoder['join']> }[] = [];
  const waiting = [...texts];
  let count = 0;
  const arrive = () => {
    while (waiting.length > 0 && waiting[0].arrivesAt <= count) {
      const [text] = waiting.splice(0, 1);
      const { seeds, sampling, endTokens, maxTokens } = text;
      const all = seeds.map((seed) => continuation({ sampling, endTokens, maxTokens, random: seededRandom(seed) }));
      joined.push({ text, continuations: decoder.join(text.prompt, all) });
    }
  };
  const heard = new Map<object, number[]>();
  arrive();
  while (joined.length < texts.length || count === 0) {
    for await (const { continuation, token } of decoder.tokens()) {
      heard.set(continuation, [...(heard.get(continuation) ?? []), token]);
      count++;
      arrive();
    }
    // Nobody was left to decode: the next one arrives now.
    count = Math.max(count, waiting[0]?.arrivesAt ?? count);
    arrive();
  }
  for await (const { continuation, token } of decoder.tokens()) {
    heard.set(continuation, [...(heard.get(continuation) ?? []), token]);
  }
  for (const { text, continuations } of joined) {
    const { prompt, seeds, sampling, endTokens, maxTokens } = text;
    for (const [k, seed] of seeds.entries()) {
      const generation = new Generation(single, { prompt, maxTokens, sampling, endTokens, random: seededRandom(seed) });
      const tokens: number[] = [];
      for await (const token of generation.tokens()) tokens.push(token);
      t.strictSame(continuations[k].tokens, tokens, `seed ${seed}: ${tokens.length} tokens`);
      t.strictSame(heard.get(continuations[k]) ?? [], tokens, 'each was told');
      t.equal(continuations[k].stopReason, generation.stopReason);
    }
  }
  t.ok(new Set(decoder.timings.liveSizes).size > 2, `live: ${[...new Set(decoder.timings.liveSizes)].join(', ')}`);
});

/** A model that follows token n by n + 1 and checks that sequences are filled in order, and how many positions are used. */
class CountingEngine implements BatchEngine {
  readonly vocabSize = 50;
  readonly batchSize = 7;
  /** Of each step: its runs' lengths, and whether it was of a prompt. */
  readonly steps: { counts: number[]; prompt: boolean }[] = [];
  readonly #filled: number[];

  constructor(
    readonly contextLength: number,
    readonly sequences: number,
  ) {
    this.#filled = new Array<number>(sequences).fill(0);
  }

  async stepRuns(tokens: Int32Array, runs: readonly SequenceRun[], logits: Float32Array, options: StepOptions = {}) {
    let at = -1;
    for (const [row, { sequence, position, count }] of runs.entries()) {
      if (position !== this.#filled[sequence]) throw new Error(`position ${position} of sequence ${sequence}`);
      this.#filled[sequence] = position + count;
      at += count;
      logits.fill(0, row * this.vocabSize, (row + 1) * this.vocabSize);
      logits[row * this.vocabSize + ((tokens[at] + 1) % this.vocabSize)] = 5;
    }
    this.steps.push({ counts: runs.map(({ count }) => count), prompt: options.prompt === true });
  }

  fork(from: number, to: number, positions: number): void {
    if (this.#filled[to] !== 0 || this.#filled[from] < positions) throw new Error('a fork that cannot be');
    this.#filled[to] = positions;
  }

  release(sequence: number): void {
    this.#filled[sequence] = 0;
  }

  get isEmpty(): boolean {
    return this.#filled.every((count) => count === 0);
  }
}

const zero: Random = () => 0;

t.test('a long prompt joins piece by piece; the others go on', async (t) => {
  const engine = new CountingEngine(1000, 3);
  const decoder = new BatchDecoder(engine);
  const plain = { sampling: GREEDY, random: zero };
  const [first] = decoder.join([1, 2], [continuation({ ...plain, maxTokens: 9 })]);
  let later: readonly { tokens: readonly number[] }[] = [];
  for await (const { token } of decoder.tokens()) {
    if (token === 4) later = decoder.join(Array(22).fill(30), [continuation(plain), continuation(plain)]);
  }
  t.strictSame(first.tokens, [3, 4, 5, 6, 7, 8, 9, 10, 11]);
  t.strictSame(
    later.map(({ tokens }) => tokens),
    [0, 1].map(() => Array.from({ length: 12 }, (_, i) => 31 + i)),
  );
  const shape = engine.steps.map(({ counts, prompt }) => `${prompt ? 'prompt ' : ''}${counts.join('+')}`);
  t.strictSame(shape.slice(0, 10), [
    'prompt 2',
    '1',
    'prompt 7',
    '1',
    'prompt 7',
    '1',
    'prompt 7',
    '1',
    'prompt 1',
    '1+1+1',
  ]);
  t.strictSame(decoder.timings.promptTokens, 24);
  t.ok(engine.isEmpty);
});

t.test('who does not fit waits for a sequence and for positions; who never could is refused', async (t) => {
  const engine = new CountingEngine(40, 3);
  const decoder = new BatchDecoder(engine);
  const of = (maxTokens: number, count = 1) =>
    Array.from({ length: count }, () => continuation({ sampling: GREEDY, random: zero, maxTokens }));
  const refused = (prompt: number[], all: ContinuationOptions[], code: string, message: RegExp) =>
    t.throws(() => decoder.join(prompt, all), { code, message });
  refused([], of(1), 'E_EMPTY_PROMPT', /empty/);
  refused([50], of(1), 'E_USAGE', /token 50/);
  refused([1], of(1, 4), 'E_USAGE', /4 continuations of a prompt: the engine was opened for 3/);
  refused([1], [], 'E_USAGE', /0 continuations/);
  refused([1, 2, 3], of(13, 3), 'E_CONTEXT_FULL', /may take 42 positions, the context has 40/);
  decoder.join([1, 2], of(18));
  decoder.join([3, 4], of(18));
  const [late] = decoder.join([5], of(5));
  const [last] = decoder.join([6], of(2));
  const order: number[] = [];
  for await (const { continuation } of decoder.tokens()) {
    if (continuation === late || continuation === last) order.push(continuation === late ? 1 : 2);
  }
  t.strictSame(
    decoder.timings.liveSizes.slice(0, 17).every((size) => size <= 2),
    true,
    '40 positions are two of 20',
  );
  t.strictSame(
    [late.tokens, last.tokens],
    [
      [6, 7, 8, 9, 10],
      [7, 8],
    ],
  );
  t.equal(order[0], 1, 'in order of arrival');

  const controller = new AbortController();
  decoder.join([1], of(30));
  decoder.join([1], of(30));
  let count = 0;
  for await (const _ of decoder.tokens(controller.signal)) if (++count === 5) controller.abort();
  t.ok(count < 8 && engine.isEmpty, 'interrupted: nothing stays behind');
  const [fresh] = decoder.join([1], of(39));
  for await (const _ of decoder.tokens());
  t.equal(fresh.tokens.length, 39, 'and all positions are free again');
});
