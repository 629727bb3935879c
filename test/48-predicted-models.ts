// Model directories that have a predictor: when it is used, at which operating point, and what is said when it is not.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineMemory, EngineRequest, NativeAddon } from '../src/engine/contract.js';
import type { StreamCounters } from '../src/engine/counters.js';
import { Engine, type EngineOptions } from '../src/engine/engine.js';
import { type Manifest, type OperatingPoint, PREDICTOR_FILE, type PredictorEntry } from '../src/format/manifest.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import { leastMemory, type MemoryQuestion, planMemory } from '../src/plan/memory-plan.js';
import { buildProgram, jsonLines, runCli } from './support/cli.js';
import { makeModel } from './support/models.js';
import { randomPredictor } from './support/predictor.js';

const addon = loadAddon();
const scratch = t.testdir();
buildProgram();

const OPTIONS: EngineOptions = { context: 64, threads: 2 };
/** What plans of these tests count as the process. */
const MIB = 2 ** 20;

interface Opened {
  engine: Engine;
  request: EngineRequest;
}

/** Opens a model; with the request that was sent. */
async function open(
  model: ModelDirectory,
  options: Partial<EngineOptions>,
  changed: Partial<NativeAddon> = {},
): Promise<Opened> {
  let request: EngineRequest | undefined;
  const openEngine = (sent: EngineRequest) => {
    request = sent;
    return addon.openEngine(sent);
  };
  const engine = await Engine.open(model, { ...OPTIONS, ...options }, { ...addon, openEngine, ...changed });
  t.teardown(() => engine.close().catch(() => {}));
  return { engine, request: request as EngineRequest };
}

function enlarged(memory: EngineMemory): EngineMemory {
  const sum = Object.values(memory).reduce((total, bytes) => total + bytes, 0);
  return { weightBytes: 1e4 * sum, kvBytes: 0, scratchBytes: 0, unitBytes: 0, loadBytes: 0 };
}

/** An operating point; with thresholds of -Infinity in the file as the lowest number there is, every neuron is computed. */
function point(kept_share: number, layers: number, threshold = -Number.MAX_VALUE): OperatingPoint {
  const thresholds = Array<number>(layers).fill(threshold);
  return {
    kept_share,
    memory_thresholds: thresholds,
    flash_thresholds: thresholds,
    computed_share: 1,
    fetched_share: 1,
    magnitude_share: 1,
    perplexity: 10.05,
  };
}

/** A model with a predictor of random weights and these operating points. */
async function modelWith(name: string, shares: number[], threshold?: number): Promise<ModelDirectory> {
  const directory = await makeModel(join(scratch, name), { family: 'bamboo', hidden: 96, neurons: 300 }, 'q8');
  const plain = await openModelDirectory(directory);
  const { request } = await open(plain, {});
  const predictor = await randomPredictor(addon, request, join(directory, PREDICTOR_FILE));
  const manifest: Manifest = JSON.parse(readFileSync(join(directory, 'model.json'), 'utf8'));
  const { layer_count } = manifest.hyperparameters;
  const entry: PredictorEntry = {
    source: 'trained',
    input: predictor.input,
    fc1: 'q8',
    fc2: 'q8',
    ranks: Array.from({ length: layer_count }, (_, layer) => 24 + 8 * layer),
    quality: { budget: 0.01, text_sha256: '0'.repeat(64), tokens: 100, exact_perplexity: 10 },
    points: shares.map((share) => point(share, layer_count, threshold)),
    curve: [],
  };
  const extents = predictor.extents.map(({ name, offset, bytes, crc32 }) => {
    return { name, file: PREDICTOR_FILE, offset, bytes, crc32: crc32.toString(16).padStart(8, '0') } as const;
  });
  const tensors = predictor.tensors.map(({ offset, ...rest }) => {
    const extent = rest.name.replace(/\.\w+$/, '');
    const begin = predictor.extents.find(({ name }) => name === extent)?.offset ?? 0;
    return { ...rest, extent, offset: offset - begin };
  });
  const changed = {
    ...manifest,
    predictor: entry,
    extents: [...manifest.extents, ...extents],
    tensors: [...manifest.tensors, ...tensors],
  };
  writeFileSync(join(directory, 'model.json'), JSON.stringify(changed));
  return openModelDirectory(directory);
}

/** All logits of some tokens. */
async function logitsOf(engine: Engine, exact = false): Promise<Buffer> {
  const tokens = Int32Array.from({ length: 30 }, (_, i) => (i * 37 + 5) % engine.vocabSize);
  const logits = new Float32Array(tokens.length * engine.vocabSize);
  await engine.step(tokens, 0, logits, { all: true, exact });
  return Buffer.from(logits.buffer);
}

t.test('in memory: the last point; --exact does not even read the predictor', async (t) => {
  const model = await modelWith('all', [0, 0.5, 1]);
  const predicted = await open(model, {});
  t.equal(predicted.engine.operatingPoint?.kept_share, 1);
  t.equal(predicted.engine.notice, null);
  t.equal(predicted.request.predictor?.extents.length, model.manifest.hyperparameters.layer_count);
  t.notOk(predicted.request.extents.some(({ file }) => file === 'predictor'));
  t.notOk(predicted.request.tensors.some(({ name }) => name.includes('.predictor.')));
  const exact = await open(model, { exact: true });
  t.equal(exact.request.predictor, undefined);
  t.strictSame([exact.engine.operatingPoint, exact.engine.notice], [null, null]);
  t.ok((await logitsOf(exact.engine)).equals(await logitsOf(predicted.engine)), 'with all neurons chosen they agree');
  t.ok((predicted.engine.counters().predictor?.scored ?? 0) > 0);

  const some = await open(await modelWith('some', [1], 0), {});
  const changed = await logitsOf(some.engine);
  t.notOk(changed.equals(await logitsOf(some.engine, true)), 'thresholds of 0 leave neurons out');
  t.ok((await logitsOf(some.engine, true)).equals(await logitsOf(exact.engine)), 'an exact step does not');
});

t.test('from flash: the more memory the larger the point; with all neurons chosen it is exact mode', async (t) => {
  const model = await modelWith('flash', [0, 0.3, 0.6, 0.9]);
  const exact = await logitsOf((await open(model, { exact: true })).engine);
  // Bytes count ten thousandfold, so that the process, whose size is never quite the same, counts for nothing.
  const large = { memoryNeeded: (request: EngineRequest) => enlarged(addon.memoryNeeded(request)) };
  const least = await open(model, { loadMode: 'direct', memory: { kind: 'min' } }, large);
  t.equal(least.engine.operatingPoint?.kept_share, 0);
  t.ok((await logitsOf(least.engine)).equals(exact));
  const shares: number[] = [];
  for (const extra of [0.2, 1, 2, 3, 4, 8]) {
    const bytes = least.engine.budgetBytes + extra * 2 ** 30;
    const { engine, request } = await open(model, { loadMode: 'direct', memory: { kind: 'bytes', bytes } }, large);
    const { hotNeurons = [], residentGates = [] } = request.stream ?? {};
    const share = engine.operatingPoint?.kept_share ?? Number.NaN;
    shares.push(share);
    t.ok(hotNeurons.every((hot) => hot >= share * request.neuronCount));
    t.equal(Math.max(...residentGates), 0);
    t.match(addon.memoryNeeded(request), {
      weightBytes: engine.counters().weightBytes,
      scratchBytes: engine.counters().scratchBytes,
    });
    t.ok((await logitsOf(engine)).equals(exact), `kept ${share}`);
    t.equal(engine.regions?.gatesBytes, 0);
  }
  t.ok(
    shares.every((share, i) => i === 0 || share >= shares[i - 1]),
    `${shares}`,
  );
  t.equal(shares.at(-1), 0.9);
  const whole = await open(model, { loadMode: 'direct' });
  t.equal(whole.engine.regions?.rowsShare, 1);
  t.equal(whole.request.stream?.prefetchBytes, 2 * MIB, 'with plenty, guesses are read ahead');
});

t.test('points that want more in memory than there is: exact mode, and a line that says so', async (t) => {
  const model = await modelWith('high', [0.5, 1]);
  const { engine, request } = await open(model, { loadMode: 'direct', memory: { kind: 'min' } });
  t.equal(request.predictor, undefined);
  t.match(engine.notice, /predictor is left out, its thresholds want 50 % of the neurons in memory: every neuron/);
  t.ok((await logitsOf(engine)).equals(await logitsOf((await open(model, { exact: true })).engine)));
  const run = await runCli(
    'run',
    '-m',
    model.path,
    '--tokens',
    '1,2',
    '-n',
    '8',
    '--json',
    '--memory',
    'min',
    '--load-mode',
    'direct',
  );
  t.match(run, { status: 0, stderr: /predictor is left out/ });
  t.equal(jsonLines(run.stdout).at(-1).kept_share, null);
});

t.test('too little memory for the predictor: exact mode takes less', async (t) => {
  const model = await modelWith('little', [0, 1]);
  // An engine for which a predictor is large, so that the process's own size does not matter.
  const memoryNeeded = (request: EngineRequest) => ({
    ...addon.memoryNeeded({ ...request, predictor: undefined } as never),
    loadBytes: request.predictor === undefined ? 0 : 1000 * MIB,
  });
  const options = { ...OPTIONS, memory: { kind: 'bytes', bytes: 900 * MIB } } as const;
  const engine = await Engine.open(model, options, { ...addon, memoryNeeded });
  t.match(engine.notice, /predictor is left out, with it the model takes \d+M: every neuron that fires is computed/);
  t.equal(engine.operatingPoint, null);
  await engine.close();
});

t.test('the point in use is the largest whose neurons stay in every bank', (t) => {
  const question: MemoryQuestion = {
    bankCount: 3,
    neuronCount: 100,
    contextLength: 1,
    costs: { gateBytes: 1, rowsBytes: 2, wholeReadBytes: 3, rowsReadBytes: 3 },
    processBytes: 0,
    mode: 'stream',
    budgetBytes: 0,
    keptShares: [0.1, 0.25, 0.5],
    measure: (_, shape) =>
      30 * [...(shape?.hotNeurons ?? []), ...(shape?.coldSlots ?? [])].reduce((sum, count) => sum + count, 0),
  };
  const least = leastMemory(question);
  t.equal(least, 0);
  const hotOf = (neurons: number) => {
    const plan = planMemory({ ...question, budgetBytes: 30 * neurons * (16 / 15) });
    return plan.kind === 'streamed' ? plan.shape.hotNeurons : [];
  };
  t.strictSame(hotOf(29), [0, 0, 0]);
  t.strictSame(hotOf(30), [10, 10, 10]);
  t.strictSame(hotOf(74), [10, 10, 10]);
  t.strictSame(hotOf(76), [25, 25, 25]);
  t.strictSame(hotOf(160), [50, 50, 50]);
  t.end();
});

t.test('the commands: run predicts what it generates, eval and perplexity predict, --exact does not', async (t) => {
  const model = await modelWith('commands', [1], 0);
  const run = async (...args: string[]) => {
    const { stdout, stderr, status } = await runCli(
      'run',
      '-m',
      model.path,
      '--tokens',
      '1,2,3',
      '-n',
      '12',
      '--temp',
      '0',
      '--ignore-eos',
      '--json',
      ...args,
    );
    t.equal(status, 0, stderr);
    return { report: jsonLines(stdout).at(-1), stderr };
  };
  const predicted = await run();
  t.match(
    predicted.stderr,
    /neurons are predicted: measured, perplexity grows by 0.5 %; --exact computes all that fire/,
  );
  t.match(predicted.report, { kept_share: 1, neurons_skipped_per_token: 0 });
  t.ok(Math.abs(predicted.report.perplexity_ratio - 1.005) < 1e-9);
  t.ok(predicted.report.neurons_computed_share > 0.2 && predicted.report.neurons_computed_share < 0.8);
  t.ok(predicted.report.predictor_ms_per_token > 0);
  const measured = await run('--measure-recall');
  t.ok(measured.report.recall_share > 0.2 && measured.report.recall_share < 0.8);
  t.ok(measured.report.recall_magnitude_share > 0.2 && measured.report.recall_magnitude_share < 0.8);
  t.ok(measured.report.page_cache_bytes > 0);
  const exact = await run('--exact');
  t.notMatch(exact.stderr, /predict/);
  t.match(exact.report, { kept_share: null, neurons_computed_per_token: null });
  const text = join(scratch, 'text.txt');
  writeFileSync(text, 'Once upon a time there was a cat. '.repeat(5));
  const perplexity = (...args: string[]) => runCli('perplexity', '-m', model.path, '-f', text, ...args);
  t.not((await perplexity()).stdout, (await perplexity('--exact')).stdout);
  const logits = async (...args: string[]) => {
    const file = join(scratch, 'logits.f32');
    const { status, stderr } = await runCli('eval', '-m', model.path, '--tokens', '1,2,3', '--logits', file, ...args);
    t.equal(status, 0, stderr);
    return readFileSync(file);
  };
  t.notOk((await logits()).equals(await logits('--exact')));
  const output = join(scratch, 'counted.profile');
  const profiled = await runCli('profile', '-m', model.path, '-f', text, '-o', output);
  t.match(profiled, { status: 0 });
  t.notMatch(profiled.stderr, /neurons are predicted/, 'profiles count exactly');
});

/** Greedy logits of a few tokens, one at a time. */
async function decode(engine: Engine): Promise<Float32Array> {
  const rows = new Float32Array(12 * engine.vocabSize);
  for (let position = 0; position < 12; position++) {
    const row = rows.subarray(position * engine.vocabSize, (position + 1) * engine.vocabSize);
    await engine.step(Int32Array.of((position * 41 + 7) % engine.vocabSize), position, row);
  }
  return rows;
}

t.test('steps that are taken away change what it costs, never what is computed', async (t) => {
  const model = await modelWith('ablated', [0, 0.5]);
  const { engine: whole } = await open(model, { loadMode: 'resident', exact: true });
  const expected = Buffer.from((await decode(whole)).buffer);
  const memory = { kind: 'bytes', bytes: 1e12 } as const;
  const run = async (options: Partial<EngineOptions>) => {
    const opened = await open(model, { loadMode: 'direct', memory, ...options });
    const same = Buffer.from((await decode(opened.engine)).buffer).equals(expected);
    t.ok(same, `${JSON.stringify(options)}: the same bits`);
    const { stream, predictor } = opened.engine.counters();
    return { ...opened, stream: stream as StreamCounters, predictor };
  };
  const all = await run({});
  t.ok(all.stream.hotHits > 0 && all.request.stream?.policy === 'frequency');
  const cache = await run({ ablate: ['cache'] });
  t.equal(cache.stream.hotHits + cache.stream.coldHits, 0, 'nothing stays');
  t.ok(cache.stream.misses > 0);
  const hot = await run({ ablate: ['hot'] });
  t.equal(hot.stream.hotHits, 0, 'all places change hands');
  t.ok(hot.stream.coldHits > 0);
  const once = await run({ ablate: ['cache', 'two-phase'] });
  t.equal(once.stream.sparedBytes, 0, 'rows come with their gates');
  const apart = await run({ ablate: ['cache', 'bundles', 'prefetch'] });
  const together = await run({ ablate: ['cache', 'prefetch'] });
  t.ok(apart.stream.reads > together.stream.reads, 'a read each');
  t.equal(together.stream.prefetched, 0);
  await run({ ablate: ['cache', 'pipeline'] });
  t.equal((await run({ ablate: ['predictor'] })).predictor, undefined);
  const { stream, request } = await run({ engine: 'llmflash' });
  t.match(request.stream, { policy: 'recency', twoPhase: false, pipeline: false, bundles: true, prefetchBytes: 0 });
  t.equal(request.stream?.firingRates, undefined);
  t.ok(stream.hotHits === 0 && stream.misses > 0);

  const cli = (...args: string[]) =>
    runCli('run', '-m', model.path, '--tokens', '1,5', '-n', '2', '--ignore-eos', ...args);
  const report = jsonLines((await cli('--ablate', 'cache,two-phase', '--load-mode', 'direct', '--json')).stdout).at(-1);
  t.match(report, { engine: 'pi2', ablated: ['cache', 'two-phase'], cold_hit_share: 0, miss_share: 1 });
  const wrong = await cli('--ablate', 'cache,pipline');
  t.match(wrong, { status: 2, stderr: /Expected one of bundles, .*did you mean pipeline\?/s });
});
