// The baseline `--engine mmap`: files mapped, every neuron computed where it lies. The same bits as with all neurons in memory.
import { cpSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest } from '../src/engine/contract.js';
import { Engine } from '../src/engine/engine.js';
import type { QuantizationName } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { buildProgram, finish, jsonLines, runCli, startCli } from './support/cli.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY, makeModel } from './support/models.js';
import { oneRun } from './support/one-run.js';

const addon = loadAddon();
const scratch = t.testdir();
buildProgram();

const TOKENS = Array.from({ length: 30 }, (_, i) => (i * 41 + 7) % MODEL_VOCABULARY);
/** Units of one neuron and of many, parts apart and side by side. */
const MODELS: [CheckpointOptions, QuantizationName][] = [
  [{ family: 'bamboo', hidden: 160, heads: 5, neurons: 300, context: 4000 }, 'q4'],
  [{ family: 'bamboo', hidden: 4096, heads: 4, headDim: 16, neurons: 130, layers: 1 }, 'q4'],
  [{ family: 'qwen3', hidden: 1280, heads: 4, headDim: 16, neurons: 140, layers: 1 }, 'q8'],
  [{ family: 'turbosparsemixtral', hidden: 192, headDim: 32, neurons: 130, experts: 5 }, 'q8'],
  [{ family: 'mixtral', hidden: 96, neurons: 70, experts: 3 }, 'q4'],
  [{ family: 'llama', hidden: 2048, heads: 4, headDim: 16, neurons: 129, layers: 1 }, 'f16'],
  [{ family: 'sparsellama', hidden: 96, neurons: 257 }, 'q8'],
  [{ family: 'opt', hidden: 96, neurons: 191 }, 'f16'],
  [{ family: 'opt', hidden: 320, heads: 5, neurons: 64 }, 'q4'],
];
const directories = await Promise.all(
  MODELS.map(([options, quantization], i) =>
    makeModel(join(scratch, `model-${i}`), { ...options, seed: i + 1 }, quantization),
  ),
);

/** The request that opening a model with an engine would send. */
async function requestOf(directory: string, engine: 'pi2' | 'mmap'): Promise<EngineRequest> {
  let captured: EngineRequest | undefined;
  const openEngine = (request: EngineRequest) => {
    captured = request;
    return addon.openEngine(request);
  };
  const options = { context: 64, threads: 2, engine };
  await (await Engine.open(await openModelDirectory(directory), options, { ...addon, openEngine })).close();
  return captured as EngineRequest;
}

/** Logits of all tokens and which neurons fired, in steps of `piece`. */
async function run(request: EngineRequest, piece: number): Promise<Buffer> {
  const engine = await addon.openEngine(request);
  const { vocabSize } = request;
  const logits = new Float32Array(TOKENS.length * vocabSize);
  const firedBytes = request.layerCount * request.expertCount * Math.ceil(request.neuronCount / 8);
  const fired = new Uint8Array(TOKENS.length * firedBytes);
  for (let position = 0; position < TOKENS.length; position += piece) {
    const tokens = Int32Array.from(TOKENS.slice(position, position + piece));
    const end = position + tokens.length;
    const rows = logits.subarray(position * vocabSize, end * vocabSize);
    const bits = fired.subarray(position * firedBytes, end * firedBytes);
    await engine.step({ ...oneRun(tokens, position), logits: rows, all: true, fired: bits });
  }
  await engine.close();
  return Buffer.concat([Buffer.from(logits.buffer), fired]);
}

t.test('every family and encoding, packing, kernels, threads and batch: resident, bit for bit', async (t) => {
  const packings = new Set<string>();
  for (const directory of directories) {
    const resident = await requestOf(directory, 'pi2');
    const mapped = await requestOf(directory, 'mmap');
    t.strictSame(mapped, { ...resident, mapped: true });
    const { neuronsPerUnit, part2Offset, part1Bytes } = resident.layout;
    packings.add(`${neuronsPerUnit === 1 ? 'one' : 'many'}, ${part2Offset === part1Bytes ? 'joint' : 'split'}`);
    for (const kernelSet of addon.cpu().kernelSets) {
      const expected = await run({ ...resident, kernelSet }, TOKENS.length);
      for (const [threads, piece, batchSize] of [
        [1, 1, 128],
        [3, TOKENS.length, 128],
        [2, 11, 5],
      ]) {
        const found = await run({ ...mapped, kernelSet, threads, batchSize }, piece);
        t.ok(found.equals(expected), `${directory}: ${kernelSet}, ${threads} threads, steps of ${piece}`);
      }
    }
  }
  t.ok(packings.has('one, split') && packings.has('many, joint'), [...packings].join('; '));
});

t.test('every weight is read for every token, and none of its memory is the engine’s', async (t) => {
  const request = await requestOf(directories[0], 'mmap');
  const engine = await addon.openEngine(request);
  const logits = new Float32Array(request.vocabSize);
  await engine.step({ ...oneRun(Int32Array.of(1), 0), logits, all: false });
  const { weightBytes, kvBytes, scratchBytes, weightBytesRead, majorFaults } = engine.counters();
  await engine.close();
  t.match(addon.memoryNeeded(request), { weightBytes, kvBytes, scratchBytes });
  t.equal(weightBytes, 0);
  t.ok(majorFaults >= 0);
  const neurons = request.layerCount * request.neuronCount * (request.layout.part1Bytes + request.layout.part2Bytes);
  const resident = await addon.openEngine(await requestOf(directories[0], 'pi2'));
  await resident.step({ ...oneRun(Int32Array.of(1), 0), logits, all: false });
  const sparse = resident.counters();
  await resident.close();
  t.ok(weightBytesRead > neurons && sparse.weightBytesRead < weightBytesRead);
});

/** A copy of a model that a test may damage. */
function copyOf(directory: string, name: string): string {
  const copy = join(scratch, name);
  cpSync(directory, copy, { recursive: true });
  return copy;
}

t.test('a wrong byte is found at open; a file shortened later fails every step, in words', async (t) => {
  for (const [i, name] of ['neurons.bin', 'resident.bin'].entries()) {
    const directory = copyOf(directories[0], `damaged-${i}.pi2`);
    const file = join(directory, name);
    const request = await requestOf(directory, 'mmap');
    const intact = readFileSync(file);
    const wrong = Buffer.from(intact);
    wrong[5000] ^= 1;
    writeFileSync(file, wrong);
    await t.rejects(addon.openEngine(request), { code: 'NATIVE_CHECKSUM' }, name);
    writeFileSync(file, intact);
    const engine = await addon.openEngine(request);
    const logits = new Float32Array(request.vocabSize);
    const step = () => engine.step({ ...oneRun(Int32Array.of(1), 0), logits, all: false });
    await step();
    truncateSync(file, 4096);
    const words = /(neurons|resident)\.bin could not be read any more: it was shortened, or the device failed/;
    await t.rejects(step(), { code: 'NATIVE_IO', message: words }, name);
    writeFileSync(file, intact);
    await t.rejects(step(), { code: 'NATIVE_IO', message: words }, 'what was lost stays lost');
    await engine.close();
    const again = await addon.openEngine(request);
    await again.step({ ...oneRun(Int32Array.of(1), 0), logits, all: false });
    await again.close();
    truncateSync(file, 4096);
    await t.rejects(addon.openEngine(request), { code: 'NATIVE_IO', message: /ends before/ }, 'at open');
  }
  const request = await requestOf(directories[0], 'mmap');
  const stream = { residentGates: [0, 0], hotNeurons: [0, 0], coldSlots: [0, 0], stagingBytes: 0, lanes: 1 };
  const both = { ...request, stream: { ...stream, mode: 'direct', backend: 'threads' } } as const;
  await t.rejects(addon.openEngine(both), { code: 'NATIVE_ARGUMENT', message: /without stream/ });
});

t.test('the command line: the same tokens, perplexity and logits, and a report that says how', async (t) => {
  const model = directories[0];
  const run = (...args: string[]) =>
    runCli('run', '-m', model, '--tokens', '1,5,9', '-n', '40', '--temp', '0', '--json', '--ignore-eos', ...args);
  // Prompts of mapped models are not the matrix unit's.
  const cpu = [
    '--cpu',
    loadAddon()
      .cpu()
      .kernelSets.findLast((set) => set !== 'amx') as string,
  ];
  const mapped = await run('--engine', 'mmap', ...cpu);
  t.equal(mapped.status, 0, mapped.stderr);
  t.match(mapped.stderr, /weights mapped in .*\n.*\n.*the kernel decides what is in memory/);
  const lines = jsonLines(mapped.stdout);
  const ids = (text: string) => jsonLines(text).flatMap((line) => (line.type === 'token' ? [line.id] : []));
  t.strictSame(ids(mapped.stdout), ids((await run(...cpu)).stdout));
  t.match(lines.at(-1), { load_mode: 'mmap', storage: 'mmap', weight_bytes: 0, flash_reads_per_token: null });
  t.equal(lines.at(-1).gates_resident_share, null);
  t.ok(lines.at(-1).major_faults_per_token >= 0);
  const human = await runCli(
    'run',
    '-m',
    model,
    '--tokens',
    '1,5',
    '-n',
    '3',
    '--ignore-eos',
    '--engine',
    'mmap',
    '--memory',
    'min',
  );
  t.match(
    human.stderr,
    /load mode +mmap, what is in memory is up to the kernel’s page cache; [\d.]+ major page faults/,
  );
  t.match(await run('--engine', 'mmap', '--memory', '20M'), { status: 5, stderr: /take \d+M, the budget is 20.0 MiB/ });
  const wrong: [string[], RegExp][] = [
    [['--engine', 'mmpa'], /Expected one of pi2, mmap, llmflash.\nhint: did you mean mmap\?/],
    [['--engine', 'mmap', '--load-mode', 'direct'], /--engine mmap cannot have --load-mode direct/],
  ];
  for (const [args, words] of wrong) t.match(await run(...args), { status: 2, stdout: '', stderr: words });
  const text = join(scratch, 'text.txt');
  writeFileSync(text, 'Once upon a time there was a cat. '.repeat(9));
  const perplexity = (...args: string[]) => runCli('perplexity', '-m', model, '-f', text, ...args);
  t.equal((await perplexity('--engine', 'mmap')).stdout, (await perplexity()).stdout);
  const logits = async (engine: string) => {
    const file = join(scratch, `${engine}.f32`);
    const { status } = await runCli('eval', '-m', model, '--tokens', '1,4,9', '--logits', file, '--engine', engine);
    return status === 0 && readFileSync(file);
  };
  t.strictSame(await logits('mmap'), await logits('pi2'));
});

t.test('the command line: a file shortened while it runs ends it with words, and no token after it', async (t) => {
  const args = (directory: string) => [
    ...['run', '-m', directory, '--tokens', '1,5,9', '-n', '3000', '--temp', '0', '--ignore-eos', '--json'],
    ...['--no-report', '-t', '1', '--engine', 'mmap'],
  ];
  const expected = jsonLines((await runCli(...args(directories[0]))).stdout).map((line) => line.id);
  const directory = copyOf(directories[0], 'shortened.pi2');
  const child = startCli(args(directory));
  child.stdout?.once('data', () => truncateSync(join(directory, 'neurons.bin'), 4096));
  const { status, stdout, stderr } = await finish(child);
  t.equal(status, 5, stderr);
  t.match(stderr, /cannot compute: .*neurons.bin could not be read any more/);
  const ids = jsonLines(stdout).map((line) => line.id);
  t.ok(ids.length > 0 && ids.length < expected.length);
  t.strictSame(ids, expected.slice(0, ids.length));
});
