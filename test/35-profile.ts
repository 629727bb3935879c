import { type ChildProcess, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import t from 'tap';
import { FiringCounter } from '../converter/activation/counter.js';
import { heatOrder } from '../converter/activation/heat-order.js';
import { type ActivationProfile, emptyProfile, layerCounts, mergeProfiles } from '../converter/activation/profile.js';
import { decodeProfile, encodeProfile, readProfile, writeProfile } from '../converter/activation/profile-file.js';
import { cutText, profileWindows } from '../converter/activation/profiler.js';
import { profileStatistics } from '../converter/activation/statistics.js';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { convert } from '../converter/convert.js';
import { recipeFor } from '../converter/quantize/recipe.js';
import { type NeuronExtent, planExtents } from '../converter/steps/extents.js';
import { cutPieces, encodedBytes, leastLimits, loadBytes, type Piece } from '../converter/steps/pieces.js';
import { loadAddon } from '../src/engine/addon.js';
import { SKIPPED } from '../src/engine/contract.js';
import { Engine } from '../src/engine/engine.js';
import { verifyModel } from '../src/engine/verify.js';
import { findWrongOrder, readHeatOrder } from '../src/format/heat-order.js';
import { expertBytes } from '../src/format/layout.js';
import { QUANTIZATIONS, type QuantizationName } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { profileShape } from '../src/format/profile-header.js';
import { indexOfMaximum, Oracle } from './oracle/forward.js';
import { compileProgram } from './support/compiled.js';
import { type CheckpointOptions, makeCheckpoint } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY } from './support/models.js';
import { Random } from './support/numbers.js';
import { writeRandomProfile } from './support/profiles.js';
import { needsShared, REPOSITORY, sharedModel } from './support/shared.js';
import { byteLevelTokenizer, writeTokenizer } from './support/tokenizers.js';

const scratch = t.testdir({});
const DEMO = join(REPOSITORY, 'demo', 'stories-drelu');
const CALIBRATION = join(REPOSITORY, 'demo', 'calibration.txt');
const tokenizerFrom = writeTokenizer(join(scratch, 'tokenizer'), byteLevelTokenizer());
const never = new AbortController().signal;
const quiet = () => undefined;
let count = 0;

const MODELS: Record<string, CheckpointOptions> = {
  dense: { family: 'bamboo', hidden: 160, heads: 5, neurons: 333, layers: 3 },
  moe: { family: 'turbosparsemixtral', hidden: 96, experts: 4, neurons: 90, layers: 3 },
  opt: { family: 'opt', hidden: 160, heads: 5, neurons: 210, layers: 3 },
};

function newPath(name: string): string {
  return join(scratch, `${count++}-${name}`);
}

function make(options: CheckpointOptions): string {
  return makeCheckpoint(newPath('checkpoint'), { vocab: MODEL_VOCABULARY, tokenizerFrom, ...options });
}

/** Converts in this process; resolves with the path of the model. */
async function convertHere(
  checkpoint: string,
  quantization: QuantizationName,
  more: { profile?: string; calibration?: string; output?: string; maxMemoryBytes?: number } = {},
): Promise<string> {
  const output = newPath('model.pi2');
  const request = { checkpoint, output, quantization, maxMemoryBytes: 2 ** 32, force: false, ...more };
  return (await convert(request, quiet, never)).output;
}

async function profileText(modelPath: string, text: string, context: number, chunks = 0): Promise<ActivationProfile> {
  const model = await openModelDirectory(modelPath);
  const engine = await Engine.open(model, { context, threads: 1 });
  try {
    return await profileWindows(model, engine, await cutText(model, text, context, chunks), async () => true);
  } finally {
    await engine.close();
  }
}

/** A profile of a model's checkpoint whose counts are random: it sorts its neurons at random. */
function randomProfile(modelPath: string, seed: number): Promise<string> {
  return writeRandomProfile(modelPath, newPath('random.profile'), seed);
}

const digest = (directory: string) =>
  Object.fromEntries(
    readdirSync(directory)
      .sort()
      .map((file) => [
        file,
        createHash('sha256')
          .update(readFileSync(join(directory, file)))
          .digest('hex'),
      ]),
  );

/** What a counter should count of some windows, straight from the definitions. `fires(token, layer, neuron)`. */
function countPlainly(
  windows: readonly (readonly ReadonlySet<number>[][])[],
  layers: number,
  neurons: number,
): Pick<ActivationProfile, 'batches' | 'following' | 'shared' | 'fired'> {
  const result = {
    batches: [0, 0, 0, 0],
    following: Array(layers).fill(0),
    shared: Array(layers).fill(0),
    fired: new Uint32Array(layers * 4 * neurons),
  };
  for (const window of windows) {
    for (let batch = 1; batch <= 4; batch++) {
      for (let first = 0; first + batch <= window.length; first++) {
        result.batches[batch - 1]++;
        for (let layer = 0; layer < layers; layer++) {
          const union = new Set(window.slice(first, first + batch).flatMap((token) => [...token[layer]]));
          for (const neuron of union) result.fired[(layer * 4 + batch - 1) * neurons + neuron]++;
        }
      }
    }
    for (let token = 1; token < window.length; token++) {
      for (let layer = 0; layer < layers; layer++) {
        result.following[layer] += window[token][layer].size;
        for (const neuron of window[token][layer]) {
          if (window[token - 1][layer].has(neuron)) result.shared[layer]++;
        }
      }
    }
  }
  return result;
}

const SHAPE = { layers: 2, experts: 3, neurons: 11 };
const TABLE = SHAPE.experts * SHAPE.neurons;
const DIGEST = 'ab'.repeat(32);
/** Windows of tokens, each the neurons (over experts) that fire in each layer. */
const windowsArbitrary = fc.array(
  fc.array(fc.tuple(...Array(SHAPE.layers).fill(fc.uniqueArray(fc.nat(TABLE - 1), { maxLength: 12 }))), {
    maxLength: 9,
  }),
  { maxLength: 4 },
);

/** Runs windows through a counter whose neurons lie in the given orders. */
function countWindows(windows: number[][][][], orders: (Uint32Array | null)[], text: string): ActivationProfile {
  const counter = new FiringCounter(SHAPE, DIGEST, orders);
  const expertBytesCount = Math.ceil(SHAPE.neurons / 8);
  for (const window of windows) {
    counter.beginWindow();
    for (const token of window) {
      const fired = new Uint8Array(SHAPE.layers * SHAPE.experts * expertBytesCount);
      for (const [layer, neurons] of token.entries()) {
        for (const neuron of neurons) {
          const expert = Math.floor(neuron / SHAPE.neurons);
          const own = orders[layer]?.subarray(expert * SHAPE.neurons, (expert + 1) * SHAPE.neurons);
          const place = own ? own.indexOf(neuron % SHAPE.neurons) : neuron % SHAPE.neurons;
          fired[(layer * SHAPE.experts + expert) * expertBytesCount + (place >> 3)] |= 1 << (place & 7);
        }
      }
      counter.add(
        fired,
        Uint8Array.from({ length: SHAPE.layers }, () => 0b101),
      );
    }
  }
  return counter.profile(text);
}

function shuffledOrder(seed: number): Uint32Array {
  const random = new Random(seed);
  const experts = Array.from({ length: SHAPE.experts }, () => {
    const keys = Array.from({ length: SHAPE.neurons }, () => random.uniform());
    return [...keys.keys()].sort((a, b) => keys[a] - keys[b]);
  });
  return Uint32Array.from(experts.flat());
}

t.test('counts are those of the definitions, in the order of the checkpoint whatever the heat order', async (t) => {
  fc.assert(
    fc.property(windowsArbitrary, fc.nat(1000), (windows, seed) => {
      const profile = countWindows(windows as number[][][][], [null, shuffledOrder(seed)], 'cd'.repeat(32));
      const sets = windows.map((window) => window.map((token) => token.map((neurons) => new Set(neurons as number[]))));
      const { fired, ...rest } = countPlainly(sets, SHAPE.layers, TABLE);
      t.strictSame({ ...profile, fired: [...profile.fired] }, { ...profile, ...rest, fired: [...fired] });
      const tokens = profile.batches[0];
      t.strictSame([...profile.routed], [tokens, 0, tokens, tokens, 0, tokens]);
    }),
    { numRuns: 60 },
  );
});

t.test('merging is one run over all texts, in any order and grouping', async (t) => {
  fc.assert(
    fc.property(fc.tuple(windowsArbitrary, windowsArbitrary, windowsArbitrary), (parts) => {
      const names = ['a', 'b', 'c'];
      const [a, b, c] = parts.map((windows, i) =>
        countWindows(windows as number[][][][], [null, null], `${i % 2}${'e'.repeat(63)}`),
      );
      const bytes = (profile: ActivationProfile) => encodeProfile(profile).toString('hex');
      const all = bytes(mergeProfiles([a, b, c], names));
      t.equal(bytes(mergeProfiles([c, b, a], names)), all);
      t.equal(bytes(mergeProfiles([mergeProfiles([a, b], names), c], names)), all);
      t.equal(bytes(mergeProfiles([a, mergeProfiles([b, c], names)], names)), all);
      const whole = countWindows(parts.flat() as number[][][][], [null, null], 'f'.repeat(64));
      t.equal(bytes({ ...mergeProfiles([a, b, c], names), texts: whole.texts }), bytes(whole));
    }),
    { numRuns: 30 },
  );
  const empty = emptyProfile(SHAPE, DIGEST);
  const names = ['a.profile', 'b.profile'];
  t.throws(() => mergeProfiles([empty, emptyProfile(SHAPE, 'cd'.repeat(32))], names), {
    code: 'E_PROFILE',
    message: /b\.profile is the profile of another checkpoint than a\.profile/,
  });
  t.throws(() => mergeProfiles([empty, emptyProfile({ ...SHAPE, neurons: 12 }, DIGEST)], names), {
    code: 'E_PROFILE',
    message: /2 layers of 3 experts of 12 neurons; a\.profile has 2 layers of 3 experts of 11 neurons/,
  });
  const full = { ...empty, batches: [0xffffffff, 0, 0, 0] };
  t.throws(() => mergeProfiles([full, full], names), { code: 'E_PROFILE', message: /more than 4294967295/ });
});

t.test('a file is what was written; any wrong byte, size or version is refused', async (t) => {
  const windows = [
    [
      [[1, 5, 32], [7]],
      [[5, 12], []],
      [[0], [1, 2, 3]],
    ],
  ];
  const profile = countWindows(windows, [null, null], 'cd'.repeat(32));
  const bytes = encodeProfile(profile);
  t.strictSame(decodeProfile(bytes, 'x'), profile);
  const odd = new Uint8Array(bytes.length + 1);
  odd.set(bytes, 1);
  t.strictSame(decodeProfile(odd.subarray(1), 'x'), profile, 'at an odd address');
  let accepted = 0;
  for (let i = 0; i < bytes.length; i++) {
    for (const flip of [1, 0x80, 0xff]) {
      const wrong = Buffer.from(bytes);
      wrong[i] ^= flip;
      try {
        decodeProfile(wrong, 'x');
        accepted++;
      } catch (error) {
        t.match(error, { code: 'E_PROFILE', message: /^x (is damaged|is not an activation|was made by a newer)/ });
      }
    }
  }
  t.equal(accepted, 0, `each of ${bytes.length} bytes counts`);
  for (const length of [0, 7, 8, 95, 99, 100, bytes.length - 1]) {
    t.throws(() => decodeProfile(bytes.subarray(0, length), 'x'), { code: 'E_PROFILE' }, `cut off at ${length}`);
  }
  t.throws(() => decodeProfile(Buffer.concat([bytes, Buffer.alloc(4)]), 'x'), { code: 'E_PROFILE', message: /bytes/ });
  const lie = (edit: (profile: ActivationProfile) => void) => {
    const copy = structuredClone(profile);
    edit(copy);
    t.throws(() => decodeProfile(encodeProfile(copy), 'x'), { code: 'E_PROFILE', message: /damaged/ }, String(edit));
  };
  lie((p) => p.fired.fill(4));
  lie((p) => p.routed.fill(4));
  lie((p) => p.batches.reverse());
  lie((p) => p.shared.fill(99));
  lie((p) => p.texts.push({ sha256: '00'.repeat(32), tokens: 0 }));
  lie((p) => {
    p.texts[0].tokens = 2;
  });
});

t.test('statistics, by hand', async (t) => {
  // 4 neurons that fire 6, 3, 1 and 0 times in 10 tokens.
  const profile = emptyProfile({ layers: 1, experts: 1, neurons: 4 }, DIGEST);
  profile.batches = [10, 9, 8, 0];
  profile.fired.set([6, 3, 1, 0, 9, 9, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
  profile.following = [8];
  profile.shared = [2];
  const { tokens, layers, mean, covering_80_whole_model } = profileStatistics(profile);
  t.equal(tokens, 10);
  t.match(layers[0], {
    rate: 0.25,
    covering_80: 0.5,
    never: 0.25,
    overlap: 0.25,
    overlap_by_chance: 0.46,
    experts: null,
  });
  t.strictSame(layers[0].rates_by_batch, [0.25, 0.5, 0.25, null], 'there was no batch of 4');
  t.equal(mean.rate, 0.25);
  t.equal(covering_80_whole_model, 0.5, '6 + 3 of 10');
  t.strictSame(
    [...heatOrder({ ...profile, fired: Uint32Array.from([7, 0, 9, 7, ...Array(12).fill(0)]) })[0]],
    [2, 0, 3, 1],
  );
  t.match(findWrongOrder(Uint32Array.from([0, 1, 1, 1]), 2), /neuron 1 of expert 1 is there twice/);
  t.match(findWrongOrder(Uint32Array.from([0, 2]), 2), /no neuron 2/);
  t.equal(findWrongOrder(Uint32Array.from([0, 1, 1, 0]), 2), null);
});

for (const [name, options] of Object.entries({ demo: null, ...MODELS })) {
  t.test(`${name}: counts are those of the oracle`, async (t) => {
    const directory = options === null ? DEMO : make(options);
    const modelPath = await convertHere(directory, 'f16');
    const model = await openModelDirectory(modelPath);
    const text = readFileSync(CALIBRATION, 'utf8').slice(0, 700);
    const { windows } = await cutText(model, text, 48, 2);
    const profile = await profileText(modelPath, text, 48, 2);
    const checkpoint = await Checkpoint.open(directory);
    const oracle = await Oracle.load(checkpoint);
    await checkpoint.close();
    const { layers, experts, neurons } = profile.shape;
    const routed = new Uint32Array(layers * experts);
    const traces = windows.map((window) => {
      const sequence = oracle.sequence();
      return window.map((token) => {
        sequence.step(token);
        return sequence.trace.map(({ experts: used, neurons: fired }, layer) => {
          for (const expert of used) routed[layer * experts + expert]++;
          return new Set(fired.flatMap((own, i) => own.map((neuron) => used[i] * neurons + neuron)));
        });
      });
    });
    const plain = countPlainly(traces, layers, experts * neurons);
    t.strictSame(profile.batches, plain.batches);
    t.strictSame([...profile.routed], [...routed], 'tokens are routed to the same experts');
    // The engine stores half floats and sums in another order: a neuron at the very edge may fall to the other side.
    const differing = profile.fired.reduce((sum, fired, i) => sum + Math.abs(fired - plain.fired[i]), 0);
    const total = plain.fired.reduce((sum, fired) => sum + fired, 0);
    t.ok(total > 1000 && differing <= 0.003 * total, `${differing} of ${total} counts differ`);
    for (let layer = 0; layer < layers; layer++) {
      const near = (a: number, b: number) => Math.abs(a - b) <= 2 + 0.01 * b;
      t.ok(near(profile.following[layer], plain.following[layer]), 'following');
      t.ok(near(profile.shared[layer], plain.shared[layer]), 'shared');
    }
  });
}

for (const [name, quantization] of [
  ['stories-drelu', 'f16'],
  ['stories-moe-drelu', 'q4'],
] as const) {
  t.test(`${name}: statistics are those measured elsewhere on the same text`, needsShared(name), async (t) => {
    const directory = sharedModel(name) as string;
    const expected = JSON.parse(readFileSync(join(directory, 'sparsity.json'), 'utf8'));
    const text = readFileSync(join(sharedModel('text') as string, 'heldout.txt'), 'utf8');
    const profile = await profileText(await convertHere(directory, quantization), text, 256);
    const { layers } = profileStatistics(profile);
    for (const [l, layer] of expected.layers.entries()) {
      const found = layers[l];
      // Windows were cut in other places there.
      const near = (what: string, a: number | null, b: number, least: number, share: number) =>
        t.ok(a !== null && Math.abs(a - b) <= least + share * b, `layer ${l} ${what}: ${a} and ${b}`);
      near('rate', found.rate, layer.active_frac, 0.001, 0.06);
      near('in 2 tokens', found.rates_by_batch[1], layer.union[2], 0.002, 0.06);
      near('in 4 tokens', found.rates_by_batch[3], layer.union[4], 0.003, 0.06);
      near('80 %', found.covering_80, layer.frac_for_80pct, 0.02, 0);
      near('never', found.never, layer.never, 0.03, 0);
      near('chance', found.overlap_by_chance, layer.overlap_chance, 0.005, 0.05);
      for (const [e, usage] of (layer.expert_usage ?? []).entries()) {
        near(`expert ${e}`, (found.experts as number[])[e] / 2, usage, 0.02, 0);
      }
    }
  });
}

/** Part 1 and part 2 of every bundle of a layer, experts one after another. */
async function bundlesOf(modelPath: string, layer: number): Promise<string[]> {
  const model = await openModelDirectory(modelPath);
  const { layout, hyperparameters: h } = model.manifest;
  const file = readFileSync(model.neuronsPath);
  return Array.from({ length: profileShape(h).experts * h.neuron_count }, (_, i) => {
    const [expert, j] = [Math.floor(i / h.neuron_count), i % h.neuron_count];
    const unit = model.expertOffset(layer, expert) + Math.floor(j / layout.neurons_per_unit) * layout.unit_bytes;
    const slot = j % layout.neurons_per_unit;
    const part1 = unit + slot * layout.part1_stride;
    const part2 = unit + layout.part2_offset + slot * layout.part2_stride;
    const parts = [file.subarray(part1, part1 + layout.part1_bytes), file.subarray(part2, part2 + layout.part2_bytes)];
    return Buffer.concat(parts).toString('base64');
  });
}

for (const [name, options] of Object.entries(MODELS)) {
  t.test(`${name}: a profile changes the order of neurons and nothing else`, async (t) => {
    const checkpoint = make(options);
    const text = readFileSync(CALIBRATION, 'utf8').slice(0, 600);
    for (const quantization of QUANTIZATIONS) {
      const identity = await convertHere(checkpoint, quantization);
      const counted = await profileText(identity, text, 64);
      const path = newPath('counted.profile');
      await writeProfile(path, counted);
      const hot = await convertHere(checkpoint, quantization, { profile: path });
      const shuffled = await convertHere(checkpoint, quantization, { profile: await randomProfile(identity, 5) });

      const model = await openModelDirectory(hot);
      const { hyperparameters: h } = model.manifest;
      for (let layer = 0; layer < h.layer_count; layer++) {
        const order = (await readHeatOrder(model, layer)) as Uint32Array;
        const counts = layerCounts(counted, layer);
        const sorted = order.every((neuron, i) => {
          const start = i - (i % h.neuron_count);
          if (i === start) return true;
          const [before, here] = [counts[start + order[i - 1]], counts[start + neuron]];
          return before > here || (before === here && order[i - 1] < neuron);
        });
        t.ok(sorted, 'the order is the sort of the counts');
        const plain = await bundlesOf(identity, layer);
        const moved = [...order].map((neuron, i) => plain[i - (i % h.neuron_count) + neuron]);
        t.ok(
          (await bundlesOf(hot, layer)).every((bundle, i) => bundle === moved[i]),
          'bundles are the same, in that order',
        );
      }
      t.strictSame(await verifyModel(model, loadAddon(), { threads: 1, progress: quiet }), []);
      t.strictSame(decodeProfile(readFileSync(model.profilePath as string), 'x'), counted, 'the profile is part of it');
      t.strictSame(model.manifest.provenance.calibration, counted.texts);

      const again = await profileText(hot, text, 64);
      t.strictSame(again.fired, counted.fired, 'profiled again in heat order: the same counts');

      const expected = await greedyLogits(identity);
      for (const other of [hot, shuffled]) {
        t.ok(
          (await greedyLogits(other)).equals(expected),
          `${quantization}: 48 greedy tokens, the same logits bit for bit`,
        );
      }
    }
  });
}

/** All logits of 48 greedy tokens. */
async function greedyLogits(path: string): Promise<Buffer> {
  const model = await openModelDirectory(path);
  const engine = await Engine.open(model, { context: 64, threads: 2 });
  const rows: Float32Array[] = [];
  let token = 1;
  for (let position = 0; position < 48; position++) {
    const logits = new Float32Array(engine.vocabSize);
    await engine.step(Int32Array.of(token), position, logits);
    token = indexOfMaximum(logits);
    rows.push(logits);
  }
  await engine.close();
  return Buffer.concat(rows.map((row) => new Uint8Array(row.buffer)));
}

t.test('however memory cuts a layer in heat order, every neuron is encoded once', async (t) => {
  for (const options of Object.values(MODELS)) {
    const opened = await Checkpoint.open(make(options));
    await opened.close();
    const { model } = opened;
    const shape = profileShape(model.hyperparameters);
    const random = new Random(3);
    const profile = emptyProfile(shape, DIGEST);
    for (let i = 0; i < profile.fired.length; i++) profile.fired[i] = Math.floor(50 * random.uniform());
    const plan = planExtents(model, recipeFor('q4', model.hyperparameters.tied_embeddings), heatOrder(profile));
    const extent = plan.neurons[1];
    const least = leastLimits(extent);
    const factor = fc.double({ min: 1, max: 30, noNaN: true });
    fc.assert(
      fc.property(factor, factor, (pieceFactor, chunkFactor) => {
        const limits = {
          pieceBytes: Math.floor(least.pieceBytes * pieceFactor),
          chunkBytes: Math.floor(least.chunkBytes * chunkFactor),
        };
        const pieces = cutPieces(extent, 0, limits);
        if (pieces.some((piece) => piece.loads.some((load) => loadBytes(load) > limits.chunkBytes))) return false;
        const useful = pieces.flatMap((piece) => piece.loads).reduce((sum, load) => sum + encodedBytes(load), 0);
        const matrices = extent.layout.matrices * shape.experts * shape.neurons * extent.hiddenSize;
        return useful === 2 * matrices && encodesInOrder(pieces, extent, profile);
      }),
      { numRuns: 20 },
    );
  }
  t.pass();
});

/** Whether every vector that the loads make goes where the order says. */
function encodesInOrder(pieces: Piece[], extent: NeuronExtent, profile: ActivationProfile): boolean {
  const whole = expertBytes(extent.layout, extent.neuronCount);
  const order = heatOrder(profile)[1];
  return pieces.every((piece) =>
    piece.loads.every((load) => {
      const begin = piece.begin + load.begin;
      const expert = Math.floor(begin / whole);
      const first = ((begin % whole) / extent.layout.unit_bytes) * extent.layout.neurons_per_unit;
      return [...(load.order as Uint32Array)].every((vector, i) => {
        if (vector === SKIPPED) return load.vectors === 'columns';
        const neuron = load.rowList ? load.rowList[i] : load.firstColumn + i;
        return order[expert * extent.neuronCount + first + vector] === neuron;
      });
    }),
  );
}

t.test('a profile of another model, or a damaged one, is refused; what was there stays', async (t) => {
  const checkpoint = make(MODELS.dense);
  const identity = await convertHere(checkpoint, 'q4');
  const good = await randomProfile(identity, 1);
  const twin = make({ ...MODELS.dense, seed: 2 });
  const output = newPath('refused.pi2');
  await t.rejects(convertHere(twin, 'q4', { profile: good, output }), {
    code: 'E_PROFILE',
    message: /profile of another checkpoint/,
  });
  await t.rejects(convertHere(make(MODELS.moe), 'q4', { profile: good, output }), {
    code: 'E_PROFILE',
    message: /3 layers of 333 neurons; .* has 3 layers of 4 experts of 90 neurons/,
  });
  const damaged = newPath('damaged.profile');
  const bytes = readFileSync(good);
  bytes[200] ^= 1;
  writeFileSync(damaged, bytes);
  await t.rejects(convertHere(checkpoint, 'q4', { profile: damaged, output }), {
    code: 'E_PROFILE',
    message: /checksum/,
  });
  t.notOk(existsSync(output) || existsSync(`${output}.partial`), 'nothing is left');

  const hot = await convertHere(checkpoint, 'q4', { profile: good });
  const model = await openModelDirectory(hot);
  writeFileSync(join(hot, 'profile.bin'), bytes);
  const verified = await verifyModel(model, loadAddon(), { threads: 1, progress: quiet });
  t.match(verified, [{ file: 'profile.bin', problems: [/sha256 is/] }]);
  writeFileSync(join(hot, 'profile.bin'), bytes.subarray(1));
  await t.rejects(openModelDirectory(hot), { code: 'E_MODEL', message: /profile\.bin is cut off/ });
  rmSync(join(hot, 'profile.bin'));
  await t.rejects(openModelDirectory(hot), { code: 'E_MODEL', message: /profile\.bin is missing/ });
});

t.test('the commands, as processes', async (t) => {
  const program = compileProgram();
  const runner = join(program, 'main.js');
  writeFileSync(
    runner,
    `import { main } from './src/cli/main.js';
    process.exitCode = await main(process.argv);`,
  );
  const start = (...args: string[]): ChildProcess =>
    spawn('env', ['-i', process.execPath, runner, ...args], { stdio: ['ignore', 'pipe', 'pipe'], cwd: scratch });
  const finished = (child: ChildProcess) =>
    new Promise<{ status: number | null; stdout: string; stderr: string }>((resolve) => {
      const seen = { stdout: '', stderr: '' };
      for (const stream of ['stdout', 'stderr'] as const) {
        child[stream]?.on('data', (chunk) => {
          seen[stream] += chunk;
        });
      }
      child.on('close', (status) => resolve({ ...seen, status }));
    });
  const run = (...args: string[]) => finished(start(...args));
  const checkpoint = make({ ...MODELS.moe, layers: 12 });
  const textPath = newPath('text.txt');
  writeFileSync(textPath, readFileSync(CALIBRATION, 'utf8').slice(0, 6000));

  await t.test('profile counts, shows and merges', async (t) => {
    const model = await convertHere(checkpoint, 'q8', { output: join(scratch, 'tiny.pi2') });
    const told = await run('profile', '-m', model, '-f', textPath, '-c', '64', '--chunks', '3', '-t', '1');
    t.match(told, {
      status: 0,
      stdout: /192 tokens.*layer.*mean.*Experts of layer 11/s,
      stderr: /saved tiny\.profile/,
    });
    const path = join(scratch, 'tiny.profile');
    t.match(JSON.parse((await run('profile', '--show', path, '--json')).stdout), {
      type: 'profile',
      layers: 12,
      experts: 4,
      neurons: 90,
      texts: [{ tokens: 192 }],
      statistics: { tokens: 192 },
    });
    const both = await run('profile', '--merge', path, path, '-o', join(scratch, 'both.profile'));
    t.match(both, { status: 0, stdout: /384 tokens/ });
    t.equal((await readProfile(join(scratch, 'both.profile'))).batches[0], 384);
    t.match(await run('profile', '-m', model, '-f', textPath, '-o', textPath), {
      status: 2,
      stderr: /not an activation/,
    });
    t.match(await run('profile', '-m', model), { status: 2, stderr: /-f is not given/ });
    t.match(await run('profile'), { status: 2, stderr: /nothing to do/ });
    t.match(await run('profile', '--show', path, '-m', model), { status: 2, stderr: /count and show at once/ });
    t.match(await run('profile', '--show', textPath), { status: 3, stderr: /is not an activation profile/ });
    t.match(await run('profile', '--merge', path), { status: 2, stderr: /--merge needs -o/ });
    const both2 = await run('convert', checkpoint, '--profile', path, '--calibration', textPath);
    t.match(both2, { status: 2, stderr: /given both/ });
    const hot = join(scratch, 'hot.pi2');
    t.match(await run('convert', checkpoint, '-o', hot, '--profile', path), {
      status: 0,
      stderr: /sorted by heat: 192/,
    });
    t.match(await run('inspect', hot), { stdout: /heat order +by profile: 192 tokens/ });
    t.match(JSON.parse((await run('inspect', hot, '--json')).stdout), { profile: { tokens: 192 }, heat_order: {} });
  });

  await t.test('Ctrl-C saves what was counted', async (t) => {
    const model = await convertHere(DEMO, 'q8');
    const path = newPath('stopped.profile');
    const child = start('profile', '-m', model, '-f', CALIBRATION, '-o', path, '-t', '1', '--save-every', '1');
    const end = finished(child);
    while (!existsSync(path) && child.exitCode === null) await new Promise((resolve) => setTimeout(resolve, 20));
    child.kill('SIGINT');
    const { status, stderr } = await end;
    const { batches } = await readProfile(path);
    t.equal(status, 130);
    t.match(stderr, new RegExp(`saved .*: ${batches[0]} tokens.*valid profile.*--merge`, 's'));
  });

  await t.test('convert --calibration, killed at any moment, ends with the same bytes', async (t) => {
    const args = (output: string) => [
      ...['convert', checkpoint, '-o', output, '--calibration', textPath],
      ...['--predictor', 'none'],
    ];
    const reference = newPath('reference.pi2');
    const began = performance.now();
    t.match(await run(...args(reference)), { status: 0, stderr: /checkpoint first.*counting which neurons.*by heat/s });
    const duration = performance.now() - began;
    t.notOk(existsSync(`${reference}.calibration`), 'nothing else is left');
    const expected = digest(reference);
    const separate = await convertHere(checkpoint, 'q4', { profile: join(reference, 'profile.bin') });
    t.strictSame(digest(separate), expected, 'the same as with the profile given');
    for (let round = 0; round < 4; round++) {
      const output = newPath('killed.pi2');
      for (let attempt = 0; attempt < 2 && !existsSync(output); attempt++) {
        const child = start(...args(output));
        const timer = setTimeout(() => child.kill('SIGKILL'), duration * (0.2 + 0.8 * Math.random()));
        await finished(child);
        clearTimeout(timer);
      }
      if (!existsSync(output)) t.match(await run(...args(output)), { status: 0 });
      t.strictSame(digest(output), expected, `round ${round}`);
      t.notOk(existsSync(`${output}.calibration`) || existsSync(`${output}.partial`));
    }
    const foreign = newPath('foreign.pi2');
    mkdirSync(`${foreign}.calibration`);
    writeFileSync(join(`${foreign}.calibration`, 'thesis.txt'), 'mine');
    t.match(await run(...args(foreign)), { status: 2, stderr: /not of a calibration/ });
    t.ok(existsSync(join(`${foreign}.calibration`, 'thesis.txt')));
    const tight = await run(...args(newPath('tight.pi2')), '--max-ram', '100M');
    t.match(tight, { status: 5, stderr: /calibration runs the model in memory.*--max-ram \d+M/s });
  });
});
