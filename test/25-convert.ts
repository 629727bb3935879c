import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statfsSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { render } from 'ink-testing-library';
import { createElement } from 'react';
import t, { type Test } from 'tap';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import type { SourceModel, SourceTensor } from '../converter/checkpoint/model.js';
import { SourceFile } from '../converter/checkpoint/source-file.js';
import { type ConvertEvent, type ConvertOptions, convert } from '../converter/convert.js';
import { recipeFor } from '../converter/quantize/recipe.js';
import { conversionOrder, planExtents } from '../converter/steps/extents.js';
import { cutPieces, leastLimits, loadBytes, type Piece } from '../converter/steps/pieces.js';
import { convertCommand } from '../src/cli/convert.js';
import { loadAddon } from '../src/engine/addon.js';
import { rowBytes, scaleBytes, weightBytes } from '../src/format/encoding.js';
import { expertCount } from '../src/format/hyperparameters.js';
import { expertBytes, roundUpToPage } from '../src/format/layout.js';
import { type Manifest, manifestSchema, QUANTIZATIONS, type QuantizationName } from '../src/format/manifest.js';
import { ProgressLine } from '../src/ui/progress-view.js';
import { compileProgram } from './support/compiled.js';
import { type CheckpointOptions, makeCheckpoint } from './support/make-checkpoint.js';
import { decode } from './support/numbers.js';
import { safetensors, splitFile } from './support/safetensors.js';
import { needsShared, SHARED_MODEL_NAMES, sharedModel } from './support/shared.js';

const scratch = t.testdir({});
let directories = 0;
const MEBIBYTE = 1024 * 1024;
const never = new AbortController().signal;
const quiet = () => undefined;

/** Odd shapes of every kind of model: rows that are no multiple of a group, several shards, tied, experts, biases. */
const CHECKPOINTS: Record<string, CheckpointOptions> = {
  llama: { family: 'llama', hidden: 192, heads: 4, kvHeads: 1, headDim: 40, neurons: 704, shards: 3 },
  qwen2: { family: 'qwen2', hidden: 96, tied: true, type: 'F32' },
  qwen3: { family: 'qwen3', hidden: 128, heads: 2, kvHeads: 2, headDim: 96, neurons: 300 },
  bamboo: { family: 'bamboo', hidden: 320, heads: 4, kvHeads: 2, neurons: 513, predictors: true },
  mixtral: { family: 'mixtral', hidden: 64, heads: 2, experts: 3, neurons: 81, shards: 2 },
  turbosparse: { family: 'turbosparsemixtral', experts: 5, neurons: 50, predictors: true },
  opt: { family: 'opt', hidden: 160, heads: 5, neurons: 333, type: 'F16', layers: 3 },
  wide: { family: 'sparsellama', hidden: 1100, heads: 10, headDim: 20, neurons: 40, vocab: 40, layers: 1 },
};

function newDirectory(): string {
  const directory = join(scratch, String(directories++));
  mkdirSync(directory);
  return directory;
}

function make(options: CheckpointOptions): string {
  return makeCheckpoint(join(newDirectory(), 'tiny'), options);
}

/** Converts in this process, whose memory the test runner has filled already. */
function convertHere(
  checkpoint: string,
  options: Partial<ConvertOptions> = {},
  onEvent: (event: ConvertEvent) => void = quiet,
  signal = never,
) {
  const defaults = { quantization: 'q4', maxMemoryBytes: 4096 * MEBIBYTE, force: false } as const;
  const output = options.output ?? join(newDirectory(), 'out.pi2');
  return convert({ checkpoint, ...defaults, ...options, output }, onEvent, signal);
}

function hashOf(path: string): string {
  return createHash('sha256').update(readFileSync(path)).digest('hex');
}

/** sha256 of every file of a directory, by name. */
function digest(directory: string): Record<string, string> {
  const files = readdirSync(directory, { recursive: true, encoding: 'utf8' }).sort();
  return Object.fromEntries(
    files
      .filter((file) => statSync(join(directory, file)).isFile())
      .map((file) => [file, hashOf(join(directory, file))]),
  );
}

function readManifest(directory: string): Manifest {
  return manifestSchema.parse(JSON.parse(readFileSync(join(directory, 'model.json'), 'utf8')));
}

async function modelOf(checkpoint: string): Promise<SourceModel> {
  const opened = await Checkpoint.open(checkpoint);
  await opened.close();
  return opened.model;
}

t.test('extents lie on pages of their own, tensors on cache lines inside them', async (t) => {
  for (const [name, options] of Object.entries(CHECKPOINTS)) {
    const model = await modelOf(make(options));
    for (const quantization of QUANTIZATIONS) {
      const plan = planExtents(model, recipeFor(quantization, model.hyperparameters.tied_embeddings));
      for (const [extents, size] of [
        [plan.resident, plan.residentBytes],
        [plan.neurons, plan.neuronsBytes],
      ] as const) {
        let end = 0;
        for (const extent of extents) {
          if (extent.offset !== end) t.fail(`${name} ${quantization}: ${extent.name} begins at ${extent.offset}`);
          end = roundUpToPage(extent.offset + extent.bytes);
        }
        t.equal(size, end, `${name} ${quantization}: extents follow one another and fill the file`);
      }
      for (const extent of plan.resident) {
        if (extent.kind !== 'tensors') continue;
        let end = 0;
        for (const tensor of extent.tensors) {
          const fits = tensor.offset >= end && tensor.offset - end < 64 && tensor.offset % 64 === 0;
          end = tensor.offset + tensor.bytes;
          if (!fits || tensor.bytes !== tensor.rows * rowBytes(tensor.encoding, tensor.columns)) t.fail(tensor.name);
        }
        if (end !== extent.bytes) t.fail(`${extent.name} has ${extent.bytes} bytes, its tensors ${end}`);
      }
    }
  }
});

t.test('however memory cuts an extent, pieces follow one another and read every number once', async (t) => {
  for (const [name, options] of Object.entries(CHECKPOINTS)) {
    const model = await modelOf(make(options));
    const plan = planExtents(model, recipeFor('q4', model.hyperparameters.tied_embeddings));
    for (const extent of conversionOrder(plan).slice(0, 3)) {
      const least = leastLimits(extent);
      const more = fc.double({ min: 1, max: 40, noNaN: true });
      fc.assert(
        fc.property(more, more, fc.nat(), (pieceFactor, chunkFactor, where) => {
          const limits = {
            pieceBytes: Math.floor(least.pieceBytes * pieceFactor),
            chunkBytes: Math.floor(least.chunkBytes * chunkFactor),
          };
          const pieces = cutPieces(extent, 0, limits);
          let end = 0;
          for (const piece of pieces) {
            if (piece.begin !== end || piece.end - piece.begin > limits.pieceBytes) return false;
            if (piece.loads.some((load) => loadBytes(load) > limits.chunkBytes)) return false;
            if (piece.loads.some((load) => load.begin < 0 || load.end > piece.end - piece.begin)) return false;
            end = piece.end;
          }
          // From any piece's end on, the rest is converted, and nothing twice.
          const from = where % (pieces.length + 1);
          const rest = cutPieces(extent, pieces[from]?.begin ?? extent.bytes, limits);
          return end === extent.bytes && readsOnce([...pieces.slice(0, from), ...rest]);
        }),
        { numRuns: 30 },
      );
    }
    t.pass(name);
  }
});

/** Whether the loads of some pieces cover each source tensor they name exactly once (skipped first rows aside). */
function readsOnce(pieces: Piece[]): boolean {
  const seen = new Map<SourceTensor, Uint8Array>();
  for (const load of pieces.flatMap((piece) => piece.loads)) {
    const { source, firstRow, rows, firstColumn, columns } = load;
    const width = source.shape[source.shape.length - 1];
    const counts = seen.get(source) ?? new Uint8Array(source.shape.reduce((a, b) => a * b, 1));
    seen.set(source, counts);
    for (let row = firstRow; row < firstRow + rows; row++) {
      for (let column = firstColumn; column < firstColumn + columns; column++) counts[row * width + column]++;
    }
  }
  return [...seen].every(([source, counts]) => {
    const first = source.name.includes('embed_positions') ? 2 * source.shape[1] : 0;
    return counts.subarray(first).every((count) => count === 1) && counts.subarray(0, first).every((n) => n === 0);
  });
}

t.test('limits that are too small and borders that are none are refused', async (t) => {
  const model = await modelOf(make(CHECKPOINTS.llama));
  const [embedding, , neurons] = conversionOrder(planExtents(model, recipeFor('q4', false)));
  const wide = { pieceBytes: MEBIBYTE, chunkBytes: MEBIBYTE };
  t.throws(() => cutPieces(neurons, 4095, wide), RangeError);
  t.throws(() => cutPieces(embedding, 1, wide), RangeError);
  t.throws(() => cutPieces(neurons, 0, { ...wide, pieceBytes: 4095 }), RangeError);
  t.throws(() => cutPieces(neurons, 0, { ...wide, chunkBytes: 100 }), RangeError);
});

/** The numbers of a source tensor. */
async function numbersOf(checkpoint: Checkpoint, tensor: SourceTensor): Promise<Float32Array> {
  const bytes = new Uint8Array(checkpoint.bytes(tensor));
  await checkpoint.read(tensor, 0, bytes);
  return decode(bytes, tensor.type);
}

/** Whether `stored` is `source` but for the rounding of its encoding, vector by vector and block by block. */
function isNear(source: Float32Array, stored: Float32Array, encoding: string, columns: number): boolean {
  const share = { f32: 0, f16: 2 ** -11, q8: 0.0045, q4: 0.25 }[encoding] as number;
  let squaredError = 0;
  let squares = 0;
  for (let row = 0; row < source.length; row += columns) {
    for (let block = row; block < row + columns; block += 32) {
      const end = Math.min(block + 32, row + columns);
      let largest = 0;
      for (let i = block; i < end; i++) largest = Math.max(largest, Math.abs(source[i]));
      for (let i = block; i < end; i++) {
        const error = Math.abs(source[i] - stored[i]);
        if (!(error <= share * largest + 1e-7)) return false;
        squaredError += error * error;
        squares += source[i] * source[i];
      }
    }
  }
  return squaredError <= (encoding === 'q4' ? 0.12 ** 2 : 0.01 ** 2) * squares;
}

const plainRows = (encoding: 'f32' | 'f16' | 'q8' | 'q4', columns: number) => ({
  perUnit: 1,
  unitBytes: rowBytes(encoding, columns),
  weightsOffset: 0,
  weightsStride: rowBytes(encoding, columns),
  scalesOffset: weightBytes(encoding, columns),
  scalesStride: rowBytes(encoding, columns),
});

/** Decodes a whole model directory by FORMAT.md alone and compares it with its checkpoint. */
async function checkModel(t: Test, checkpointDirectory: string, directory: string): Promise<void> {
  const checkpoint = await Checkpoint.open(checkpointDirectory);
  const manifest = readManifest(directory);
  const { hyperparameters: h, layout, quantization } = manifest;
  const files = {
    'resident.bin': readFileSync(join(directory, 'resident.bin')),
    'neurons.bin': readFileSync(join(directory, 'neurons.bin')),
    'predictor.bin': manifest.predictor ? readFileSync(join(directory, 'predictor.bin')) : Buffer.alloc(0),
    'npu/weights.bin': manifest.npu ? readFileSync(join(directory, 'npu/weights.bin')) : Buffer.alloc(0),
  };
  const ends = { 'resident.bin': 0, 'neurons.bin': 0, 'predictor.bin': 0, 'npu/weights.bin': 0 };
  const extents = new Map(manifest.extents.map((extent) => [extent.name, extent]));
  const bytesOf = (name: string) => {
    const { file, offset, bytes } = extents.get(name)!;
    return files[file].subarray(offset, offset + bytes);
  };
  for (const { name, file, offset, bytes, crc32: sum } of manifest.extents) {
    if (offset !== ends[file]) t.fail(`${name} does not follow`);
    ends[file] = roundUpToPage(offset + bytes);
    t.equal(crc32(bytesOf(name)).toString(16).padStart(8, '0'), sum, `${name}: crc32`);
    if (files[file].subarray(offset + bytes, ends[file]).some((byte) => byte !== 0)) t.fail(`${name}: padding`);
  }
  t.same(
    Object.values(files).map((bytes) => bytes.length),
    Object.values(ends),
    'files end after extents',
  );

  const addon = loadAddon();
  const { model } = checkpoint;
  const sourceOf = (name: string): SourceTensor => {
    const [, layer, part] = /^layers\.(\d+)\.(.*)$/.exec(name) ?? [];
    if (part) return model.layers[Number(layer)][part as 'q'];
    return name === 'position_embedding' ? model.position_embedding!.tensor : model[name as 'embedding'];
  };
  let tensors = 0;
  for (const { name, extent, offset, bytes, encoding, rows, columns } of manifest.tensors) {
    if (encoding === 'u32') continue;
    const source = bytesOf(extent).subarray(offset, offset + bytes);
    const stored = addon.decodeRows({ source, rows, columns, encoding, placement: plainRows(encoding, columns) });
    const numbers = await numbersOf(checkpoint, sourceOf(name));
    const skipped = name === 'position_embedding' ? 2 * columns : 0;
    if (!isNear(numbers.subarray(skipped), stored, encoding, columns)) t.fail(`${name} differs`);
    tensors++;
  }
  t.ok(tensors > 0, `${tensors} tensors hold what the checkpoint holds`);

  const encoding = quantization.ffn as 'q4';
  const weights = weightBytes(encoding, h.hidden_size);
  const scales = scaleBytes(encoding, h.hidden_size);
  for (const [l, layer] of model.layers.entries()) {
    const bundles = bytesOf(`layers.${l}.neurons`);
    const checksums = bytesOf(`layers.${l}.checksums`);
    for (const [e, expert] of layer.experts.entries()) {
      const matrices = expert.gate ? [expert.gate, expert.up, expert.down] : [expert.up, expert.down];
      const sources = await Promise.all(matrices.map((matrix) => numbersOf(checkpoint, matrix)));
      const begin = e * expertBytes(layout, h.neuron_count);
      for (let j = 0; j < h.neuron_count; j++) {
        const unit = begin + Math.floor(j / layout.neurons_per_unit) * layout.unit_bytes;
        const slot = j % layout.neurons_per_unit;
        const part1 = unit + slot * layout.part1_stride;
        const part2 = unit + layout.part2_offset + slot * layout.part2_stride;
        for (const [m, source] of sources.entries()) {
          const weightsAt = m === 0 ? part1 : part2 + (m - 1) * weights;
          const scalesAt = part1 + weights + m * scales;
          const vector = Buffer.concat([
            bundles.subarray(weightsAt, weightsAt + weights),
            bundles.subarray(scalesAt, scalesAt + scales),
          ]);
          const stored = addon.decodeRows({
            source: vector,
            rows: 1,
            columns: h.hidden_size,
            encoding,
            placement: plainRows(encoding, h.hidden_size),
          });
          const isDown = m === sources.length - 1;
          const numbers = isDown
            ? Float32Array.from({ length: h.hidden_size }, (_, row) => source[row * h.neuron_count + j])
            : source.subarray(j * h.hidden_size, (j + 1) * h.hidden_size);
          if (!isNear(numbers, stored, encoding, h.hidden_size))
            t.fail(`layer ${l} expert ${e} neuron ${j} matrix ${m}`);
        }
        const at = 8 * (e * h.neuron_count + j);
        const sums = [crc32(bundles.subarray(part1, part1 + layout.part1_bytes))];
        sums.push(crc32(bundles.subarray(part2, part2 + layout.part2_bytes)));
        if (checksums.readUInt32LE(at) !== sums[0] || checksums.readUInt32LE(at + 4) !== sums[1]) {
          t.fail(`layer ${l} expert ${e} neuron ${j}: checksums`);
        }
      }
    }
    t.equal(
      checksums.length,
      8 * expertCount(h) * h.neuron_count,
      `layer ${l}: bundles hold what the checkpoint holds`,
    );
  }
  await checkpoint.close();

  for (const { file, bytes, sha256 } of manifest.provenance.sources) {
    t.equal(sha256, hashOf(join(checkpointDirectory, file)), `${file}: sha256`);
    t.equal(bytes, statSync(join(checkpointDirectory, file)).size, `${file}: bytes`);
  }
}

for (const [i, [name, options]] of Object.entries(CHECKPOINTS).entries()) {
  t.test(`${name}: what is converted decodes to what the checkpoint holds`, async (t) => {
    const checkpoint = make({ ...options, seed: i + 1 });
    const quantizations = i < 2 ? QUANTIZATIONS : [QUANTIZATIONS[i % 3], 'q4' as const];
    for (const quantization of new Set<QuantizationName>(quantizations)) {
      const result = await convertHere(checkpoint, { quantization });
      await checkModel(t, checkpoint, result.output);
      const files = readdirSync(result.output);
      const bytes = files.reduce((sum, file) => sum + statSync(join(result.output, file)).size, 0);
      t.equal(result.bytes, bytes, 'the result tells the bytes of the directory');
      t.equal(result.ignored.length > 0, options.predictors === true, 'predictors are left out and told');
      t.equal(result.bitsPerWeight.head === null, readManifest(result.output).hyperparameters.tied_embeddings);
      t.strictSame(readdirSync(join(result.output, '..')), ['out.pi2'], 'nothing else is left');
    }
  });
}

for (const name of SHARED_MODEL_NAMES) {
  t.test(`${name}: the trained checkpoint converts, its tokenizer comes along`, needsShared(name), async (t) => {
    const checkpoint = sharedModel(name) as string;
    const result = await convertHere(checkpoint);
    await checkModel(t, checkpoint, result.output);
    t.ok(result.hasTokenizer);
    t.same(readFileSync(join(result.output, 'tokenizer.json')), readFileSync(join(checkpoint, 'tokenizer.json')));
    const bits = result.bitsPerWeight;
    t.ok(bits.ffn >= 4.5 && bits.ffn < 5, `ffn ${bits.ffn} bits`);
  });
}

t.test('an output that is there is kept, unless forced and until the new one is whole', async (t) => {
  const checkpoint = make(CHECKPOINTS.llama);
  const { output } = await convertHere(checkpoint);
  const q4 = digest(output);
  const around = () => readdirSync(join(output, '..'));
  await t.rejects(convertHere(checkpoint, { output, quantization: 'q8' }), { code: 'E_EXISTS', hint: /--force/ });
  t.same(digest(output), q4);

  const forced = { output, quantization: 'q8', force: true } as const;
  const stop = new AbortController();
  await t.rejects(
    convertHere(checkpoint, forced, () => stop.abort(), stop.signal),
    {
      code: 'E_INTERRUPTED',
      hint: /same command/,
    },
  );
  t.same(digest(output), q4, 'interrupted, the old model is still there');
  await convertHere(checkpoint, forced);
  t.equal(readManifest(output).quantization.name, 'q8');
  t.strictSame(around(), ['out.pi2']);

  renameSync(output, `${output}.replaced`);
  await t.rejects(
    convertHere(checkpoint, { output }),
    { code: 'E_EXISTS' },
    'killed between two renames: it comes back',
  );
  t.equal(readManifest(output).quantization.name, 'q8');

  rmSync(output, { recursive: true });
  mkdirSync(output);
  writeFileSync(join(output, 'thesis.txt'), 'not a model');
  await t.rejects(convertHere(checkpoint, forced), { code: 'E_EXISTS', message: /not a model/ });
  t.ok(existsSync(join(output, 'thesis.txt')), 'force replaces models only');
  t.strictSame(around(), ['out.pi2']);
});

t.test('outputs that are not NAME.pi2 are refused', async (t) => {
  const checkpoint = make(CHECKPOINTS.llama);
  await t.rejects(convertHere(checkpoint, { output: 'model' }), { code: 'E_USAGE', hint: /model\.pi2/ });
  await t.rejects(convertHere(checkpoint, { output: join(scratch, '.pi2') }), { code: 'E_USAGE' });
  await t.rejects(convertHere(checkpoint, { output: join(scratch, 'no/where.pi2') }), { code: 'E_FILE' });
});

t.test('one converter at a time on one output', async (t) => {
  const checkpoint = make(CHECKPOINTS.llama);
  const output = join(newDirectory(), 'out.pi2');
  const settled = await Promise.allSettled([convertHere(checkpoint, { output }), convertHere(checkpoint, { output })]);
  t.same(settled.map((s) => s.status).sort(), ['fulfilled', 'rejected']);
  t.match(
    settled.find((s) => s.status === 'rejected'),
    { reason: { code: 'E_EXISTS' } },
  );

  rmSync(output, { recursive: true });
  const stat = readFileSync(`/proc/${process.pid}/stat`, 'latin1');
  const started = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  writeFileSync(`${output}.lock`, `${process.pid} ${started}\n`);
  await t.rejects(convertHere(checkpoint, { output }), { code: 'E_EXISTS', message: new RegExp(String(process.pid)) });
  for (const stale of [`${process.pid} 1\n`, '99999999 5\n', 'nonsense', '']) {
    writeFileSync(`${output}.lock`, stale);
    writeFileSync(`${output}.lock.99999999-killed-while-it-took-the-lock`, stale);
    await convertHere(checkpoint, { output, force: true });
    t.strictSame(
      readdirSync(join(output, '..')),
      ['out.pi2'],
      `a lock of nobody is taken over: ${JSON.stringify(stale)}`,
    );
  }
});

t.test('a checkpoint that changes meanwhile is refused', async (t) => {
  const checkpoint = make(CHECKPOINTS.llama);
  const output = join(newDirectory(), 'out.pi2');
  const touch = () => utimesSync(join(checkpoint, 'config.json'), 1000, 1000);
  await t.rejects(convertHere(checkpoint, { output }, touch), { code: 'E_CHANGED', message: /config\.json/ });
  t.strictSame(readdirSync(join(output, '..')), [], 'nothing is left of it');
});

/** Overwrites one number of a checkpoint in one file. */
function poke(checkpoint: string, tensor: string, index: number, bytes: number[]): void {
  const path = join(checkpoint, 'model.safetensors');
  const { header, data } = splitFile(path);
  const file = openSync(path, 'r+');
  const at = statSync(path).size - data.length + header[tensor].data_offsets[0] + index * bytes.length;
  writeSync(file, Uint8Array.from(bytes), 0, bytes.length, at);
}

t.test('numbers that no model computes with are named', async (t) => {
  const shape: CheckpointOptions = { family: 'llama', hidden: 96, neurons: 176 };
  const cases = [
    ['model.layers.1.mlp.down_proj.weight', 70 * 176 + 33, [0xc0, 0x7f], /row 70, column 33 is NaN/],
    ['model.layers.0.mlp.gate_proj.weight', 175 * 96 + 95, [0x80, 0xff], /row 175, column 95 is -Infinity/],
    ['model.embed_tokens.weight', 3 * 96 + 1, [0x80, 0x7f], /row 3, column 1 is Infinity/],
    ['model.norm.weight', 7, [0xc1, 0xff], /element 7 is NaN/],
  ] as const;
  for (const [tensor, index, bytes, message] of cases) {
    const checkpoint = make(shape);
    poke(checkpoint, tensor, index, [...bytes]);
    const output = join(newDirectory(), 'out.pi2');
    const error = await convertHere(checkpoint, { output }).catch((e) => e);
    t.match(error, { code: 'E_NOT_FINITE', message });
    t.ok(error.message.includes(tensor), error.message);
    t.strictSame(readdirSync(join(output, '..')), [], 'nothing is left of it');
  }
  const large = make({ ...shape, type: 'F32' });
  const number = Buffer.alloc(4);
  number.writeFloatLE(70000);
  poke(large, 'model.layers.0.self_attn.q_proj.weight', 5 * 96 + 6, [...number]);
  await t.rejects(convertHere(large, { quantization: 'f16' }), {
    code: 'E_NOT_FINITE',
    message: /row 5, column 6 is 70000, too large for f16/,
    hint: /--quant q8/,
  });
  await convertHere(large, { quantization: 'q8' });
});

t.test('a journal torn or cut anywhere continues to the same bytes', async (t) => {
  const checkpoint = make({ ...CHECKPOINTS.mixtral, layers: 5 });
  const expected = digest((await convertHere(checkpoint)).output);
  const output = join(newDirectory(), 'out.pi2');
  const journal = join(`${output}.partial`, 'journal.jsonl');
  let seed = 1;
  for (let round = 0; round < 12; round++) {
    const stop = new AbortController();
    let events = 0;
    seed = (seed * 48271) % 2147483647;
    const stopAt = 1 + (seed % 60);
    const onEvent = () => ++events === stopAt && stop.abort();
    const outcome = await convertHere(checkpoint, { output }, onEvent, stop.signal).catch((e) => e);
    if (outcome.code === 'E_INTERRUPTED') {
      const size = statSync(journal).size;
      truncateSync(journal, size - ((seed >> 8) % Math.min(size, 400)));
      await convertHere(checkpoint, { output });
    }
    t.same(digest(output), expected, `stopped at event ${stopAt}`);
    rmSync(output, { recursive: true });
  }
});

t.test('a partial directory of something else is started over, with a word', async (t) => {
  const checkpoint = make(CHECKPOINTS.llama);
  const other = make({ ...CHECKPOINTS.llama, seed: 77 });
  const output = join(newDirectory(), 'out.pi2');
  const interrupt = async (source: string, quantization: QuantizationName) => {
    const stop = new AbortController();
    const onEvent = (e: ConvertEvent) => e.type === 'progress' && e.step === 'head' && stop.abort();
    await t.rejects(convertHere(source, { output, quantization }, onEvent, stop.signal), {
      code: 'E_INTERRUPTED',
    });
  };
  const journal = join(`${output}.partial`, 'journal.jsonl');
  const spoil: [string, RegExp, () => Promise<void> | void][] = [
    ['another quantization', /--quant q8/, () => interrupt(checkpoint, 'q8')],
    ['another checkpoint', /begun from/, () => interrupt(other, 'q4')],
    ['a changed checkpoint', /changed since/, () => utimesSync(join(checkpoint, 'config.json'), 5000, 5000)],
    ['a damaged journal', /damaged/, () => writeFileSync(journal, '{"journal":1}\nnonsense\n')],
    ['a damaged line', /damaged/, () => writeFileSync(journal, `${readFileSync(journal, 'utf8')}{"done":-1}\n`)],
    ['a file that was cut', /shorter/, () => truncateSync(join(`${output}.partial`, 'neurons.bin'), 100)],
  ];
  for (const [what, words, change] of spoil) {
    await interrupt(checkpoint, 'q4');
    await change();
    const notes: string[] = [];
    const onEvent = (e: ConvertEvent) => e.type === 'note' && notes.push(e.text);
    await convertHere(checkpoint, { output }, onEvent);
    t.match(notes.join(), words, what);
    t.same(digest(output), digest((await convertHere(checkpoint)).output));
    rmSync(output, { recursive: true });
  }
  await interrupt(checkpoint, 'q4');
  const notes: string[] = [];
  const onEvent = (e: ConvertEvent) => e.type === 'note' && notes.push(e.text);
  const result = await convertHere(checkpoint, { output }, onEvent);
  t.ok(result.resumed);
  t.match(notes, [/^continuing: \d+ %/]);
});

t.test('weights are read once, to convert and to hash, in whichever order their files have them', async (t) => {
  const made: Record<string, string>[] = [];
  for (const isSorted of [false, true]) {
    const checkpoint = make({ ...CHECKPOINTS.llama, layers: 12 });
    const shards = readdirSync(checkpoint).filter((file) => file.endsWith('.safetensors'));
    const paths = shards.map((file) => join(checkpoint, file));
    // As the library of the format writes them: 10 before 2, down before gate.
    if (isSorted) for (const path of paths) sortTensors(path);
    const reads = t.capture(SourceFile.prototype, 'readPages', SourceFile.prototype.readPages);
    const { output } = await convertHere(checkpoint);
    const bytes = reads().reduce((sum, { args }) => sum + args[1], 0);
    const norms = 12 * 2 * 192 * 2;
    const held = paths.reduce((sum, path) => sum + statSync(path).size, 0);
    t.ok(bytes > held - norms && bytes <= held + norms, `${bytes} bytes read of ${held}`);
    for (const { file, sha256 } of readManifest(output).provenance.sources) {
      t.equal(sha256, hashOf(join(checkpoint, file)), file);
    }
    made.push({ ...digest(output), 'model.json': '' });
  }
  t.same(made[1], made[0]);
});

t.test('stopped with everything converted and not all hashed, it continues to the same bytes', async (t) => {
  const checkpoint = make(CHECKPOINTS.llama);
  const output = join(newDirectory(), 'out.pi2');
  const stop = new AbortController();
  const onEvent = (event: ConvertEvent) =>
    event.type === 'progress' && event.step === 'hashing the sources' && stop.abort();
  await t.rejects(convertHere(checkpoint, { output }, onEvent, stop.signal), { code: 'E_INTERRUPTED' });
  t.ok((await convertHere(checkpoint, { output })).resumed);
  t.same(digest(output), digest((await convertHere(checkpoint)).output));
});

/** Puts a file's tensors in the order of their names. */
function sortTensors(path: string): void {
  const { header, data } = splitFile(path);
  const { __metadata__, ...tensors } = header;
  const sorted = Object.entries(tensors).sort(([a], [b]) => (a < b ? -1 : 1));
  const raw = sorted.map(
    ([
      name,
      {
        dtype,
        shape,
        data_offsets: [begin, end],
      },
    ]) => {
      return { name, dtype, shape, bytes: data.subarray(begin, end) };
    },
  );
  writeFileSync(path, safetensors(raw));
}

t.test('the least memory ceiling that is asked for does, and gives the same bytes', async (t) => {
  const checkpoint = make({ family: 'llama', hidden: 1024, heads: 8, neurons: 2900, layers: 1, vocab: 700 });
  const roomy = await convertHere(checkpoint);
  const refusal = await convertHere(checkpoint, { maxMemoryBytes: 100 * MEBIBYTE }).catch((error) => error);
  t.match(refusal, { code: 'E_MEMORY', hint: /--max-ram \d+M/ });
  const least = Number(/(\d+)M/.exec(refusal.hint)?.[1]) * MEBIBYTE;
  const tight = await convertHere(checkpoint, { maxMemoryBytes: least + 16 * MEBIBYTE });
  t.same(digest(tight.output), digest(roomy.output));
});

const mount = newDirectory();
const isMounted = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', mount]).status === 0;
const needsMount = { skip: isMounted ? false : 'this user may not mount a small disk' };

t.test('a full disk: refused beforehand, or the same command continues', needsMount, async (t) => {
  try {
    const checkpoint = make({ ...CHECKPOINTS.llama, layers: 6 });
    const expected = digest((await convertHere(checkpoint)).output);
    const huge = make({ ...CHECKPOINTS.llama, vocab: 40000 });
    const output = join(mount, 'out.pi2');
    await t.rejects(convertHere(huge, { output }), {
      code: 'E_DISK_FULL',
      message: /needs .* more, and .* are available/,
    });
    t.strictSame(readdirSync(mount), [], 'refused before anything was written');

    const filler = join(mount, 'filler');
    let steps = 0;
    const fill = () => {
      if (++steps !== 8) return;
      const { bavail, bsize } = statfsSync(mount);
      writeFileSync(filler, Buffer.alloc(bavail * bsize));
    };
    await t.rejects(convertHere(checkpoint, { output }, fill), { code: 'E_DISK_FULL', hint: /same command/ });
    t.strictSame(readdirSync(mount).sort(), ['filler', 'out.pi2.partial']);
    rmSync(filler);
    const result = await convertHere(checkpoint, { output });
    t.ok(result.resumed, 'it continued');
    t.same(digest(output), expected);
  } finally {
    spawnSync('umount', [mount]);
  }
});

t.test('the command, as a process', async (t) => {
  const program = compileProgram();
  const runner = join(program, 'convert.js');
  writeFileSync(
    runner,
    `import { peakMemoryBytes } from './src/base/memory.js';
    import { convertCommand } from './src/cli/convert.js';
    try {
      await convertCommand().parseAsync(process.argv.slice(2), { from: 'user' });
    } catch (error) {
      console.error(error.code + ': ' + error.message + ' (' + error.hint + ')');
      process.exitCode = error.exitStatus ?? 1;
    } finally {
      console.error('peak of the process: ' + peakMemoryBytes());
    }`,
  );
  // An empty environment keeps the test runner's hooks, which weigh and catch signals, out of the process.
  const start = (args: string[], limits = 'true'): ChildProcess => {
    const shell = `${limits} && exec env -i "$@"`;
    return spawn('sh', ['-c', shell, 'sh', process.execPath, runner, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
  };
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
  const run = (args: string[]) => finished(start(args));
  const checkpoint = make({ ...CHECKPOINTS.turbosparse, layers: 10, neurons: 400 });
  const reference = await convertHere(checkpoint);
  const expected = digest(reference.output);

  await t.test('tells its progress and result on stderr, or as JSON on stdout', async (t) => {
    const plain = join(newDirectory(), 'plain.pi2');
    const told = await run([checkpoint, '-o', plain]);
    t.match(told, {
      status: 0,
      stdout: '',
      stderr: /100 %.*made .*plain\.pi2.*bits per weight.*peak memory.*left out/s,
    });
    t.same(digest(plain), expected, 'the same bytes in another process');

    const json = join(newDirectory(), 'json.pi2');
    const lines = (await run([checkpoint, '-o', json, '--json'])).stdout
      .trim()
      .split('\n')
      .map((l) => JSON.parse(l));
    t.match(lines.at(-1), {
      type: 'result',
      output: json,
      bytes: reference.bytes,
      has_tokenizer: false,
      resumed: false,
    });
    const progress = lines.slice(0, -1);
    t.ok(progress.length >= 2 && progress.every((line) => line.type === 'progress'));
    t.equal(progress.at(-1).bytes_done, progress.at(-1).bytes_total);

    t.match(await run([checkpoint, '-o', json]), { status: 2, stderr: /E_EXISTS.*--force/ });
    t.match(await run([checkpoint, '--max-ram', 'lots']), { status: 2, stderr: /E_USAGE.*lots/ });
    t.match(await run([checkpoint, '--quant', 'q5']), { status: 1, stderr: /q4, q8, f16/ });
  });

  await t.test('killed at any moment, the same command continues to the same bytes', async (t) => {
    const output = join(newDirectory(), 'killed.pi2');
    const withUnit = digest((await convertHere(checkpoint, { npu: true })).output);
    const began = performance.now();
    await run([checkpoint, '-o', join(newDirectory(), 'timed.pi2')]);
    const duration = performance.now() - began;
    let kills = 0;
    let continued = 0;
    for (let round = 0; round < 8; round++) {
      const flags = round % 2 === 0 ? [] : ['--npu'];
      for (let attempt = 0; attempt < 3 && !existsSync(output); attempt++) {
        const child = start([checkpoint, '-o', output, ...flags]);
        const timer = setTimeout(() => child.kill('SIGKILL'), duration * (0.25 + 0.75 * Math.random()));
        await new Promise((resolve) => child.on('exit', resolve));
        clearTimeout(timer);
        if (child.signalCode === 'SIGKILL') kills++;
      }
      if (!existsSync(output)) {
        const last = await run([checkpoint, '-o', output, ...flags]);
        if (last.status !== 0) t.fail(last.stderr);
        if (/continuing/.test(last.stderr)) continued++;
      }
      t.same(digest(output), round % 2 === 0 ? expected : withUnit, `round ${round}`);
      t.strictSame(
        readdirSync(join(output, '..')).filter((name) => !name.endsWith('.lock')),
        ['killed.pi2'],
      );
      rmSync(output, { recursive: true });
    }
    t.ok(kills > 0, `${kills} kills, continued ${continued} times`);
  });

  await t.test('SIGTERM stops it between steps, with exit status 130', async (t) => {
    const large = makeSparse(join(newDirectory(), 'large'), { hidden: 1024, neurons: 2048, layers: 60, vocab: 1000 });
    const output = join(newDirectory(), 'stopped.pi2');
    const child = start([large, '-o', output]);
    const end = finished(child);
    child.stderr?.once('data', () => setTimeout(() => child.kill('SIGTERM'), 500));
    t.match(await end, { status: 130, stderr: /E_INTERRUPTED.*same command/ });
    t.strictSame(readdirSync(join(output, '..')), ['stopped.pi2.partial'], 'its lock is gone');
    t.match(await run([large, '-o', output]), { status: 0, stderr: /continuing: \d+ %/ });
  });

  await t.test('a limit on file sizes is told as a full disk', async (t) => {
    const output = join(newDirectory(), 'limited.pi2');
    const limited = await finished(start([checkpoint, '-o', output], 'ulimit -f 600'));
    t.match(limited, { status: 5, stderr: /E_DISK_FULL.*same command/ });
    t.match(await run([checkpoint, '-o', output]), { status: 0 });
    t.same(digest(output), expected);
  });

  await t.test('peak memory stays below --max-ram', async (t) => {
    // One layer's bundles take 134 MB, so that its neurons are cut into ranges and Down is read in strips.
    const shape = { hidden: 2048, neurons: 32768, layers: 1, vocab: 24000 };
    const large = makeSparse(join(newDirectory(), 'large'), shape);
    const bytes = statSync(join(large, 'model.safetensors')).size;
    const digests: Record<string, string>[] = [];
    for (const [ceiling, ...flags] of [[176], [256], [176, '--npu']]) {
      const output = join(newDirectory(), 'capped.pi2');
      const { status, stderr } = await run([large, '-o', output, '--max-ram', `${ceiling}M`, ...flags.map(String)]);
      const peak = Number(/peak of the process: (\d+)/.exec(stderr)?.[1]);
      t.equal(status, 0, stderr);
      const mebibytes = (n: number) => `${Math.round(n / MEBIBYTE)} MiB`;
      const what = `${mebibytes(bytes)} within ${[ceiling, ...flags].join(' MiB, ')}: peak ${mebibytes(peak)}`;
      t.ok(peak > 0 && peak <= Number(ceiling) * MEBIBYTE && bytes > 2 * Number(ceiling) * MEBIBYTE, what);
      digests.push(digest(output));
    }
    t.same(digests[0], digests[1]);
  });
});

/** A llama checkpoint whose weights are a hole in the file: all zero, as large as you like, made at once. */
function makeSparse(
  directory: string,
  shape: { hidden: number; neurons: number; layers: number; vocab: number },
): string {
  const { hidden, neurons, layers, vocab } = shape;
  const template = makeCheckpoint(directory, {
    family: 'llama',
    hidden: 64,
    heads: 2,
    neurons: 8,
    layers: 1,
    vocab: 8,
  });
  const config = JSON.parse(readFileSync(join(template, 'config.json'), 'utf8'));
  Object.assign(config, { hidden_size: hidden, intermediate_size: neurons, num_hidden_layers: layers });
  Object.assign(config, { vocab_size: vocab, num_attention_heads: 8, num_key_value_heads: 2, head_dim: hidden / 8 });
  writeFileSync(join(directory, 'config.json'), JSON.stringify(config));
  const header: Record<string, object> = {};
  let offset = 0;
  const add = (name: string, ...dims: number[]) => {
    const end = offset + 2 * dims.reduce((a, b) => a * b, 1);
    header[name] = { dtype: 'BF16', shape: dims, data_offsets: [offset, end] };
    offset = end;
  };
  add('model.embed_tokens.weight', vocab, hidden);
  for (let l = 0; l < layers; l++) {
    const layer = `model.layers.${l}`;
    add(`${layer}.input_layernorm.weight`, hidden);
    add(`${layer}.post_attention_layernorm.weight`, hidden);
    for (const part of ['q', 'o']) add(`${layer}.self_attn.${part}_proj.weight`, hidden, hidden);
    for (const part of ['k', 'v']) add(`${layer}.self_attn.${part}_proj.weight`, hidden / 4, hidden);
    for (const part of ['gate', 'up']) add(`${layer}.mlp.${part}_proj.weight`, neurons, hidden);
    add(`${layer}.mlp.down_proj.weight`, hidden, neurons);
  }
  add('model.norm.weight', hidden);
  add('lm_head.weight', vocab, hidden);
  const text = JSON.stringify(header);
  const padded = text.padEnd(Math.ceil(text.length / 8) * 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(padded.length));
  const path = join(directory, 'model.safetensors');
  writeFileSync(path, Buffer.concat([length, Buffer.from(padded)]));
  truncateSync(path, 8 + padded.length + offset);
  return directory;
}

t.test('help and flags', async (t) => {
  const help = convertCommand().helpInformation();
  for (const flag of ['--output', '--quant', '--max-ram', '--npu', '--force', '--json', 'q4', '2G']) {
    t.ok(help.includes(flag), flag);
  }
  const refuse = (...args: string[]) => {
    const command = convertCommand().exitOverride().configureOutput({ writeErr: quiet });
    return t.rejects(command.parseAsync(args, { from: 'user' }), { name: /CommanderError|Pi2Error/ });
  };
  await refuse('checkpoint', '--quantize', 'q4');
  await refuse('checkpoint', 'another');
  await refuse();
});

t.test('the progress line on a terminal', async (t) => {
  const state = { step: 'layers.3.neurons', bytesDone: 3 * MEBIBYTE, bytesTotal: 4 * MEBIBYTE };
  const view = render(
    createElement(ProgressLine, { state: { ...state, bytesPerSecond: 2 * MEBIBYTE, secondsLeft: 0.5 } }),
  );
  t.match(view.lastFrame(), /█{22}░{8}.*75 %.*3\.00 MiB of 4\.00 MiB.*2\.00 MiB\/s.*0\.5 s left.*layers\.3\.neurons/);
  view.rerender(
    createElement(ProgressLine, { state: { ...state, bytesDone: 0, bytesPerSecond: 0, secondsLeft: null } }),
  );
  t.notMatch(view.lastFrame(), /left/);
  view.unmount();
});
