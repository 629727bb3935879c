// Models that do not fit in memory: plans of memory, neurons streamed from flash bit for bit like resident ones, faults, budgets.
import { execFile } from 'node:child_process';
import { cpSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import fc from 'fast-check';
import t, { type Test } from 'tap';
import { convert } from '../converter/convert.js';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest, NativeEngine, StreamRequest } from '../src/engine/contract.js';
import { Engine, type EngineOptions } from '../src/engine/engine.js';
import { likeliest } from '../src/engine/sampler.js';
import type { QuantizationName } from '../src/format/manifest.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import { CHUNK_NEURONS } from '../src/plan/keep-order.js';
import { buildProgram, finish, jsonLines, runCli, startCli } from './support/cli.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { makeModel } from './support/models.js';
import { oneRun } from './support/one-run.js';
import { REPOSITORY, SHARED_MODEL_NAMES, sharedModel } from './support/shared.js';

const addon = loadAddon();
const scratch = t.testdir();
buildProgram();

/** The request that opening a model would send. */
async function requestOf(model: ModelDirectory, options: Partial<EngineOptions>): Promise<EngineRequest> {
  let captured: EngineRequest | undefined;
  const openEngine = (request: EngineRequest) => {
    captured = request;
    return addon.openEngine(request);
  };
  const engine = await Engine.open(model, { context: 128, threads: 2, ...options }, { ...addon, openEngine });
  await engine.close();
  return captured as EngineRequest;
}

/** Called when a step fails; it is tried again afterwards. */
type OnFault = (error: unknown) => void;
const rethrow: OnFault = (error) => {
  throw error;
};

/** All logits of a prompt, its first tokens in a step of their own, then of `count` greedy tokens. */
async function trace(
  engine: NativeEngine,
  vocab: number,
  count: number,
  onFault = rethrow,
  first = 0,
): Promise<Float32Array[]> {
  const rows: Float32Array[] = [];
  const step = async (tokens: Int32Array, position: number, all: boolean) => {
    const logits = new Float32Array(vocab * (all ? tokens.length : 1));
    for (;;) {
      try {
        await engine.step({ ...oneRun(tokens, position), logits, all });
        break;
      } catch (error) {
        onFault(error);
      }
    }
    rows.push(logits);
    return likeliest(logits.subarray(logits.length - vocab));
  };
  const prompt = Int32Array.from({ length: 20 }, (_, i) => (i * 37 + 5) % vocab);
  if (first > 0) await step(prompt.subarray(0, first), 0, true);
  let token = await step(prompt.subarray(first), first, true);
  if (first > 0) rows.splice(0, 2, Float32Array.of(...rows[0], ...rows[1]));
  for (let i = 0; i < count; i++) token = await step(Int32Array.of(token), prompt.length + i, false);
  return rows;
}

function sameBits(a: readonly Float32Array[], b: readonly Float32Array[]): boolean {
  return a.length === b.length && a.every((row, i) => Buffer.from(row.buffer).equals(Buffer.from(b[i].buffer)));
}

/** Opens a request, traces it, closes it. */
async function traceRequest(
  request: EngineRequest,
  count: number,
  onFault = rethrow,
  first = 0,
): Promise<Float32Array[]> {
  const engine = await addon.openEngine(request);
  try {
    return await trace(engine, request.vocabSize, count, onFault, first);
  } finally {
    await engine.close();
  }
}

/** A request with some plan. */
function streamOf(request: EngineRequest, plan: Partial<StreamRequest>): StreamRequest {
  const banks = request.expertOffsets.length;
  const fill = (count: number) => new Array<number>(banks).fill(count);
  const shape = { residentGates: fill(0), hotNeurons: fill(0), coldSlots: fill(0), stagingBytes: 0 };
  return { ...shape, mode: 'direct', backend: 'uring', lanes: 3, ...plan };
}

/** Any plan of memory, any way to read. */
function anyStream(request: EngineRequest): fc.Arbitrary<Partial<EngineRequest>> {
  const n = request.neuronCount;
  const gates = fc.oneof(
    fc.constant(n),
    fc.integer({ min: 0, max: Math.floor(n / CHUNK_NEURONS) }).map((chunks) => chunks * CHUNK_NEURONS),
  );
  const share = fc.double({ min: 0, max: 1, noNaN: true });
  const bank = fc.record({ gates, hot: share, cold: fc.oneof(fc.constantFrom(0, 1, n), fc.nat(n)) });
  return fc
    .record({
      banks: fc.array(bank, { minLength: request.expertOffsets.length, maxLength: request.expertOffsets.length }),
      stagingBytes: fc.constantFrom(0, 40_000, 1 << 20),
      mode: fc.constantFrom('direct' as const, 'buffered' as const),
      backend: fc.constantFrom('threads' as const, 'uring' as const),
      lanes: fc.integer({ min: 1, max: 5 }),
      threads: fc.integer({ min: 1, max: 3 }),
      delayUs: fc.constantFrom(0, 0, 0, 30),
    })
    .map(({ banks, threads, delayUs, ...rest }) => ({
      threads,
      stream: {
        residentGates: banks.map((b) => b.gates),
        hotNeurons: banks.map((b) => Math.floor(b.hot * b.gates)),
        coldSlots: banks.map((b) => b.cold),
        ...rest,
        trial: { delayUs },
      },
    }));
}

/** Streams a model in `numRuns` random ways; every logit of `count` greedy tokens must be the resident one. */
async function expectIdentity(t: Test, directory: string, count: number, numRuns: number): Promise<void> {
  const model = await openModelDirectory(directory);
  const request = await requestOf(model, {});
  t.equal(request.stream, undefined, 'resident when it fits');
  const expected = await traceRequest(request, count);
  // What is kept comes in with the first steps of an engine: with a whole prompt, one token, or a few.
  const property = fc.asyncProperty(anyStream(request), fc.constantFrom(0, 1, 3), async (changes, first) => {
    return sameBits(await traceRequest({ ...request, ...changes }, count, rethrow, first), expected);
  });
  const result = await fc.check(property, { numRuns });
  t.equal(
    result.failed,
    false,
    `${model.manifest.name}: ${JSON.stringify(result.counterexample)} ${result.errorInstance}`,
  );
}

const RANDOM_MODELS: [CheckpointOptions, QuantizationName][] = [
  [{ family: 'bamboo', hidden: 160, heads: 5, neurons: 300, context: 300 }, 'q4'],
  [{ family: 'turbosparsemixtral', hidden: 192, headDim: 32, neurons: 130, experts: 5 }, 'q8'],
  [{ family: 'mixtral', hidden: 96, neurons: 70, experts: 3 }, 'q4'],
  [{ family: 'llama', hidden: 288, neurons: 129 }, 'f16'],
  [{ family: 'sparsellama', hidden: 96, neurons: 257 }, 'q8'],
  [{ family: 'opt', hidden: 96, neurons: 191 }, 'f16'],
  [{ family: 'opt', hidden: 320, heads: 5, neurons: 64 }, 'q4'],
];

t.test('odd shapes of every family: streamed is resident, bit for bit', async (t) => {
  for (const [i, [options, quantization]] of RANDOM_MODELS.entries()) {
    const directory = await makeModel(join(scratch, `model-${i}`), { ...options, seed: i + 1 }, quantization);
    await expectIdentity(t, directory, 24, 12);
  }
});

t.test('trained models, 64 greedy tokens: streamed is resident, bit for bit', async (t) => {
  const trained: [string, string][] = [['demo', join(REPOSITORY, 'demo', 'stories-drelu')]];
  for (const name of SHARED_MODEL_NAMES) {
    const checkpoint = sharedModel(name);
    if (checkpoint !== null) trained.push([name, checkpoint]);
    else t.comment(`${name} is not on this machine`);
  }
  for (const [name, checkpoint] of trained) {
    const output = join(scratch, `${name}.pi2`);
    const request = { checkpoint, output, quantization: 'q4', maxMemoryBytes: 2 ** 31, force: true } as const;
    await convert(request, () => {}, new AbortController().signal);
    await expectIdentity(t, output, 64, 4);
  }
});

t.test('what the planner counts is what the engine takes; the least really opens', async (t) => {
  for (const name of ['model-0/bamboo-q4.pi2', 'model-2/mixtral-q4.pi2', 'model-5/opt-f16.pi2']) {
    const model = await openModelDirectory(join(scratch, name));
    const plans = [{}, { loadMode: 'direct' }, { memory: { kind: 'min' }, loadMode: 'buffered' }] as const;
    for (const options of plans) {
      const request = await requestOf(model, options);
      const engine = await addon.openEngine(request);
      const { weightBytes, kvBytes, scratchBytes } = engine.counters();
      t.match(
        addon.memoryNeeded(request),
        { weightBytes, kvBytes, scratchBytes },
        `${name} ${JSON.stringify(options)}`,
      );
      await engine.close();
    }
    const least = await requestOf(model, { memory: { kind: 'min' }, loadMode: 'direct' });
    t.equal(Math.max(...(least.stream as StreamRequest).residentGates), 0);
    t.ok((await traceRequest(least, 3)).length === 4);
    const little = { context: 128, threads: 1, memory: { kind: 'bytes', bytes: 1e6 } } as const;
    await t.rejects(Engine.open(model, little), {
      code: 'E_MEMORY',
      hint: /--memory \d+M; or a smaller context with -c/,
    });
    const resident = { ...little, loadMode: 'resident' } as const;
    await t.rejects(Engine.open(model, resident), { code: 'E_MEMORY', hint: /leave --load-mode out/ });
  }
  const request = await requestOf(await openModelDirectory(join(scratch, 'model-0/bamboo-q4.pi2')), {});
  const plans: [Partial<StreamRequest>, Partial<EngineRequest>][] = [
    [{ coldSlots: [1] }, {}],
    [{ residentGates: [63, 0] }, {}],
    [{ hotNeurons: [1, 0] }, {}],
    [{}, { checksums: { ...request.checksums, offsets: [0] } }],
    [{}, { checksums: { ...request.checksums, extents: [] } }],
  ];
  for (const [plan, changes] of plans) {
    const wrong = { ...request, ...changes, stream: streamOf(request, plan) };
    await t.rejects(addon.openEngine(wrong), { code: 'NATIVE_ARGUMENT' }, JSON.stringify([plan, changes]));
  }
});

t.test('a read that fails or ends early: words, a code, and the next step is right', async (t) => {
  for (const name of ['model-0/bamboo-q4.pi2', 'model-1/turbosparsemixtral-q8.pi2', 'model-3/llama-f16.pi2']) {
    const request = await requestOf(await openModelDirectory(join(scratch, name)), {});
    const expected = await traceRequest(request, 12);
    const kinds = fc.constantFrom('failRead' as const, 'shortRead' as const);
    const gates = fc.constantFrom(0, CHUNK_NEURONS, request.neuronCount);
    const backend = fc.constantFrom('threads' as const, 'uring' as const);
    const property = fc.asyncProperty(
      kinds,
      fc.integer({ min: 1, max: 12 }),
      gates,
      backend,
      async (kind, at, g, b) => {
        const banks = request.expertOffsets.length;
        const kept = { residentGates: Array(banks).fill(g), coldSlots: Array(banks).fill(20) };
        const stream = streamOf(request, { ...kept, backend: b, trial: { [kind]: at } });
        const faults: unknown[] = [];
        const rows = await traceRequest({ ...request, stream }, 12, (error) => faults.push(error));
        t.equal(faults.length, 1);
        const words = kind === 'failRead' ? /read failed at byte \d+ of .*neurons.bin: / : /the file ends at byte \d+/;
        t.match(faults[0], { code: 'NATIVE_IO', message: words });
        t.ok(sameBits(rows, expected), `${name}: ${kind} ${at}`);
      },
    );
    await fc.assert(property, { numRuns: 12 });
  }
});

/** A copy of a model that a test may damage. */
function copyOf(name: string, copy: string): string {
  cpSync(join(scratch, name), join(scratch, copy), { recursive: true });
  return join(scratch, copy);
}

t.test('flash that changes while it is read: checksums find it, a shortened file is said', async (t) => {
  for (const name of ['model-0/bamboo-q4.pi2', 'model-1/turbosparsemixtral-q8.pi2']) {
    const directory = copyOf(name, `changing-${name.split('/')[1]}`);
    const model = await openModelDirectory(directory);
    const request = await requestOf(model, {});
    const expected = await traceRequest(request, 6);
    const neurons = join(directory, 'neurons.bin');
    const intact = readFileSync(neurons);
    const { layout } = request;
    // One bit of each neuron of layer 1: of its gate, or of its up weights.
    const flipped = (inside: (slot: number) => number) => {
      const bytes = Buffer.from(intact);
      const from = request.expertOffsets[request.expertCount];
      for (let unit = from; unit < bytes.length; unit += layout.unitBytes) {
        for (let slot = 0; slot < layout.neuronsPerUnit; slot++) bytes[unit + inside(slot)] ^= 4;
      }
      return bytes;
    };
    const part1 = flipped((slot) => slot * layout.part1Stride);
    const part2 = flipped((slot) => layout.part2Offset + slot * layout.part2Stride + 3);
    const damages: [Buffer, number, string, RegExp][] = [
      [part1, 0, 'NATIVE_CHECKSUM', /layer 1,( expert \d,)? neuron \d+ of .*neurons.bin.*do not match/],
      [part2, 0, 'NATIVE_CHECKSUM', /layer 1,( expert \d,)? neuron \d+ of /],
      [part2, request.neuronCount, 'NATIVE_CHECKSUM', /layer 1,( expert \d,)? neuron \d+ of /],
      [intact.subarray(0, 8192), 0, 'NATIVE_IO', /the file ends at byte \d+/],
      [intact.subarray(0, 1000), request.neuronCount, 'NATIVE_IO', /the file ends at byte \d+/],
    ];
    for (const mode of ['direct', 'buffered'] as const) {
      for (const [damage, gates, code, words] of damages) {
        const banks = request.expertOffsets.length;
        const residentGates = Array(banks).fill(gates);
        const stream = streamOf(request, { residentGates, mode });
        const engine = await addon.openEngine({ ...request, stream });
        writeFileSync(neurons, damage);
        const faults: unknown[] = [];
        const rows = await trace(engine, request.vocabSize, 6, (error) => {
          faults.push(error);
          writeFileSync(neurons, intact);
        });
        await engine.close();
        t.equal(faults.length, 1);
        t.match(faults[0], { code, message: words });
        t.ok(sameBits(rows, expected), `${name}, ${mode}: right again after ${code}`);
      }
    }
  }
});

t.test('the command line: budgets are kept, too little is refused', async (t) => {
  const model = join(scratch, 'demo.pi2');
  const run = (...args: string[]) =>
    runCli('run', '-m', model, '--tokens', '1,420,439', '-n', '60', '--temp', '0', '--json', ...args);
  const whole = jsonLines((await run()).stdout);
  const report = whole.at(-1);
  t.match(report, { load_mode: 'resident', gates_resident_share: 1, hot_hit_share: null, flash_reads_per_token: null });
  t.ok(report.peak_memory_bytes <= report.memory_budget_bytes);
  const ids = (lines: { type: string; id?: number }[]) => lines.filter((l) => l.type === 'token').map((l) => l.id);
  for (const args of [
    ['--memory', 'min'],
    ['--memory', 'min', '--load-mode', 'buffered'],
    ['--load-mode', 'direct', '--memory', '50%'],
  ]) {
    const { status, stdout, stderr } = await run(...args);
    t.equal(status, 0, stderr);
    const lines = jsonLines(stdout);
    t.strictSame(ids(lines), ids(whole), args.join(' '));
    const streamed = lines.at(-1);
    t.ok(streamed.peak_memory_bytes <= streamed.memory_budget_bytes, `${args}: peak ${streamed.peak_memory_bytes}`);
    t.match(stderr, /neurons from flash: (direct|buffered), /);
    t.match(streamed.storage, /^(direct|buffered), (io_uring|\d+ threads)$/);
    const shares = streamed.hot_hit_share + streamed.cold_hit_share + streamed.miss_share;
    t.ok(Math.abs(shares - 1) < 1e-9);
    t.ok(streamed.flash_read_bytes_per_token >= streamed.flash_asked_bytes_per_token);
    t.ok(streamed.stall_share >= 0 && streamed.stall_share <= 1, `${streamed.stall_share}`);
  }
  const refused = await run('--memory', '20M');
  t.match(refused, {
    status: 5,
    stdout: '',
    stderr: /take \d+M, the budget is 20.0 MiB\nhint: the least that would do/,
  });
  const least = /--memory (\d+M)/.exec(refused.stderr)?.[1] as string;
  t.equal((await run('--memory', least)).status, 0, 'the least that is named does');
  t.match(await run('--memory', 'lots'), { status: 2, stderr: /no amount of memory/ });
  t.match(await run('--load-mode', 'drect'), { status: 2, stderr: /did you mean direct\?/ });
  const text = join(scratch, 'text.txt');
  writeFileSync(text, 'Once upon a time there was a cat. '.repeat(30));
  const perplexity = (...args: string[]) => runCli('perplexity', '-m', model, '-f', text, ...args);
  t.equal((await perplexity('--memory', 'min')).stdout, (await perplexity()).stdout);
  const logits = async (name: string, ...args: string[]) => {
    const file = join(scratch, name);
    const { status } = await runCli('eval', '-m', model, '--tokens', '1,420,439,7', '--logits', file, ...args);
    return status === 0 && readFileSync(file);
  };
  t.strictSame(await logits('streamed.f32', '--load-mode', 'direct'), await logits('resident.f32'));
});

t.test('the command line: flash that fails ends the run with words, and no token after it', async (t) => {
  const { stdout } = await runCli(...longRun(join(scratch, 'model-0/bamboo-q4.pi2')));
  const expected = jsonLines(stdout).map((line) => line.id);
  const cases: [(file: string) => void, number, RegExp][] = [
    [(file) => truncateSync(file, 4096), 5, /cannot compute: the file ends at byte \d+ of .*neurons.bin/],
    [
      (file) =>
        writeFileSync(
          file,
          readFileSync(file).map((byte) => byte ^ 1),
          // In place: a file that is emptied and written again would be shorter for a moment.
          { flag: 'r+' },
        ),
      4,
      /cannot compute: layer \d+, neuron \d+ of .*do not match their checksum/,
    ],
  ];
  for (const [i, [damage, status, words]] of cases.entries()) {
    const directory = copyOf('model-0/bamboo-q4.pi2', `failing-${i}.pi2`);
    const child = startCli([...longRun(directory), '--memory', 'min', '--load-mode', 'direct']);
    child.stdout?.once('data', () => damage(join(directory, 'neurons.bin')));
    const finished = await finish(child);
    t.equal(finished.status, status, finished.stderr);
    t.match(finished.stderr, words);
    const ids = jsonLines(finished.stdout).map((line) => line.id);
    t.ok(ids.length > 0 && ids.length < expected.length);
    t.strictSame(ids, expected.slice(0, ids.length));
  }
});

function longRun(directory: string): string[] {
  const run = ['run', '-m', directory, '--tokens', '1,5,9', '-n', '3000', '-c', '4000', '--temp', '0', '--ignore-eos'];
  return [...run, '--json', '--no-report', '-t', '1'];
}

const compile = promisify(execFile);
const SANITIZERS = { 'AddressSanitizer and UBSan': 'address,undefined', ThreadSanitizer: 'thread' };

for (const [sanitizer, flag] of Object.entries(SANITIZERS)) {
  for (const room of ['cache', 'storage']) {
    t.test(`native/${room} under ${sanitizer}`, async (t) => {
      const native = join(REPOSITORY, 'native');
      const flags = ['-std=c++20', '-O1', '-g', '-fno-exceptions', '-fno-rtti', `-I${REPOSITORY}`];
      const directory = t.testdir();
      const program = join(directory, 'program');
      const link = [`-fsanitize=${flag}`, '-fno-sanitize-recover=all', '-o', program];
      try {
        const sources = `${native}/${room}/*.cc ${native}/base/memory.cc`;
        await compile('sh', ['-c', `exec g++ "$@" ${sources}`, 'sh', ...flags, ...link]);
      } catch (error) {
        if (!/not found|cannot find -l/.test(String(error))) throw error;
        t.pass(`not run: no g++ with ${sanitizer} here`);
        return;
      }
      const { stdout } = await compile(program, room === 'storage' ? [join(directory, 'pages')] : []);
      t.match(stdout, /^[1-9]\d+ checks, 0 failed\n$/);
    });
  }
}
