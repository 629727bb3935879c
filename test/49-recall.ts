// What a predictor misses, measured while generating; and how much of a file the page cache has.
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest } from '../src/engine/contract.js';
import { Engine } from '../src/engine/engine.js';
import { modelPageCacheBytes } from '../src/engine/page-cache.js';
import { RecallMeter } from '../src/engine/recall.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import { buildProgram, runCli } from './support/cli.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { makeModel } from './support/models.js';
import { randomPredictor } from './support/predictor.js';

const addon = loadAddon();
const scratch = t.testdir();
buildProgram();

const DENSE: CheckpointOptions = { family: 'bamboo', hidden: 96, neurons: 300 };
const EXPERTS: CheckpointOptions = { family: 'turbosparsemixtral', hidden: 96, neurons: 130, experts: 3 };
const TOKENS = [5, 42, 79, 17, 3, 60];

/** Opens a model with a random predictor whose thresholds are all `threshold`. */
async function openPredicted(model: ModelDirectory, threshold: number): Promise<Engine> {
  const openEngine = async (request: EngineRequest) => {
    const predictor = await randomPredictor(addon, request, join(scratch, 'predictor.bin'));
    const thresholds = predictor.memoryThresholds.map(() => threshold);
    return addon.openEngine({
      ...request,
      predictor: { ...predictor, memoryThresholds: thresholds, flashThresholds: thresholds },
    });
  };
  const engine = await Engine.open(model, { context: 64, threads: 2 }, { ...addon, openEngine });
  t.teardown(() => engine.close().catch(() => {}));
  // The manifest has no predictor, so the plan knows of none.
  Object.defineProperty(engine, 'operatingPoint', { value: { kept_share: 1 } });
  return engine;
}

/** Sends the tokens one by one; with the logits of the last. */
async function decode(engine: Pick<Engine, 'step' | 'vocabSize'>): Promise<Float32Array> {
  const logits = new Float32Array(engine.vocabSize);
  for (const [position, token] of TOKENS.entries()) await engine.step(Int32Array.of(token), position, logits);
  return logits;
}

/** The same shares from steps of two engines' own, by sets of names and sums. */
async function counted(t: Test, engine: Engine, model: ModelDirectory) {
  const { layer_count: layers, neuron_count: neurons, experts } = model.manifest.hyperparameters;
  const count = experts?.count ?? 1;
  const used = experts?.used_per_token ?? 1;
  const bytes = Math.ceil(neurons / 8);
  const logits = new Float32Array(engine.vocabSize);
  const sums = { all: 0, found: 0, allMagnitude: 0, foundMagnitude: 0 };
  for (const [position, token] of TOKENS.entries()) {
    const fired = new Uint8Array(engine.firedBytesPerToken);
    const predicted = new Uint8Array(engine.firedBytesPerToken);
    const activations = new Float32Array(layers * used * neurons);
    await engine.step(Int32Array.of(token), position, logits, { exact: true, fired, activations });
    await engine.step(Int32Array.of(token), position, logits, { fired: predicted });
    for (let layer = 0; layer < layers; layer++) {
      // Every bank of the layer with a neuron that fires is in use; with these sizes all that are in use have one.
      const banks = Array.from({ length: count }, (_, expert) => (layer * count + expert) * bytes).filter((begin) =>
        fired.subarray(begin, begin + bytes).some((byte) => byte !== 0),
      );
      t.equal(banks.length, used);
      for (const [slot, begin] of banks.entries()) {
        const row = activations.subarray((layer * used + slot) * neurons, (layer * used + slot + 1) * neurons);
        for (const [i, value] of row.entries()) {
          if (value === 0) continue;
          const found = ((predicted[begin + Math.floor(i / 8)] >> (i % 8)) & 1) * 1;
          sums.all++;
          sums.found += found;
          sums.allMagnitude += Math.abs(value);
          sums.foundMagnitude += found * Math.abs(value);
        }
      }
    }
  }
  return { recall: sums.found / sums.all, magnitude: sums.foundMagnitude / sums.allMagnitude };
}

for (const [name, options] of Object.entries({ dense: DENSE, experts: EXPERTS })) {
  t.test(`${name}: recall is 1 with every neuron, 0 with none, and between as counted apart`, async (t) => {
    const model = await openModelDirectory(await makeModel(join(scratch, name), options, 'q8'));
    const shape = model.manifest.hyperparameters;
    for (const [threshold, share] of [
      [Number.NEGATIVE_INFINITY, 1],
      [Number.POSITIVE_INFINITY, 0],
    ]) {
      const meter = new RecallMeter(await openPredicted(model, threshold), shape);
      t.strictSame(meter.recall(), { recallShare: null, recallMagnitudeShare: null }, 'nothing yet');
      await decode(meter);
      t.strictSame(meter.recall(), { recallShare: share, recallMagnitudeShare: share });
    }
    const engine = await openPredicted(model, 0);
    const plain = await decode(engine);
    const meter = new RecallMeter(engine, shape);
    t.strictSame(await decode(meter), plain, 'the predicted result is used');
    const { recallShare, recallMagnitudeShare } = meter.recall();
    const { recall, magnitude } = await counted(t, engine, model);
    t.ok(recall > 0.1 && recall < 0.9, `${recall}`);
    t.equal(recallShare, recall);
    t.ok(Math.abs((recallMagnitudeShare as number) - magnitude) < 1e-12);
    await meter.step(Int32Array.of(1), TOKENS.length, new Float32Array(engine.vocabSize), { exact: true });
    t.equal(meter.recall().recallShare, recall, 'exact steps are not measured');
  });
}

t.test('without a predictor there is nothing to measure', async (t) => {
  const directory = await makeModel(join(scratch, 'plain'), DENSE, 'q8');
  const run = (...args: string[]) =>
    runCli('run', '-m', directory, '--tokens', '1,2', '-n', '2', '--measure-recall', ...args);
  t.match(await run(), { status: 2, stdout: '', stderr: /--measure-recall has nothing to measure/ });
  for (const args of [['--exact'], ['--engine', 'mmap'], ['--ablate', 'predictor']]) {
    const expected = new RegExp(`--measure-recall does not go with ${args.join(' ')}`);
    t.match(await run(...args), { status: 2, stdout: '', stderr: expected });
  }
});

t.test('the page cache holds what was read, in whole pages', async (t) => {
  const directory = await makeModel(join(scratch, 'cached'), DENSE, 'q8');
  const model = await openModelDirectory(directory);
  const sizes = [model.residentPath, model.neuronsPath].map((file) => readFileSync(file).length);
  const bytes = (await modelPageCacheBytes(model)) as number;
  t.ok(bytes > 0 && bytes <= sizes.reduce((sum, size) => sum + Math.ceil(size / 65536) * 65536, 0), `${bytes}`);
  const odd = join(scratch, 'odd');
  writeFileSync(odd, Buffer.alloc(5000, 1));
  const pages = (await addon.pageCacheBytes(odd)) as number;
  t.ok(pages >= statSync(odd).size && pages % 4096 === 0, `${pages}`);
  const empty = join(scratch, 'empty');
  writeFileSync(empty, '');
  t.equal(await addon.pageCacheBytes(empty), 0);
  await t.rejects(addon.pageCacheBytes(join(scratch, 'none')), { code: 'NATIVE_IO', message: /cannot map .*none/ });
  await t.rejects(addon.pageCacheBytes(7 as never), { code: 'NATIVE_ARGUMENT' });
  const gone = { residentPath: join(scratch, 'none'), neuronsPath: odd, manifest: {} } as ModelDirectory;
  await t.rejects(modelPageCacheBytes(gone), { code: 'E_IO' });
});
