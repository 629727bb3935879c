import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { generateCheckpoint } from '../bench/generate.js';
import { measureModel } from '../bench/measure.js';
import { SHAPES, type Shape } from '../bench/shapes.js';
import { deviation, mean, median } from '../bench/statistics.js';
import { SyntheticCheckpoint } from '../bench/synthetic-checkpoint.js';
import { convert } from '../converter/convert.js';
import { Engine } from '../src/engine/engine.js';
import { openModelDirectory } from '../src/format/model-directory.js';

const SMALL = { hiddenSize: 256, layerCount: 3, headCount: 4, kvHeadCount: 2, neuronCount: 512, vocabSize: 384 };

function small(name: string): Shape {
  const shape = SHAPES.find((known) => known.name === name) as Shape;
  return { ...shape, ...SMALL, contextLength: 64 };
}

/** A synthetic checkpoint, written to disk. */
async function write(shape: Shape, directory: string, seed = 1): Promise<boolean> {
  const setting = shape.activation === 'drelu' ? 'published' : null;
  return generateCheckpoint(new SyntheticCheckpoint({ shape, setting, seed }, directory));
}

t.test('a synthetic checkpoint has the same bytes each time, other ones for another seed', async (t) => {
  const directory = t.testdir();
  const shape = small('tinyllama-1.1b');
  const make = async (name: string, seed: number) => {
    t.equal(await write(shape, join(directory, name), seed), true);
    return shards(join(directory, name));
  };
  const first = await make('a', 1);
  t.strictSame(await make('b', 1), first);
  t.notSame(await make('c', 2), first);
  t.equal(await write(shape, join(directory, 'a'), 3), true, 'one of another seed is made anew');
});

for (const { name, activation } of SHAPES) {
  t.test(`${name}: converts, and its activations stay in range`, async (t) => {
    const directory = t.testdir();
    const checkpoint = join(directory, 'checkpoint');
    const output = join(directory, 'model.pi2');
    await write(small(name), checkpoint);
    const options = { checkpoint, output, quantization: 'q4' as const, maxMemoryBytes: 2 ** 30, force: false };
    await convert(options, () => {}, new AbortController().signal);
    const model = await openModelDirectory(output);
    t.equal(model.manifest.hyperparameters.ffn.activation, activation);

    const engine = await Engine.open(model, { context: 64, threads: 1 });
    t.teardown(() => engine.close());
    const tokens = Int32Array.from({ length: 32 }, (_, i) => (i * 37) % SMALL.vocabSize);
    const logits = new Float32Array(tokens.length * SMALL.vocabSize);
    await engine.step(tokens, 0, logits, { all: true });
    const spread = deviation(Array.from(logits));
    t.ok(spread > 0.1 && spread < 10, `logits spread by ${spread}`);
  });
}

t.test('measures what was asked for', async (t) => {
  const directory = t.testdir();
  await write(small('tinyllama-1.1b-drelu'), join(directory, 'checkpoint'));
  const output = join(directory, 'model.pi2');
  const options = { checkpoint: join(directory, 'checkpoint'), output, quantization: 'q8' as const };
  await convert({ ...options, maxMemoryBytes: 2 ** 30, force: false }, () => {}, new AbortController().signal);
  const result = await measureModel(output, { promptTokens: 8, generatedTokens: 0, repetitions: 2, threads: 1 });
  t.strictSame(
    result.tests.map(({ test }) => test),
    ['pp8'],
  );
  t.equal(result.tests[0].tokensPerSecond.length, 2);
  t.equal(result.bandwidths.length, 3, 'before, between and after');
  t.ok(result.othersShare !== null && result.othersShare >= 0 && result.othersShare <= 1);
  t.ok(result.tests[0].firedShare > 0 && result.tests[0].firedShare < 1);
  t.equal(result.quantization, 'q8');
});

t.test('statistics', async (t) => {
  t.equal(median([3, 1, 2]), 2);
  t.equal(median([4, 1, 2, 3]), 2.5);
  t.equal(mean([1, 2, 6]), 3);
  t.equal(deviation([5]), 0);
  t.equal(deviation([1, 3]), Math.SQRT2);
});

/** The sha256 of every shard. */
function shards(directory: string): string[] {
  const files = readdirSync(directory).filter((file) => file.endsWith('.safetensors'));
  const hash = (file: string) => createHash('sha256').update(readFileSync(join(directory, file)));
  return files.sort().map((file) => hash(file).digest('hex'));
}
