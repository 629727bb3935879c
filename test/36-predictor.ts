// Predictors in the converter: what is recorded, how they learn, how thresholds are chosen, and what convert makes of it.
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import t from 'tap';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { type ConvertOptions, convert } from '../converter/convert.js';
import { choosePredictor, type PredictorMode, type Quality } from '../converter/predictor/choice.js';
import { LEVELS, measureCurve, RUNS } from '../converter/predictor/curve.js';
import { readDownNorms } from '../converter/predictor/down-norms.js';
import { decodeLayer, encodeLayer, predictorBytes } from '../converter/predictor/encode.js';
import { readPredictor } from '../converter/predictor/from-checkpoint.js';
import type { Judgement, Setting } from '../converter/predictor/judge.js';
import { cheapestRank, rankCandidates } from '../converter/predictor/rank.js';
import { SampleFile, type Samples } from '../converter/predictor/samples.js';
import { chooseThresholds } from '../converter/predictor/thresholds.js';
import { trainPredictor } from '../converter/predictor/train.js';
import { bundlePlacement } from '../converter/steps/pieces.js';
import { loadAddon } from '../src/engine/addon.js';
import type { PredictorNumbers, TrainPredictorRequest } from '../src/engine/contract.js';
import { Engine } from '../src/engine/engine.js';
import { verifyModel } from '../src/engine/verify.js';
import { expertCount } from '../src/format/hyperparameters.js';
import { expertBytes } from '../src/format/layout.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import { describeCurve, describePredictor, predictorFacts } from '../src/report/predictor-table.js';
import { type CheckpointOptions, makeCheckpoint } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY, makeModel } from './support/models.js';
import { decode, Random } from './support/numbers.js';
import { byteLevelTokenizer, writeTokenizer } from './support/tokenizers.js';

const addon = loadAddon();
const scratch = t.testdir({});
const never = new AbortController().signal;
const quiet = () => undefined;
const tokenizerFrom = writeTokenizer(join(scratch, 'tokenizer'), byteLevelTokenizer());

/** Samples of a bank whose neurons are those that a random predictor of rank `teacher` gives a positive score. */
function planted(tokens: number, hiddenSize: number, neuronCount: number, teacher: number, seed: number): Samples {
  const random = new Random(seed);
  const normals = (count: number) => Float32Array.from({ length: count }, () => random.normal());
  const fc1 = normals(teacher * hiddenSize);
  const fc2 = normals(teacher * neuronCount);
  const inputs = normals(tokens * hiddenSize);
  const starts = new Uint32Array(tokens + 1);
  const neurons: number[] = [];
  const contributions: number[] = [];
  for (let token = 0; token < tokens; token++) {
    const units = Array.from({ length: teacher }, (_, k) => {
      let sum = 0;
      for (let i = 0; i < hiddenSize; i++) sum += fc1[k * hiddenSize + i] * inputs[token * hiddenSize + i];
      return Math.max(0, sum) / Math.sqrt(hiddenSize);
    });
    for (let j = 0; j < neuronCount; j++) {
      const score = units.reduce((sum, unit, k) => sum + unit * fc2[k * neuronCount + j], -2);
      if (score <= 0) continue;
      neurons.push(j);
      contributions.push(score);
    }
    starts[token + 1] = neurons.length;
  }
  const lists = { neurons: Uint32Array.from(neurons), contributions: Float32Array.from(contributions) };
  return { tokens, inputs, starts, ...lists };
}

/** Scores of a token by the definition, in double precision. */
function plainScores({ hiddenSize, neuronCount, rank, parameters }: PredictorNumbers, x: Float32Array): Float64Array {
  const fc2 = rank * hiddenSize;
  const bias = fc2 + rank * neuronCount;
  const scores = Float64Array.from(parameters.subarray(bias, bias + neuronCount));
  for (let k = 0; k < rank; k++) {
    let unit = 0;
    for (let i = 0; i < hiddenSize; i++) unit += parameters[k * hiddenSize + i] * x[i];
    if (unit > 0) for (let j = 0; j < neuronCount; j++) scores[j] += unit * parameters[fc2 + k * neuronCount + j];
  }
  return scores;
}

/** The loss that training lowers, by its definition: the mean over tokens of the sum over neurons. */
function plainLoss(predictor: PredictorNumbers, samples: Samples, tokens: readonly number[]): number {
  let loss = 0;
  for (const token of tokens) {
    const x = samples.inputs.subarray(token * predictor.hiddenSize, (token + 1) * predictor.hiddenSize);
    const scores = plainScores(predictor, x);
    const weights = new Float64Array(predictor.neuronCount);
    for (let e = samples.starts[token]; e < samples.starts[token + 1]; e++) {
      weights[samples.neurons[e]] = samples.contributions[e];
    }
    for (const [j, score] of scores.entries()) {
      loss += weights[j] > 0 ? weights[j] * Math.log1p(Math.exp(-score)) : Math.log1p(Math.exp(score));
    }
  }
  return loss / tokens.length;
}

function randomNumbers(hiddenSize: number, neuronCount: number, rank: number, seed: number): PredictorNumbers {
  const random = new Random(seed);
  const count = rank * (hiddenSize + neuronCount) + neuronCount;
  return {
    hiddenSize,
    neuronCount,
    rank,
    parameters: Float32Array.from({ length: count }, () => 0.3 * random.normal()),
  };
}

function trainRequest(
  predictor: PredictorNumbers,
  { inputs, starts, neurons, contributions: weights }: Samples,
  more: Partial<TrainPredictorRequest>,
): TrainPredictorRequest {
  const moments = new Float32Array(2 * predictor.parameters.length);
  const defaults = { stepsBefore: 0, order: Uint32Array.of(0), batchSize: 8, learningRate: 0.01, threads: 1 };
  return { ...predictor, inputs, starts, neurons, weights, moments, ...defaults, ...more };
}

t.test('a step follows the slope of the loss', async (t) => {
  const samples = planted(20, 19, 37, 3, 1);
  const order = [3, 17, 0, 11, 5];
  const predictor = randomNumbers(19, 37, 7, 2);
  const moments = new Float32Array(2 * predictor.parameters.length);
  const parameters = predictor.parameters.slice();
  const more = { order: Uint32Array.from(order), moments, parameters, threads: 2 };
  await addon.trainPredictor(trainRequest(predictor, samples, more));
  let worst = 0;
  for (let i = 0; i < parameters.length; i++) {
    // After the first step Adam's first moment is a tenth of the slope.
    const at = (shift: number) => {
      const moved = { ...predictor, parameters: Float32Array.from(predictor.parameters) };
      moved.parameters[i] += shift;
      return { loss: plainLoss(moved, samples, order), x: moved.parameters[i] };
    };
    const [low, high] = [at(-0.002), at(0.002)];
    const slope = (high.loss - low.loss) / (high.x - low.x);
    worst = Math.max(worst, Math.abs(10 * moments[i] - slope) / (0.05 + Math.abs(slope)));
    const moved = parameters[i] - predictor.parameters[i];
    if (Math.abs(slope) > 1e-3) t.ok(Math.abs(Math.abs(moved) - 0.01) < 1e-4 && moved * slope < 0, `parameter ${i}`);
  }
  t.ok(worst < 0.05, `slopes agree, the worst by ${worst}`);
});

t.test('training does not depend on threads, nor on how it is cut into calls', async (t) => {
  const samples = planted(300, 33, 150, 3, 3);
  const order = Uint32Array.from({ length: 300 }, (_, i) => (7 * i) % 300);
  const results: Float32Array[] = [];
  for (const [threads, calls] of [
    [1, [300]],
    [3, [300]],
    [2, [64, 16, 220]],
  ] as const) {
    const predictor = randomNumbers(33, 150, 20, 4);
    const moments = new Float32Array(2 * predictor.parameters.length);
    let done = 0;
    for (const count of calls) {
      const more = { order: order.slice(done, done + count), stepsBefore: done / 4, batchSize: 4, moments, threads };
      await addon.trainPredictor(trainRequest(predictor, samples, more));
      done += count;
    }
    results.push(predictor.parameters);
  }
  t.strictSame(results[1], results[0], 'three threads, the same bits');
  t.strictSame(results[2], results[0], 'three calls, the same bits');
});

t.test('it learns a pattern that is there', async (t) => {
  const all = planted(2500, 32, 120, 4, 5);
  const train = {
    ...all,
    tokens: 2000,
    starts: all.starts.subarray(0, 2001),
    inputs: all.inputs.subarray(0, 2000 * 32),
  };
  const shares: number[] = [];
  const request = { addon, samples: train, hiddenSize: 32, neuronCount: 120, rank: 16, meanContribution: 1.5 };
  const options = { passes: 30, seed: 1, threads: 2, onProgress: (share: number) => shares.push(share) };
  const predictor = await trainPredictor({ ...request, ...options });
  t.ok(shares.length >= 30 && shares[0] === 0 && shares.every((share) => share < 1));
  const held: Samples = {
    tokens: 500,
    inputs: all.inputs.subarray(2000 * 32),
    starts: all.starts.slice(2000).map((start) => start - all.starts[2000]),
    neurons: all.neurons.subarray(all.starts[2000]),
    contributions: all.contributions.subarray(all.starts[2000]),
  };
  const fired = held.neurons.length / (500 * 120);
  const worth = held.contributions.reduce((sum, contribution) => sum + contribution, 0) / (500 * 120);
  const curve = await measureCurve(addon, [{ samples: held, predictor }], worth, 1);
  const sum = (level: number, key: 'computed' | 'magnitude') =>
    curve.runs[level].reduce((all, run) => all + run[key], 0);
  const level = LEVELS.findLastIndex((_, i) => sum(i, 'magnitude') >= 0.95);
  const computed = sum(level, 'computed');
  t.ok(computed < 1.4 * fired, `95 % of the magnitude in ${computed} of the neurons, ${fired} fire`);
  const again = await trainPredictor({ ...request, ...options, threads: 1 });
  t.strictSame(again.parameters, predictor.parameters, 'the same seed, the same numbers');
});

t.test('scores are the definition’s, stored ones nearly', async (t) => {
  const banks = [randomNumbers(40, 300, 24, 6), randomNumbers(40, 300, 24, 7)];
  const random = new Random(8);
  const inputs = Float32Array.from({ length: 130 * 40 }, () => random.normal());
  const scores = new Float32Array(130 * 300);
  await addon.scorePredictor({ ...banks[0], inputs, scores, threads: 3 });
  let worst = 0;
  for (let token = 0; token < 130; token++) {
    const expected = plainScores(banks[0], inputs.subarray(token * 40, (token + 1) * 40));
    for (let j = 0; j < 300; j++) worst = Math.max(worst, Math.abs(scores[token * 300 + j] - expected[j]));
  }
  t.ok(worst < 1e-4, `the worst differs by ${worst}`);
  for (const [fc1, most] of [
    ['f16', 0.001],
    ['q4', 0.15],
  ] as const) {
    const encoded = await encodeLayer(addon, 5, banks, { fc1, fc2: fc1 }, 2);
    t.strictSame(
      encoded.tensors.map(({ name, rows, columns }) => [name, rows, columns]),
      [
        ['layers.5.predictor.fc1', 48, 40],
        ['layers.5.predictor.fc2', 48, 300],
        ['layers.5.predictor.bias', 2, 300],
      ],
    );
    const decoded = decodeLayer(addon, encoded, 40, 300);
    for (const [e, { parameters }] of decoded.entries()) {
      const off = parameters.map((number, i) => Math.abs(number - banks[e].parameters[i]));
      t.ok(Math.max(...off) < most, `${fc1}, expert ${e}`);
    }
    const bytes = encoded.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
    t.equal(2 * predictorBytes(banks[0], { fc1, fc2: fc1 }), bytes);
  }
});

t.test('the addon refuses requests that would touch what is not there', async (t) => {
  const samples = planted(10, 8, 20, 2, 9);
  const predictor = randomNumbers(8, 20, 4, 10);
  const good = trainRequest(predictor, samples, {});
  await addon.trainPredictor(good);
  const lies: Record<string, Partial<Record<keyof TrainPredictorRequest, unknown>>> = {
    'a neuron that is not there': { neurons: samples.neurons.map((_, i) => (i === 3 ? 20 : 0)) },
    'a token that is not there': { order: Uint32Array.of(10) },
    'starts that descend': { starts: samples.starts.toReversed() },
    'too few parameters': { parameters: new Float32Array(10) },
    'too few moments': { moments: new Float32Array(10) },
    'too few inputs': { inputs: new Float32Array(10) },
    'another kind of array': { neurons: new Float32Array(samples.neurons.length) },
    'no batch': { batchSize: 0 },
    'no threads': { threads: 0 },
    'no rank': { rank: 0 },
    'a vast rank': { rank: 2 ** 40 },
    'no inputs': { inputs: undefined },
  };
  for (const [name, lie] of Object.entries(lies)) {
    await t.rejects(
      addon.trainPredictor({ ...good, ...lie } as TrainPredictorRequest),
      { code: 'NATIVE_ARGUMENT' },
      name,
    );
  }
  const inputs = new Float32Array(16);
  for (const scores of [new Float32Array(39), undefined as unknown as Float32Array]) {
    await t.rejects(addon.scorePredictor({ ...predictor, inputs, scores, threads: 1 }), { code: 'NATIVE_ARGUMENT' });
  }
});

/** Rows of one matrix of a bank, from the bundles. */
async function bankRows(model: ModelDirectory, layer: number, expert: number, matrix: number): Promise<Float32Array> {
  const { hyperparameters: h, layout, quantization } = model.manifest;
  const begin = model.expertOffset(layer, expert);
  const source = readFileSync(model.neuronsPath).subarray(begin, begin + expertBytes(layout, h.neuron_count));
  const encoding = quantization.ffn as 'f16';
  const placement = bundlePlacement(layout, encoding, h.hidden_size, matrix);
  return addon.decodeRows({ source, rows: h.neuron_count, columns: h.hidden_size, encoding, placement });
}

t.test('steps tell what an FFN gets and what its neurons contribute', async (t) => {
  for (const family of ['bamboo', 'turbosparsemixtral'] as const) {
    const path = await makeModel(join(scratch, 'record'), { family, neurons: 150, hidden: 96, context: 64 });
    const model = await openModelDirectory(path);
    const { hyperparameters: h } = model.manifest;
    const used = h.experts?.used_per_token ?? 1;
    const experts = expertCount(h);
    const tokens = Int32Array.from({ length: 6 }, (_, i) => 3 + 11 * i);
    const logits = new Float32Array(h.vocab_size);
    const record = (count: number) => ({
      fired: new Uint8Array(count * h.layer_count * experts * Math.ceil(150 / 8)),
      routed: new Uint8Array(count * h.layer_count),
      inputs: new Float32Array(count * h.layer_count * 96),
      activations: new Float32Array(count * h.layer_count * used * 150).fill(Number.NaN),
    });
    const engine = await Engine.open(model, { context: 0, threads: 2 });
    const batch = record(6);
    await engine.step(tokens, 0, logits, batch);
    const single = record(1);
    const residual = record(6);
    for (let i = 0; i < 6; i++) {
      await engine.step(tokens.subarray(i, i + 1), i, logits, single);
      t.strictSame(
        single.activations,
        batch.activations.subarray(i * single.activations.length, (i + 1) * single.activations.length),
      );
      t.strictSame(single.inputs, batch.inputs.subarray(i * single.inputs.length, (i + 1) * single.inputs.length));
    }
    await engine.step(tokens, 0, logits, { inputs: residual.inputs, input: 'residual' });
    t.notSame(residual.inputs, batch.inputs);
    const small = { activations: batch.activations.subarray(1) };
    await t.rejects(engine.step(tokens, 0, logits, small), { code: 'NATIVE_ARGUMENT' });
    await t.rejects(engine.step(tokens, 0, logits, { inputs: batch.inputs.subarray(1) }), {
      code: 'NATIVE_ARGUMENT',
    });
    await engine.close();

    const rootMeanSquare = (x: Float32Array) => Math.sqrt(x.reduce((sum, value) => sum + value * value, 0) / x.length);
    let worst = 0;
    for (let token = 0; token < 6; token++) {
      for (let layer = 0; layer < h.layer_count; layer++) {
        const at = token * h.layer_count + layer;
        const x = batch.inputs.subarray(at * 96, (at + 1) * 96);
        const raw = residual.inputs.subarray(at * 96, (at + 1) * 96);
        // The norm's weights are near 1.
        t.ok(Math.abs(rootMeanSquare(x) - 1) < 0.3 && raw[0] * x[0] >= 0);
        let slot = 0;
        for (let expert = 0; expert < experts; expert++) {
          if (((batch.routed[at] >> expert) & 1) === 0) continue;
          const gate = await bankRows(model, layer, expert, 0);
          const up = await bankRows(model, layer, expert, 1);
          for (let i = 0; i < 150; i++) {
            const product = (rows: Float32Array) => x.reduce((sum, value, k) => sum + value * rows[i * 96 + k], 0);
            const expected = Math.max(0, product(gate)) * Math.max(0, product(up));
            const value = batch.activations[(at * used + slot) * 150 + i];
            worst = Math.max(worst, Math.abs(value - expected) / (1 + expected));
            const bits = batch.fired[(at * experts + expert) * Math.ceil(150 / 8) + (i >> 3)];
            if (((bits >> (i & 7)) & 1) !== Number(value !== 0)) t.fail(`${family}: neuron ${i} of token ${token}`);
          }
          slot++;
        }
        t.equal(slot, used);
      }
    }
    t.ok(worst < 1e-3, `${family}: the worst activation differs by ${worst}`);
    const norms = await readDownNorms(model, addon);
    const down = await bankRows(model, 1, 0, 2);
    const expected = rootMeanSquare(down.subarray(7 * 96, 8 * 96)) * Math.sqrt(96);
    t.ok(Math.abs(norms[experts][7] - expected) < 1e-5);
  }
});

t.test('samples come back from their file as they went in, as many as fit', async (t) => {
  const file = await SampleFile.create(join(scratch, 'samples'), 3, 2);
  const append = (bank: number, inputs: number[], counts: number[], neurons: number[], contributions: number[]) =>
    file.append(
      bank,
      Float32Array.from(inputs),
      Uint32Array.from(counts),
      Uint32Array.from(neurons),
      Float32Array.from(contributions),
    );
  await append(1, [1, 2, 3, 4], [2, 0], [7, 9], [0.5, 1]);
  await append(0, [9, 9], [0], [], []);
  await append(1, [5, 6], [1], [4], [3]);
  const all = await file.read(1, 1000);
  t.strictSame(Array.from(all.inputs), [1, 2, 3, 4, 5, 6]);
  t.strictSame(Array.from(all.starts), [0, 2, 2, 3]);
  t.strictSame(
    [Array.from(all.neurons), Array.from(all.contributions)],
    [
      [7, 9, 4],
      [0.5, 1, 3],
    ],
  );
  t.equal(file.bytes(1, 1000), 4 * (6 + 3 + 6));
  const some = await file.read(1, file.bytes(1, 1000) - 1);
  t.strictSame([some.tokens, Array.from(some.neurons)], [2, [7, 9]], 'the last block is left out');
  t.equal((await file.read(2, 1000)).tokens, 0);
  t.equal(file.meanContribution([0, 1]), 1.5);
  t.equal(file.meanContribution([2]), 0);
  t.equal(file.firedShare(10), 3 / (4 * 10));
  await file.close();
});

t.test('ranks are tried until they cost more', async (t) => {
  t.strictSame(rankCandidates(256, 1024), [32, 64, 128, 256]);
  t.strictSame(rankCandidates(96, 1024), [32, 64]);
  t.strictSame(rankCandidates(8, 50), [16], 'the least one may be more than the hidden size');
  t.strictSame(rankCandidates(4096, 14336), [448, 896, 1792, 3584]);
  const asked: number[] = [];
  const cost = async (rank: number) => {
    asked.push(rank);
    return Math.abs(rank - 60);
  };
  t.equal(await cheapestRank([32, 64, 128, 256], cost), 64);
  t.strictSame(asked, [32, 64, 128]);
});

t.test('thresholds are the furthest that keep to the budget', async (t) => {
  const scenario = fc.record({
    budget: fc.double({ min: 0.001, max: 0.03, noNaN: true }),
    scale: fc.double({ min: 1e-6, max: 0.01, noNaN: true }),
    power: fc.double({ min: 0.1, max: 6, noNaN: true }),
  });
  await fc.assert(
    fc.asyncProperty(scenario, async ({ budget, scale, power }) => {
      // Growth of perplexity with the levels, of memory and flash weighted by what is where.
      const growth = ({ keptRuns, memory, flash }: Setting) =>
        scale * ((keptRuns * memory ** power + (RUNS - keptRuns) * flash ** power) / RUNS);
      let asked = 0;
      const judge = async (setting: Setting): Promise<Judgement> => {
        asked++;
        const shares = { computedShare: 0.5, fetchedShare: 0, magnitudeShare: 0.5, perplexity: 5 };
        return { setting, growthMost: growth(setting), ...shares };
      };
      const points = (await chooseThresholds({ judge }, budget)) as Judgement[];
      t.strictSame(
        points.map(({ setting }) => setting.keptRuns),
        [0, 1, 2, 3, 4],
      );
      for (const { setting, growthMost } of points) {
        if (growthMost > budget || setting.flash < setting.memory) return false;
        const further = { ...setting, flash: setting.flash + 1 };
        if (setting.keptRuns === RUNS) further.memory++;
        if (setting.flash < LEVELS.length - 1 && growth(further) <= budget) return false;
      }
      return asked < 60;
    }),
    { numRuns: 200 },
  );
  const hopeless = async (setting: Setting): Promise<Judgement> => {
    const shares = { computedShare: 1, fetchedShare: 0, magnitudeShare: 1, perplexity: 5 };
    return { setting, growthMost: 0.02, ...shares };
  };
  t.equal(await chooseThresholds({ judge: hopeless }, 0.01), null);
});

t.test('the curve counts what reaches a threshold', async (t) => {
  const samples = planted(200, 24, 90, 3, 11);
  const predictor = randomNumbers(24, 90, 8, 12);
  const { thresholds, runs } = await measureCurve(addon, [{ samples, predictor }], 0.01, 2);
  const scores = new Float32Array(200 * 90);
  await addon.scorePredictor({ ...predictor, inputs: samples.inputs, scores, threads: 1 });
  const magnitudes = new Float64Array(200 * 90);
  for (let token = 0; token < 200; token++) {
    for (let e = samples.starts[token]; e < samples.starts[token + 1]; e++) {
      magnitudes[token * 90 + samples.neurons[e]] = samples.contributions[e];
    }
  }
  const total = magnitudes.reduce((sum, magnitude) => sum + magnitude, 0);
  const gain = (threshold: number, price: number) =>
    scores.reduce((sum, score, at) => sum + (score >= threshold ? magnitudes[at] - price : 0), 0);
  t.ok(thresholds.every((threshold, i) => i === 0 || threshold >= thresholds[i - 1]));
  for (const [i, threshold] of thresholds.entries()) {
    let computed = 0;
    let magnitude = 0;
    const inRun = Array.from({ length: RUNS }, () => 0);
    for (const [at, score] of scores.entries()) {
      if (score < threshold) continue;
      computed++;
      magnitude += magnitudes[at];
      inRun[Math.floor((RUNS * (at % 90)) / 90)]++;
    }
    const sum = (key: 'computed' | 'magnitude') => runs[i].reduce((all, run) => all + run[key], 0);
    t.ok(Math.abs(sum('computed') - computed / (200 * 90)) < 1e-9, `level ${i}: computed`);
    t.ok(Math.abs(sum('magnitude') - magnitude / total) < 1e-6, `level ${i}: magnitude`);
    if (i < LEVELS.length - 1) {
      const best = gain(threshold, 0.01 * LEVELS[i]);
      const others = thresholds.map((other) => gain(other, 0.01 * LEVELS[i]));
      t.ok(Math.max(...others) <= best + 1e-3, `level ${i}: no other threshold is worth more`);
    }
    t.ok(inRun.every((count, run) => Math.abs(runs[i][run].computed - count / (200 * 90)) < 1e-9));
  }
  t.equal(
    runs[LEVELS.length - 1].reduce((all, run) => all + run.computed, 0),
    0,
    'the last computes nothing',
  );
});

/** A model whose neurons a small predictor can know, and a text of random letters. */
const PREDICTABLE: CheckpointOptions = {
  family: 'bamboo',
  vocab: MODEL_VOCABULARY,
  tokenizerFrom,
  ...{ hidden: 64, heads: 2, neurons: 512, layers: 2, context: 64, gateRank: 5 },
};
const textPath = join(scratch, 'text.txt');
writeFileSync(textPath, randomText(6000));

function randomText(length: number): string {
  const random = new Random(20);
  return Array.from({ length }, (_, i) =>
    i % 61 === 60 ? '\n' : String.fromCharCode(97 + random.uniform() * 26),
  ).join('');
}

let count = 0;

function convertHere(
  checkpoint: string,
  more: Partial<ConvertOptions>,
  onNote: (text: string) => void = quiet,
  signal = never,
) {
  const output = join(scratch, `${count++}.pi2`);
  const request = { checkpoint, output, quantization: 'q8', maxMemoryBytes: 2 ** 32, force: false, ...more } as const;
  return convert(request, (event) => event.type === 'note' && onNote(event.text), signal);
}

const digest = (directory: string) =>
  Object.fromEntries(
    readdirSync(directory).map((file) => [
      file,
      createHash('sha256')
        .update(readFileSync(join(directory, file)))
        .digest('hex'),
    ]),
  );

t.test('convert trains a predictor that keeps to the budget', async (t) => {
  const checkpoint = makeCheckpoint(join(scratch, 'predictable'), PREDICTABLE);
  const request = { calibration: textPath, quality: '2%' } as const;
  const result = await convertHere(checkpoint, request);
  t.equal(result.noPredictor, null);
  const model = await openModelDirectory(result.output);
  const { predictor } = model.manifest;
  if (!predictor) return t.fail('no predictor');
  t.match(predictor, { source: 'trained', input: 'ffn_norm', quality: { budget: 0.02 } });
  t.strictSame(
    predictor.points.map((point) => point.kept_share),
    [0, 0.25, 0.5, 0.75, 1],
  );
  for (const point of predictor.points) {
    t.ok(point.perplexity <= 1.02 * predictor.quality.exact_perplexity, `${point.kept_share} kept`);
    t.ok(point.fetched_share <= point.computed_share && (point.kept_share < 1 || point.fetched_share === 0));
    t.ok(point.flash_thresholds.every((threshold, l) => threshold >= point.memory_thresholds[l]));
  }
  t.ok(predictor.points[4].computed_share < 0.6, `computes ${predictor.points[4].computed_share}`);
  t.ok(predictor.quality.tokens > 2500, 'half of a short text is held out');
  const verify = () => verifyModel(model, addon, { threads: 1, progress: quiet });
  t.strictSame(await verify(), []);
  const bytes = readFileSync(model.predictorPath);
  bytes[bytes.length - 5000] ^= 1;
  writeFileSync(model.predictorPath, bytes);
  t.match(await verify(), [{ extent: 'layers.1.predictor', file: 'predictor.bin', problems: [/CRC-32|checksum/] }]);
  bytes[bytes.length - 5000] ^= 1;
  writeFileSync(model.predictorPath, bytes);

  const line = describePredictor(predictor, result.predictor?.bytes as number);
  t.match(
    line,
    /^predictor trained: ranks? [\d ]+, \d.* KiB; all in memory it computes \d+\.\d % of the neurons at x\d/,
  );
  const table = describeCurve(predictor).split('\n');
  t.equal(table.length, predictor.curve.length + 2);
  t.ok(table.filter((row) => row.endsWith('chosen')).length >= 5);
  t.match(predictorFacts(predictor), { source: 'trained', points: [{ kept_share: 0 }], curve: [{}] });

  await t.test('stopped at any moment, it ends with the same bytes', async (t) => {
    const expected = digest(result.output);
    const stops = [/collecting samples of .* to judge/, /collecting samples of .* to train/];
    const output = join(scratch, 'stopped.pi2');
    for (const stop of stops) {
      const controller = new AbortController();
      const onNote = (text: string) => stop.test(text) && controller.abort();
      const stopped = convertHere(checkpoint, { ...request, output }, onNote, controller.signal);
      await t.rejects(stopped, { code: 'E_INTERRUPTED' });
      t.ok(existsSync(`${output}.partial`) && !existsSync(output));
    }
    // Finished layers are found again, and one that is not whole is made again.
    const work = join(`${output}.partial`, 'predictor.work');
    writeFileSync(join(work, 'layer-1'), 'torn');
    await convertHere(checkpoint, { ...request, output });
    t.strictSame(digest(output), expected);
    t.notOk(existsSync(`${output}.partial`) || existsSync(`${output}.calibration`));
  });
});

t.test('a predictor that is not worth it is left out, in words', async (t) => {
  const random = makeCheckpoint(join(scratch, 'hopeless'), { ...PREDICTABLE, gateRank: undefined, predictors: true });
  const result = await convertHere(random, { calibration: textPath, predictor: 'checkpoint', quality: '0.5%' });
  t.equal(result.predictor, null);
  t.match(result.noPredictor, /% of the FFN|perplexity may grow by/);
  t.ok(
    result.ignored.some((name) => name.includes('.predictor.')),
    'its tensors are left out',
  );
  t.notOk(existsSync(join(result.output, 'predictor.bin')));
  t.equal((await openModelDirectory(result.output)).manifest.predictor, undefined);
  const short = join(scratch, 'short.txt');
  writeFileSync(short, randomText(200));
  t.match((await convertHere(random, { calibration: short })).noPredictor, /too short to judge a predictor/);
  const asked = convertHere(random, { calibration: short, predictor: 'train' });
  await t.rejects(asked, { code: 'E_TEXT', message: /too short/ });
});

t.test('what cannot be asked for is refused in words', async (t) => {
  const open = (options: Partial<CheckpointOptions>) =>
    Checkpoint.open(makeCheckpoint(join(scratch, `asked-${count++}`), { family: 'bamboo', ...options }));
  const dense = await open({ family: 'llama' });
  const plain = await open({});
  const bearer = await open({ predictors: true });
  const ask = (from: Checkpoint, mode: PredictorMode, hasText = true, quality: Quality = '1%') =>
    choosePredictor(from, mode, quality, hasText);
  t.strictSame(ask(plain, 'auto'), { source: 'trained', budget: 0.01, isAsked: false });
  t.strictSame(ask(bearer, 'auto', true, '0.5%'), { source: 'checkpoint', budget: 0.005, isAsked: false });
  t.strictSame(ask(bearer, 'train'), { source: 'trained', budget: 0.01, isAsked: true });
  for (const none of [
    ask(plain, 'none'),
    ask(plain, 'auto', false),
    ask(dense, 'auto'),
    ask(bearer, 'auto', true, 'exact'),
  ]) {
    t.equal(none, null);
  }
  const refusals: [() => unknown, RegExp][] = [
    [() => ask(plain, 'checkpoint'), /has no predictors/],
    [() => ask(plain, 'train', false), /no text/],
    [() => ask(dense, 'train'), /no sparse neurons/],
    [() => ask(bearer, 'checkpoint', true, 'exact'), /--quality exact/],
  ];
  for (const [refused, message] of refusals) t.throws(refused, { code: 'E_USAGE', message });
  for (const checkpoint of [dense, plain, bearer]) await checkpoint.close();
});

t.test('predictors of a checkpoint: turned over, in heat order, padded to one rank', async (t) => {
  const directory = makeCheckpoint(join(scratch, 'bearer'), {
    family: 'turbosparsemixtral',
    predictors: true,
    neurons: 30,
  });
  const checkpoint = await Checkpoint.open(directory);
  const found = checkpoint.predictors();
  t.strictSame(
    found?.map((experts) => experts.map(({ rank }) => rank)),
    [
      [8, 8, 8, 8],
      [8, 8, 8, 8],
    ],
  );
  if (!found) return;
  const source = found[1][2];
  const numbers = async (name: 'fc1' | 'fc2') => {
    const bytes = new Uint8Array(checkpoint.bytes(source[name]));
    await checkpoint.read(source[name], 0, bytes);
    return decode(bytes, 'BF16');
  };
  const [fc1, fc2] = [await numbers('fc1'), await numbers('fc2')];
  const order = Uint32Array.from({ length: 30 }, (_, j) => (7 * j + 3) % 30);
  const { parameters, rank } = await readPredictor(addon, checkpoint, source, order, 11);
  t.equal(rank, 11);
  t.strictSame(parameters.subarray(0, 8 * 96), fc1);
  t.ok(parameters.subarray(8 * 96, 11 * 96).every((number) => number === 0));
  for (let k = 0; k < 11; k++) {
    for (let j = 0; j < 30; j++) {
      const expected = k < 8 ? fc2[order[j] * 8 + k] : 0;
      if (parameters[11 * 96 + k * 30 + j] !== expected) t.fail(`unit ${k}, neuron ${j}`);
    }
  }
  t.ok(
    parameters.subarray(11 * (96 + 30)).every((number) => number === 0),
    'no bias',
  );
  await checkpoint.close();

  const partial = makeCheckpoint(join(scratch, 'partial'), { family: 'bamboo', predictors: true });
  const file = join(partial, 'model.safetensors');
  const bytes = readFileSync(file);
  const name = 'model.layers.1.mlp.predictor.fc2.weight';
  bytes.write('model.layers.1.mlp.predictor.fc9.weight', bytes.indexOf(name));
  writeFileSync(file, bytes);
  const opened = await Checkpoint.open(partial);
  t.throws(() => opened.predictors(), {
    code: 'E_TENSOR',
    message: /no tensor "model.layers.1.mlp.predictor.fc2.weight"/,
  });
  await opened.close();
});
