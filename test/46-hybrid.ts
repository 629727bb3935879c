// Hot clusters on a dense unit, cold neurons on the CPU: the same logits but for rounding, whatever is whose, and which graph
// computes how many tokens.
import { join } from 'node:path';
import fc from 'fast-check';
import t, { type Test } from 'tap';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest, NativeEngine, StreamRequest } from '../src/engine/contract.js';
import { Engine, type EngineOptions, type StepOptions } from '../src/engine/engine.js';
import type { UnitRequest } from '../src/engine/unit-contract.js';
import type { QuantizationName } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { clusterCount, clusterEnd } from '../src/plan/hot-ratio.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY, makeModel } from './support/models.js';
import { oneRun } from './support/one-run.js';
import { randomPredictor } from './support/predictor.js';

const addon = loadAddon();
const scratch = t.testdir();

/** Lengths of steps: chunks of a prompt, whole and padded; more than a small batch and less than a chunk; small batches. */
const PIECES = [128, 70, 20, 1, 4, 2, 3, 1, 5, 4];
const TOKENS = Array.from(
  { length: PIECES.reduce((a, b) => a + b) },
  (_, i) => (i * i * 41 + i + 7) % MODEL_VOCABULARY,
);

/** The request that opening a model would send. */
async function requestOf(directory: string, options: Partial<EngineOptions> = {}): Promise<EngineRequest> {
  let captured: EngineRequest | undefined;
  const openEngine = (request: EngineRequest) => {
    captured = request;
    return addon.openEngine(request);
  };
  const model = await openModelDirectory(directory);
  const engine = await Engine.open(model, { context: 256, threads: 2, ...options }, { ...addon, openEngine });
  await engine.close();
  return captured as EngineRequest;
}

/** Logits of every token, and after each step what the unit had computed. */
async function run(
  request: EngineRequest,
  options: StepOptions = {},
): Promise<{ rows: Float32Array[]; unit: number[] }> {
  const engine = await addon.openEngine(request);
  const rows: Float32Array[] = [];
  const unit: number[] = [];
  try {
    let position = 0;
    for (const length of PIECES) {
      const tokens = Int32Array.from(TOKENS.slice(position, position + length));
      const logits = new Float32Array(length * request.vocabSize);
      const before = engine.counters().unit?.neurons ?? 0;
      await engine.step({
        ...oneRun(tokens, position),
        logits,
        all: true,
        ...options,
        prompt: length > 4 && options.prompt === true,
      });
      unit.push((engine.counters().unit?.neurons ?? 0) - before);
      for (let i = 0; i < length; i++) rows.push(logits.subarray(i * request.vocabSize, (i + 1) * request.vocabSize));
      position += length;
    }
    return { rows, unit };
  } finally {
    await engine.close();
  }
}

function hostUnit(request: EngineRequest, clusters: number[], threads = 1): UnitRequest {
  const { neuronCount } = request;
  const clusterNeurons =
    clusterEnd(1, neuronCount) === neuronCount ? 128 * Math.ceil(neuronCount / 128) : clusterEnd(1, neuronCount);
  return { kind: 'host', threads, clusterNeurons, mostClusters: Math.max(...clusters), clusters };
}

const norm = (row: ArrayLike<number>) => Math.sqrt(Array.from(row).reduce((sum, x) => sum + x * x, 0) / row.length);

/** Each row's difference, relative to the size of logits. */
function errors(a: Float32Array[], b: Float32Array[]): number[] {
  const size = norm(a.map(norm));
  return a.map((row, r) => norm(row.map((x, i) => x - b[r][i])) / size);
}

/** Where a hair decides between experts, or at a threshold above zero, the least rounding may tip a row. */
function near(t: Test, options: CheckpointOptions, found: number[], bound: number, what: string): void {
  const tips =
    options.family.includes('mixtral') || options.family === 'sparsellama' || options.hiddenAct === 'fatrelu';
  const beyond = found.filter((error) => !(error < bound)).length;
  t.ok(beyond <= (tips ? found.length / 20 : 0), `${what}: ${beyond} beyond ${bound}, worst ${Math.max(...found)}`);
}

const MODELS: [CheckpointOptions, QuantizationName][] = [
  [{ family: 'bamboo', hidden: 160, heads: 5, neurons: 700 }, 'q4'],
  [{ family: 'turbosparsemixtral', hidden: 192, headDim: 32, neurons: 300, experts: 5 }, 'q8'],
  [{ family: 'mixtral', hidden: 96, neurons: 170, experts: 3 }, 'q4'],
  [{ family: 'llama', hidden: 288, neurons: 1300 }, 'f16'],
  [{ family: 'llama', hiddenAct: 'relu', hidden: 256, heads: 4, neurons: 512 }, 'q4'],
  [{ family: 'llama', hiddenAct: 'fatrelu', hidden: 96, neurons: 400 }, 'f16'],
  [{ family: 'sparsellama', hidden: 96, neurons: 257 }, 'q8'],
  [{ family: 'qwen3', hidden: 320, heads: 5, neurons: 640 }, 'q4'],
  [{ family: 'opt', hidden: 96, neurons: 391 }, 'f16'],
  [{ family: 'opt', hidden: 320, heads: 5, neurons: 64 }, 'q4'],
];

/** Activations of 8 bits have steps: an input that is another by a hair may be rounded to the next. Found: up to 0.012. */
const bound = (quantization: QuantizationName) => (quantization === 'f16' ? 1e-4 : 0.03);

/** What the unit computes at each step of a dense FFN with so many clusters of 1 to 4 tokens and of a chunk. */
function unitNeurons({ neuronCount, expertOffsets }: EngineRequest, clusters: number[]): number[] {
  return PIECES.map((tokens) => {
    const graph = tokens <= 4 ? tokens - 1 : 4;
    const isUsed = tokens <= 4 || tokens >= 64;
    return isUsed ? tokens * expertOffsets.length * clusterEnd(clusters[graph], neuronCount) : 0;
  });
}

t.test('random models of every family, resident: hybrid is the CPU alone is the unit alone', async (t) => {
  for (const [i, [options, quantization]] of MODELS.entries()) {
    const directory = await makeModel(
      join(scratch, `model-${i}`),
      { context: 256, ...options, seed: i + 1 },
      quantization,
    );
    const request = await requestOf(directory);
    t.equal(request.unit, undefined, 'nobody asked for a unit');
    const all = clusterCount(request.neuronCount);
    for (const prompt of [false, true]) {
      const alone = await run(request, { prompt });
      for (const clusters of new Set([0, 1, Math.ceil(all / 2), all])) {
        const schedule = new Array<number>(5).fill(clusters);
        const what = `${options.family} ${quantization}, ${clusters} of ${all} clusters${prompt ? ', prompts' : ''}`;
        const hybrid = await run({ ...request, threads: 1, unit: hostUnit(request, schedule) }, { prompt });
        const found = errors(alone.rows, hybrid.rows);
        if (clusters === 0) t.equal(Math.max(...found), 0, what);
        else near(t, options, found, bound(quantization), what);
        for (const [threads, ofUnit] of [
          [2, 1],
          [4, 2],
        ]) {
          const again = await run({ ...request, threads, unit: hostUnit(request, schedule, ofUnit) }, { prompt });
          t.equal(Math.max(...errors(hybrid.rows, again.rows)), 0, `${what}: the same bits with ${threads} threads`);
        }
        if (request.expertCount === 1)
          t.strictSame(hybrid.unit, unitNeurons(request, schedule), 'the unit has its share');
      }
    }
  }
});

t.test('a scripted pattern of tokens: each step has the ratio of its tokens, and no graph is made', async (t) => {
  const request = await requestOf(join(scratch, 'model-3/llama-f16.pi2'));
  const schedule = [5, 3, 0, 2, 6];
  const unit = hostUnit(request, schedule);
  const { rows, unit: computed } = await run({ ...request, unit });
  t.strictSame(computed, unitNeurons(request, schedule));
  near(t, { family: 'llama' }, errors((await run(request)).rows, rows), 1e-4, 'a ratio for each number of tokens');

  const engine = await addon.openEngine({ ...request, unit });
  let position = 0;
  for (const [tokens, changes] of [
    [1, 1],
    [1, 0],
    [4, 1],
    [2, 1],
    [128, 1],
    [1, 1],
    [3, 0],
    [1, 0],
  ]) {
    const before = engine.counters().unit?.activations as number;
    const logits = new Float32Array(request.vocabSize);
    await engine.step({ ...oneRun(Int32Array.from(TOKENS.slice(0, tokens)), position), logits, all: false });
    t.equal(
      (engine.counters().unit?.activations as number) - before,
      changes,
      `${tokens} tokens: ${changes} other graphs`,
    );
    position += tokens;
  }
  const before = engine.counters().unit;
  const fired = new Uint8Array(request.layerCount * Math.ceil(request.neuronCount / 8));
  await engine.step({
    ...oneRun(Int32Array.of(1), position),
    logits: new Float32Array(request.vocabSize),
    all: false,
    fired,
  });
  t.strictSame(engine.counters().unit, before, 'a step that records what fires is the CPU’s');
  await engine.close();
});

/** Any plan of memory that has the unit's neurons in its hot region, any way to read. */
function anyStream(request: EngineRequest, unitNeurons: number, isPredicted: boolean): fc.Arbitrary<StreamRequest> {
  const n = request.neuronCount;
  const banks = request.expertOffsets.length;
  const share = fc.double({ min: 0, max: 1, noNaN: true });
  const bank = fc.record({
    gates: share,
    hot: fc.oneof(fc.constant(0), share),
    cold: fc.oneof(fc.constant(0), fc.nat(n)),
  });
  return fc
    .record({
      plans: fc.array(bank, { minLength: banks, maxLength: banks }),
      stagingBytes: fc.constantFrom(0, 40_000, 1 << 20),
      mode: fc.constantFrom('direct' as const, 'buffered' as const),
      backend: fc.constantFrom('threads' as const, 'uring' as const),
      lanes: fc.integer({ min: 1, max: 4 }),
      twoPhase: fc.boolean(),
      prefetchBytes: fc.constantFrom(0, 1 << 18),
    })
    .map(({ plans, ...rest }) => {
      const gatesOf = (gates: number) => {
        const chunks = Math.floor((gates * n) / 128) * 128;
        return isPredicted ? 0 : gates > 0.9 ? n : Math.max(chunks, Math.min(n, Math.ceil(unitNeurons / 128) * 128));
      };
      const residentGates = plans.map(({ gates }) => gatesOf(gates));
      const hotNeurons = plans.map(({ hot }, i) => {
        return Math.max(unitNeurons, Math.floor(hot * (isPredicted ? n : residentGates[i])));
      });
      return { ...rest, residentGates, hotNeurons, coldSlots: plans.map(({ cold }) => cold) };
    });
}

const STREAMED = [0, 1, 2, 6, 8];

t.test('streamed: hybrid has the bits of hybrid with everything in memory', async (t) => {
  for (const i of STREAMED) {
    const [options, quantization] = MODELS[i];
    const request = await requestOf(join(scratch, `model-${i}/${options.family}-${quantization}.pi2`));
    const all = clusterCount(request.neuronCount);
    const schedules = [all, 1, Math.ceil(all / 2)].map((most) => {
      const schedule = [most, Math.max(0, most - 1), 0, 1, most];
      return { schedule, expected: run({ ...request, unit: hostUnit(request, schedule) }, { prompt: true }) };
    });
    const property = fc.asyncProperty(
      fc.constantFrom(...schedules).chain(({ schedule, expected }) => {
        const most = clusterEnd(Math.max(...schedule), request.neuronCount);
        return anyStream(request, most, false).map((stream) => ({ schedule, expected, stream }));
      }),
      fc.constantFrom([1, 1], [2, 1], [3, 2]),
      async ({ schedule, expected, stream }, [threads, ofUnit]) => {
        const hybrid = await run(
          { ...request, threads, stream, unit: hostUnit(request, schedule, ofUnit) },
          { prompt: true },
        );
        const { rows, unit } = await expected;
        t.strictSame(hybrid.unit, unit);
        return Math.max(...errors(rows, hybrid.rows)) === 0;
      },
    );
    const result = await fc.check(property, { numRuns: 8 });
    t.notOk(result.failed, `${options.family}: ${JSON.stringify(result.counterexample)} ${result.errorInstance}`);
  }
});

t.test('predicted: hot neurons are never left out; streamed has the bits of resident', async (t) => {
  for (const i of STREAMED) {
    const [options, quantization] = MODELS[i];
    const name = `${options.family} ${quantization}`;
    const request = await requestOf(join(scratch, `model-${i}/${options.family}-${quantization}.pi2`));
    const predictor = await randomPredictor(addon, request, join(scratch, `predictor-${i}.bin`), { seed: i });
    const fill = (value: number) => predictor.memoryThresholds.map(() => value);
    const withThreshold = (value: number) => {
      return { ...request, predictor: { ...predictor, memoryThresholds: fill(value), flashThresholds: fill(value) } };
    };
    const all = clusterCount(request.neuronCount);
    const half = new Array<number>(5).fill(Math.ceil(all / 2));
    const exact = await run({ ...request, unit: hostUnit(request, half) });
    const differ = (a: { rows: Float32Array[] }, b: { rows: Float32Array[] }) => Math.max(...errors(a.rows, b.rows));
    const chosen = await run({ ...withThreshold(Number.NEGATIVE_INFINITY), unit: hostUnit(request, half) });
    t.equal(differ(exact, chosen), 0, `${name}: with all neurons chosen it is exact mode`);
    const full = new Array<number>(5).fill(all);
    const none = await run({ ...withThreshold(Number.POSITIVE_INFINITY), unit: hostUnit(request, full) });
    // Jobs between a small batch and a chunk are the CPU's, whose predictor leaves all out: compare before the first of them.
    const before = PIECES[0] + PIECES[1];
    const unitAlone = await run({ ...request, unit: hostUnit(request, full) });
    if (request.expertCount === 1) {
      const begin = { rows: none.rows.slice(0, before) };
      t.equal(differ(begin, { rows: unitAlone.rows.slice(0, before) }), 0, `${name}: the unit asks no predictor`);
    }
    const guessed = withThreshold(0);
    const resident = await run({ ...guessed, unit: hostUnit(request, half) });
    t.ok(differ(resident, exact) > 0, `${name}: cold neurons are left out`);
    const property = fc.asyncProperty(
      anyStream(request, clusterEnd(half[0], request.neuronCount), true),
      fc.constantFrom([1, 1], [2, 1], [3, 2]),
      async (stream, [threads, ofUnit]) => {
        const streamed = await run({ ...guessed, threads, stream, unit: hostUnit(request, half, ofUnit) });
        return differ(resident, streamed) === 0;
      },
    );
    const result = await fc.check(property, { numRuns: 6 });
    t.notOk(result.failed, `${name}: ${JSON.stringify(result.counterexample)} ${result.errorInstance}`);
  }
});

t.test('a read or the unit that fails ends the step with words; the next step is right', async (t) => {
  for (const i of [0, 1]) {
    const [options, quantization] = MODELS[i];
    const request = await requestOf(join(scratch, `model-${i}/${options.family}-${quantization}.pi2`));
    const unit = hostUnit(request, [1, 1, 1, 1, 1]);
    const hot = clusterEnd(1, request.neuronCount);
    const fill = (count: number) => request.expertOffsets.map(() => count);
    const shape = { residentGates: fill(hot), hotNeurons: fill(hot), coldSlots: fill(0), stagingBytes: 0 };
    const stream = { ...shape, mode: 'direct', backend: 'uring', lanes: 2 } as const;
    const tokens = Int32Array.from(TOKENS.slice(0, 4));
    const stepOf = async (engine: NativeEngine) => {
      const logits = new Float32Array(request.vocabSize);
      await engine.step({ ...oneRun(tokens, 0), logits, all: false });
      return logits;
    };
    const sound = await addon.openEngine({ ...request, unit });
    const expected = await stepOf(sound);
    await sound.close();
    for (const [what, changes, words] of [
      ['read', { unit, stream: { ...stream, trial: { failRead: 3 } } }, /read failed at byte \d+ of .*neurons.bin/],
      ['unit', { unit: { ...unit, failJob: 2 }, stream }, /job 2 of the dense unit failed/],
      ['unit, resident', { unit: { ...unit, failJob: 2 } }, /job 2 of the dense unit failed/],
    ] as const) {
      for (const threads of [1, 3]) {
        const engine = await addon.openEngine({ ...request, ...changes, threads } as EngineRequest);
        await t.rejects(stepOf(engine), { code: what === 'read' ? 'NATIVE_IO' : 'NATIVE_UNIT', message: words }, what);
        t.strictSame(await stepOf(engine), expected, `${options.family}, ${what}, ${threads} threads: right again`);
        await engine.close();
      }
    }
  }
});

t.test('requests that do not fit are refused in words', async (t) => {
  const request = await requestOf(join(scratch, 'model-0/bamboo-q4.pi2'));
  const unit = hostUnit(request, [1, 1, 1, 1, 1]);
  const fill = (count: number) => request.expertOffsets.map(() => count);
  const shape = { residentGates: fill(128), hotNeurons: fill(127), coldSlots: fill(0), stagingBytes: 0 };
  for (const [changes, words] of [
    [{ unit: { ...unit, clusters: [2, 1, 1, 1, 1] } }, /more clusters/],
    [{ unit: { ...unit, clusters: [1] } }, /clusters must have 5 entries/],
    [{ unit: { ...unit, clusterNeurons: 100 } }, /do not fit the model/],
    [{ unit: { ...unit, threads: 0 } }, /do not fit the model/],
    [{ unit: { ...unit, kind: 'abacus' } }, /kind must be/],
    [{ unit, mapped: true }, /mapped/],
    [{ unit, stream: { ...shape, mode: 'direct', backend: 'uring', lanes: 2 } }, /hot region does not hold/],
  ] as const) {
    const wrong = { ...request, ...changes } as unknown as EngineRequest;
    await t.rejects(addon.openEngine(wrong), { code: 'NATIVE_ARGUMENT', message: words });
  }
  const engine = await addon.openEngine({ ...request, unit });
  await t.rejects(engine.setUnitSchedule({ clusters: [3, 0, 0, 0, 0] }), {
    code: 'NATIVE_ARGUMENT',
    message: /no room/,
  });
  await engine.close();
  const alone = await addon.openEngine(request);
  await t.rejects(alone.setUnitSchedule({ clusters: [0, 0, 0, 0, 0] }), { message: /no dense unit/ });
  await alone.close();
});
