// Synthetic models of real shapes: streamed or through a checkpoint the same, with the activation statistics that were asked for.
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Command } from 'commander';
import t from 'tap';
import { layerFacts, layerModel, rateOf, SETTINGS, sharesOf } from '../bench/activation-settings.js';
import { addModelOptions, requestOf } from '../bench/model-options.js';
import { type ModelRequest, prepareSynthetic, requireRoom } from '../bench/models.js';
import { bisect, bothAbove, inverseNormal, normalIntegral } from '../bench/normal.js';
import { fromBf16, toBf16 } from '../bench/number-block.js';
import { describeReached, type ReachedStatistics } from '../bench/reached.js';
import { type Shape, shapeOf } from '../bench/shapes.js';
import { SyntheticCheckpoint } from '../bench/synthetic-checkpoint.js';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { buildProgram } from './support/cli.js';

const SMALL = { hiddenSize: 256, layerCount: 3, headCount: 4, kvHeadCount: 2, neuronCount: 256, vocabSize: 384 };
/** Large enough for statistics. */
const MIDDLE = { hiddenSize: 1024, layerCount: 4, headCount: 8, kvHeadCount: 2, neuronCount: 1024, vocabSize: 4096 };

function sized(name: string, sizes: Partial<Shape>): Shape {
  return { ...shapeOf(name), ...sizes, contextLength: 256, isLarge: false };
}

function wanted(shape: Shape, options: Partial<ModelRequest> = {}): ModelRequest {
  return { shape, quantization: 'q4', withCheckpoint: false, isLargeAllowed: false, ...options };
}

const silent = () => {};

t.before(() => buildProgram());

for (const [name, setting] of [
  ['mistral-7b-drelu', 'published'],
  ['mistral-7b-drelu', 'measured'],
  ['mixtral-47b-drelu', 'measured'],
  ['mixtral-47b', undefined],
] as const) {
  t.test(`${name}, ${setting ?? 'dense'}: streamed and through a checkpoint, byte for byte the same`, async (t) => {
    const request = wanted(sized(name, SMALL), { setting });
    const [streamed, converted] = [t.testdir({ a: {}, b: {} })].flatMap((base) => [join(base, 'a'), join(base, 'b')]);
    const one = await prepareSynthetic(request, silent, streamed);
    const other = await prepareSynthetic({ ...request, withCheckpoint: true }, silent, converted);
    t.equal(one.conversion, null);
    t.ok((other.conversion?.sourceBytes ?? 0) > 0, 'the program has converted a checkpoint');
    t.strictSame(digests(one.path), digests(other.path));
    t.equal(existsSync(join(one.path, 'predictor.bin')), setting !== undefined);
    t.strictSame((await prepareSynthetic(request, silent, streamed)).made, [], 'what is there stays');
  });
}

t.test('any part of a tensor reads as in the file', async (t) => {
  const recipe = { shape: sized('mixtral-47b-drelu', SMALL), setting: 'measured', seed: 1 } as const;
  const synthetic = new SyntheticCheckpoint(recipe, join(t.testdir(), 'checkpoint'));
  const { generateCheckpoint } = await import('../bench/generate.js');
  t.equal(await generateCheckpoint(synthetic), true);
  t.equal(await generateCheckpoint(synthetic), false, 'a complete one is left as it is');
  const opened = await Checkpoint.open(synthetic.directory);
  t.teardown(() => opened.close());
  t.strictSame(synthetic.model, opened.model);
  t.strictSame(synthetic.predictors(), opened.predictors());
  for (const state of await synthetic.states()) {
    const { signal } = new AbortController();
    t.equal(await synthetic.hash(state, signal), await opened.hash(state, signal), state.file);
  }
  const { embedding, layers, head } = opened.model;
  for (const tensor of [embedding, layers[1].o, layers[2].experts[5].up, layers[0].router, head]) {
    if (!tensor) throw new Error('a tensor is missing');
    for (const [offset, bytes] of [
      [0, opened.bytes(tensor)],
      [512, 1024],
      [1022, 2],
      [770, 2 * 700],
    ]) {
      const [mine, theirs] = [new Uint8Array(bytes), new Uint8Array(bytes)];
      await synthetic.read(tensor, offset, mine);
      await opened.read(tensor, offset, theirs);
      t.ok(Buffer.from(mine).equals(theirs), `${tensor.name}, ${bytes} bytes from ${offset}`);
    }
  }
});

for (const setting of SETTINGS) {
  for (const name of ['mistral-7b-drelu', 'mixtral-47b-drelu']) {
    t.test(`${name}, ${setting}: fires as was asked for`, async (t) => {
      const directory = t.testdir();
      const lines: string[] = [];
      const { made } = await prepareSynthetic(
        wanted(sized(name, MIDDLE), { setting }),
        (line) => lines.push(line),
        directory,
      );
      const file = made.find((path) => path.endsWith('.statistics.json')) as string;
      const reached: ReachedStatistics = JSON.parse(readFileSync(file, 'utf8'));
      t.equal(reached.tokens, 1024);
      t.ok(lines.includes(describeReached(reached)), 'they are printed');
      for (const [layer, { rate, skew, overlap }] of reached.layers.entries()) {
        const near = (value: number | null, real: number | null, most: number, what: string) =>
          t.ok(
            Math.abs((value as number) - (real as number)) <= most,
            `layer ${layer}, ${what}: ${value}, asked ${real}`,
          );
        near(rate.reached, rate.real, 0.004 + 0.1 * (rate.real as number), 'rate');
        near(skew.reached, skew.real, 0.03, 'skew');
        // A token of a topic of 32 is the one before now and then.
        if (setting === 'measured') near(overlap.reached, overlap.real, 0.05, 'overlap');
        else near(overlap.reached, overlap.by_chance, 0.03, 'overlap by chance');
      }
      if (setting === 'measured')
        t.ok(Math.abs((reached.topic_kept?.reached ?? 0) - 0.97) < 0.02, 'the head keeps to topics');
      else t.equal(reached.topic_kept, null);
    });
  }
}

t.test('facts become a model that has them', async (t) => {
  for (const setting of SETTINGS) {
    for (const [layer, facts] of layerFacts(setting, 32, false).entries()) {
      const model = layerModel(facts, 1);
      const rates = Array.from({ length: 1000 }, (_, i) => rateOf(model, -inverseNormal((i + 0.5) / 1000)));
      const all = rates.reduce((sum, rate) => sum + rate, 0);
      const hottest = rates.slice(0, Math.round(1000 * facts.skew.neurons)).reduce((sum, rate) => sum + rate, 0);
      t.ok(Math.abs(all / 1000 - facts.rate) < 0.02 * facts.rate, `${setting}, layer ${layer}: rate`);
      t.ok(Math.abs(hottest / all - facts.skew.firing) < 0.01, `${setting}, layer ${layer}: skew`);
    }
  }
  const rates = layerFacts('published', 32, false).map(({ rate }) => rate);
  t.ok(Math.abs(rates.reduce((sum, rate) => sum + rate, 0) / 32 - 0.1) < 0.005, '90 % rest in the mean');
  for (const rate of [0.001, 0.1, 0.25, 0.6]) {
    const { gate, up } = sharesOf(rate);
    t.ok(Math.abs(gate * up - rate) < 1e-12);
  }
});

t.test('normal numbers', async (t) => {
  t.ok(Math.abs(normalIntegral(1.959964) - 0.975) < 1e-6);
  t.ok(Math.abs(inverseNormal(0.2) + 0.841621) < 1e-5);
  t.ok(Math.abs(bothAbove(0.5, 0) - normalIntegral(-0.5) ** 2) < 1e-6, 'nothing in common');
  t.ok(Math.abs(bothAbove(0, 0.5) - (0.25 + Math.asin(0.5) / (2 * Math.PI))) < 1e-6, 'half in common');
  t.ok(Math.abs(bisect(0, 10, (x) => x < 3) - 3) < 1e-9);
  for (const value of [1, -0.375, 3.140625]) t.equal(fromBf16(toBf16(value)), value);
});

t.test('refuses what is unknown, large or too large', async (t) => {
  t.throws(() => shapeOf('mistral-7b-drleu'), { code: 'E_USAGE', hint: /did you mean mistral-7b-drelu\?/ });
  const parse = (...args: string[]) =>
    addModelOptions(new Command('bench').exitOverride().configureOutput({ writeErr: silent })).parse(args, {
      from: 'user',
    });
  t.throws(() => parse('--shape', 'tinylama-1.1b'), { code: 'E_USAGE', hint: /did you mean tinyllama-1.1b\?/ });
  t.throws(() => parse('--statistics', 'publishd'), { code: 'E_USAGE', hint: /did you mean published\?/ });
  t.throws(() => parse('--statistic', 'published'), { message: /Did you mean --statistics\?/ });
  const large = requestOf(parse('--shape', 'mixtral-47b-drelu', '--statistics', 'measured').opts());
  const silu = requestOf(parse('--shape', 'mistral-7b', '--statistics', 'measured').opts());
  const directory = t.testdir();
  await t.rejects(prepareSynthetic(silu, silent, directory), {
    code: 'E_USAGE',
    message: /all neurons of mistral-7b fire/,
  });
  await t.rejects(prepareSynthetic(large, silent, directory), {
    code: 'E_USAGE',
    message: /mixtral-47b-drelu takes 31\.\d GiB \(\d{11} bytes\) of disk/,
    hint: /--large/,
  });
  const request = { ...large, isLargeAllowed: true };
  const checkpoint = new SyntheticCheckpoint(
    { shape: large.shape, setting: 'measured', seed: 1 },
    join(directory, 'x'),
  );
  const room = (bytes: number) => requireRoom(request, checkpoint, directory, async () => bytes);
  await t.rejects(room(20 * 1024 ** 3), { code: 'E_DISK_FULL', message: /20\.0 GiB are available/ });
  await t.resolves(room(100 * 1024 ** 3));
  await t.rejects(
    requireRoom({ ...request, withCheckpoint: true }, checkpoint, directory, async () => 100 * 1024 ** 3),
    { code: 'E_DISK_FULL' },
    'a checkpoint takes more',
  );
  t.strictSame(readdirSync(directory), [], 'nothing is left');
});

/** The sha256 of every file of a model. */
function digests(path: string): Record<string, string> {
  const digest = (file: string) =>
    createHash('sha256')
      .update(readFileSync(join(path, file)))
      .digest('hex');
  return Object.fromEntries(
    readdirSync(path)
      .sort()
      .map((file) => [file, digest(file)]),
  );
}
