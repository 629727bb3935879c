// What stands behind `npm run bench:peers`: files that llama.cpp reads, caps that count page cache, and the arithmetic of the table.
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import t from 'tap';
import { GGML_TYPES, type GgmlType } from '../bench/gguf.js';
import { generateGguf, type MatrixType, shapeBytes } from '../bench/gguf-model.js';
import { MemoryGroup } from '../bench/memory-group.js';
import { capFor, type PeerEntry } from '../bench/peer-cases.js';
import { describePeers, type Limits, type PeerResult, peerRows } from '../bench/peer-rows.js';
import { PeerProcess, type PeerSample } from '../bench/peer-worker.js';
import { SHAPES, type Shape } from '../bench/shapes.js';
import { deviation, mean } from '../bench/statistics.js';
import { loadAddon } from '../src/engine/addon.js';
import { REPOSITORY } from './support/shared.js';

const SMALL = { hiddenSize: 256, layerCount: 2, headCount: 4, kvHeadCount: 2, neuronCount: 512, vocabSize: 384 };
const DENSE: Shape = { ...shapeNamed('mistral-7b'), ...SMALL, contextLength: 64 };
const MIXTURE: Shape = { ...DENSE, expertCount: 4, expertsPerToken: 2 };
const LLAMA = join(REPOSITORY, 'bench', 'llama', 'node_modules', 'node-llama-cpp', 'dist', 'index.js');

function shapeNamed(name: string): Shape {
  return SHAPES.find((shape) => shape.name === name) as Shape;
}

for (const [what, shape] of [
  ['dense', DENSE],
  ['mixture', MIXTURE],
] as const) {
  for (const type of ['q4_0', 'q4_1', 'iq4_xs'] as const) {
    t.test(`GGUF, ${what}, ${type}: read back field by field`, async (t) => {
      const path = join(t.testdir(), 'model.gguf');
      t.equal(await generateGguf(shape, type, 1, path), true);
      t.equal(await generateGguf(shape, type, 1, path), false, 'a file that is there is left as it is');
      const bytes = readFileSync(path);
      const { metadata, tensors, dataStart } = parseGguf(bytes);
      t.equal(metadata.get('general.architecture'), 'llama');
      t.equal(metadata.get('llama.block_count'), shape.layerCount);
      t.equal(metadata.get('llama.attention.head_count_kv'), shape.kvHeadCount);
      t.equal(metadata.get('llama.expert_used_count'), shape.expertsPerToken);
      const words = metadata.get('tokenizer.ggml.tokens') as string[];
      t.equal(new Set(words).size, shape.vocabSize, 'every token is another text');
      t.strictSame([words[0], words[2], words[3], words[258]], ['<unk>', '</s>', '<0x00>', '<0xFF>']);

      const experts = shape.expertCount === undefined ? [] : [shape.expertCount];
      const suffix = experts.length > 0 ? '_exps' : '';
      const dimensions = new Map(tensors.map((tensor) => [tensor.name, tensor.dimensions]));
      t.strictSame(dimensions.get(`blk.1.ffn_down${suffix}.weight`), [512, 256, ...experts]);
      t.strictSame(dimensions.get('blk.0.attn_k.weight'), [256, 128]);
      t.strictSame(dimensions.get('token_embd.weight'), [256, 384]);
      let next = 0;
      let matrixBytes = 0;
      for (const tensor of tensors) {
        t.equal(tensor.offset, next, tensor.name);
        const kind = Object.values(GGML_TYPES).find(({ id }) => id === tensor.type);
        const weights = tensor.dimensions.reduce((product, count) => product * count, 1);
        const size = (weights / (kind?.blockWeights ?? 0)) * (kind?.blockBytes ?? 0);
        if (tensor.type !== GGML_TYPES.f32.id) matrixBytes += size;
        next += Math.ceil(size / 32) * 32;
      }
      t.equal(bytes.length, dataStart + next);
      t.ok(matrixBytes <= shapeBytes(shape, type).total && shapeBytes(shape, type).total <= next);
      const up = tensors.find(({ name }) => name === `blk.0.ffn_up${suffix}.weight`);
      const weights = decodeBlocks(bytes.subarray(dataStart + (up?.offset ?? 0)), type, 200);
      t.ok(Math.abs(mean(weights)) < 0.2 / 16, `mean ${mean(weights)}`);
      t.ok(Math.abs(deviation(weights) * 16 - 1) < 0.1, `deviation ${deviation(weights)} of 1/16`);
    });
  }
}

t.test(
  'GGUF: another reader agrees',
  { skip: existsSync(LLAMA) ? false : 'needs npm install --no-save --prefix bench/llama' },
  async (t) => {
    const path = join(t.testdir(), 'model.gguf');
    await generateGguf(MIXTURE, 'q4_0', 1, path);
    const { readGgufFileInfo } = await import(pathToFileURL(LLAMA).href);
    const info = await readGgufFileInfo(path, { logWarnings: false });
    t.equal(info.version, 3);
    t.equal(info.metadata.llama.expert_count, MIXTURE.expertCount);
    t.equal(info.fullTensorInfo.length, parseGguf(readFileSync(path)).tensors.length);
  },
);

t.test('caps are what is not FFN, what of the FFN fits, and a reserve', async (t) => {
  const shape = shapeNamed('mistral-7b');
  t.equal(capFor(shape, 0.5).bytes, 3_240_561_868);
  t.equal(capFor(shape, 0.75).bytes, 2_447_838_412);
  t.equal(capFor(shape, 0).bytes, null, 'no cap where all fits');
  t.ok(Math.abs((capFor(shapeNamed('tinyllama-1.1b'), 0.5).bytes as number) - 555e6) < 1e6);
});

const CAP_BYTES = 96 * 2 ** 20;
const capRefused = refusalOfCap();

function refusalOfCap(): string | false {
  try {
    MemoryGroup.create(null).remove();
    return false;
  } catch (error) {
    return (error as Error).message;
  }
}

/** A program that says it is open, then touches as much memory as a test has tokens, in MiB. */
const EATER = `
const lines = require('node:readline').createInterface({ input: process.stdin });
console.log(JSON.stringify({ facts: { how: 'eats', threads: 1, loadMs: 1 } }));
const kept = [];
lines.on('line', (line) => {
  for (let i = 0; i < JSON.parse(line).tokens; i++) kept.push(Buffer.alloc(2 ** 20, 1));
  console.log(JSON.stringify({ sample: { tokens: kept.length } }));
});
`;

t.test('a cap ends a process that takes more, and says so', { skip: capRefused }, async (t) => {
  const program = join(t.testdir({ 'eater.cjs': EATER }), 'eater.cjs');
  const eater = PeerProcess.start(program, {}, CAP_BYTES);
  t.equal((await eater.facts()).how, 'eats');
  t.equal((await eater.run({ kind: 'pp', tokens: 8, seconds: 1 })).tokens, 8);
  const before = eater.usage();
  t.ok(before.peakBytes > 8 * 2 ** 20 && before.peakBytes < CAP_BYTES, `${before.peakBytes}`);
  t.equal(before.oomKills, 0);
  await t.rejects(eater.run({ kind: 'pp', tokens: 200, seconds: 1 }), { message: /killed: it takes more memory/ });
  const usage = await eater.close();
  t.equal(usage.oomKills, 1);
  t.ok(usage.limitHits > 0);
  t.ok(usage.peakBytes <= CAP_BYTES);
});

t.test('a cap counts page cache, and is no reason to end a process', { skip: capRefused }, async (t) => {
  const reader = `
    const file = process.argv[1] + '.data';
    require('node:fs').writeFileSync(file, Buffer.alloc(2 ** 20));
    const handle = require('node:fs').openSync(file, 'a');
    for (let i = 0; i < 150; i++) require('node:fs').writeSync(handle, Buffer.alloc(2 ** 20, i));
    require('node:fs').fsyncSync(handle);
    console.log(JSON.stringify({ facts: { how: 'reads', threads: 1, loadMs: 1 } }));`;
  const program = join(t.testdir({ 'reader.cjs': reader }), 'reader.cjs');
  const process = PeerProcess.start(program, {}, CAP_BYTES);
  t.equal((await process.facts()).how, 'reads');
  const usage = await process.close();
  t.equal(usage.oomKills, 0);
  t.ok(usage.peakBytes > 0.9 * CAP_BYTES, `${usage.peakBytes}`);
});

t.test('what flash gives is measured', async (t) => {
  const path = join(t.testdir(), 'file');
  writeFileSync(path, Buffer.alloc(4 * 2 ** 20, 1));
  const probe = { path, blockBytes: 8192, lanes: 4, random: true, seconds: 0.05 };
  const { bytesPerSecond, how } = await loadAddon().measureFlashBandwidth(probe);
  t.ok(bytesPerSecond > 1e6, `${bytesPerSecond}`);
  t.match(how, /^(direct|buffered), /);
  await t.rejects(loadAddon().measureFlashBandwidth({ ...probe, blockBytes: 1000 }), { message: /whole pages/ });
  await t.rejects(loadAddon().measureFlashBandwidth({ ...probe, path: `${path}.none` }), { code: 'NATIVE_IO' });
});

t.test('rows: medians, ratios, shares of what memory and flash give', async (t) => {
  const limits: Limits = {
    type: 'limits',
    threads: 2,
    ram_bytes_per_second: 40e9,
    ram_probes_bytes_per_second: [39e9, 40e9],
    flash_sequential_bytes_per_second: 2e9,
    flash_random_bytes_per_second: 0.5e9,
    flash_how: 'direct, io_uring',
  };
  const result = (engine: PeerEntry['engine'], speeds: number[], sample: Partial<PeerSample>): PeerResult => ({
    entry: {
      ...{ engine, name: 'x', model: 'm', program: '', request: {} as PeerEntry['request'] },
      reads: engine === 'llama.cpp' ? 'sequential' : 'random',
    },
    facts: { how: 'somehow', threads: 2, loadMs: 5 },
    usage: { peakBytes: 900, oomKills: 0, limitHits: engine === 'llama.cpp' ? 3 : 0 },
    samples: [
      {
        test: { kind: 'tg', tokens: 4, seconds: 9 },
        runs: speeds.map((speed) => ({
          ...{ tokens: 4, ms: 4000 / speed, latenciesMs: Array(4).fill(1000 / speed), majorFaults: 0 },
          ...{ readBytes: 0, weightBytes: 4e9, hitShare: null, othersShare: 0.01 },
          ...sample,
        })),
      },
    ],
  });
  const peer = result('llama.cpp', [0.25, 0.5, 1], { readBytes: 2e9, tokens: 2 });
  const ours = result('powerinfer2', [12, 10, 11], { weightBytes: 1e9, readBytes: 1e7, hitShare: 0.9 });
  const rows = peerRows('shape', { offload: 0.5, bytes: 1000 }, limits, [peer, ours]);
  t.equal(rows[0].ratio, null);
  t.equal(rows[0].tokens_per_second_median, 0.25, 'speed is of the tokens that were computed');
  t.equal(rows[0].flash_share, 0.25);
  t.equal(rows[1].ratio, 44);
  t.equal(rows[1].test, 'tg4');
  t.equal(rows[1].ram_share, (1e9 * 11) / 40e9);
  t.equal(rows[1].flash_share, (1e7 * 11) / 0.5e9);
  t.equal(rows[1].cap_held, true);
  const lost = { type: 'failure', shape: 'shape', cap_bytes: 1000, engine: 'llama.cpp', name: 'Q4_0' } as const;
  const text = describePeers(limits, rows, [{ ...lost, reason: 'killed: too much', oom_kills: 1 }]);
  t.match(text, /tg4 \(2\)/, 'a run that ended early says how far it came');
  t.match(text, /by reclaim/);
  t.match(text, /44\.00/);
  t.match(text, /llama\.cpp Q4_0, cap 1000 B: killed: too much/);
  const over = peerRows('shape', { offload: null, bytes: 800 }, limits, [ours]);
  t.equal(over[0].cap_held, false);
});

/** GGUF as its specification has it: header, metadata, tensor infos. Values are numbers, texts and arrays of them. */
function parseGguf(bytes: Buffer) {
  let at = 0;
  const take = (count: number) => {
    at += count;
    return bytes.subarray(at - count, at);
  };
  const u32 = () => take(4).readUInt32LE();
  const u64 = () => Number(take(8).readBigUInt64LE());
  const text = () => take(u64()).toString();
  const value = (type: number): unknown => {
    if (type === 4) return u32();
    if (type === 5) return take(4).readInt32LE();
    if (type === 6) return take(4).readFloatLE();
    if (type === 8) return text();
    if (type !== 9) throw new Error(`metadata of type ${type}`);
    const inner = u32();
    return Array.from({ length: u64() }, () => value(inner));
  };
  if (take(4).toString() !== 'GGUF' || u32() !== 3) throw new Error('no GGUF 3');
  const tensorCount = u64();
  const entryCount = u64();
  const metadata = new Map<string, unknown>();
  for (let i = 0; i < entryCount; i++) {
    const key = text();
    metadata.set(key, value(u32()));
  }
  const tensors = Array.from({ length: tensorCount }, () => ({
    name: text(),
    dimensions: Array.from({ length: u32() }, u64),
    type: u32(),
    offset: u64(),
  }));
  return { metadata, tensors, dataStart: Math.ceil(at / 32) * 32 };
}

const IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/** Weights of the first blocks, as ggml's own dequantization has them. */
function decodeBlocks(bytes: Buffer, type: MatrixType & GgmlType, count: number): number[] {
  const { blockBytes } = GGML_TYPES[type];
  return Array.from({ length: count }, (_, i) => {
    const block = bytes.subarray(i * blockBytes, (i + 1) * blockBytes);
    const scale = half(block.readUInt16LE());
    const nibbles = (from: number, length: number) =>
      [...block.subarray(from, from + length)].flatMap((byte) => [byte & 15, byte >> 4]);
    if (type === 'q4_0') return nibbles(2, 16).map((nibble) => (nibble - 8) * scale);
    if (type === 'q4_1') return nibbles(4, 16).map((nibble) => nibble * scale + half(block.readUInt16LE(2)));
    return Array.from({ length: 8 }, (_, group) => {
      const low = (block[4 + (group >> 1)] >> (4 * (group & 1))) & 15;
      const high = (block.readUInt16LE(2) >> (2 * group)) & 3;
      const groupScale = scale * ((low | (high << 4)) - 32);
      return nibbles(8 + 16 * group, 16).map((nibble) => IQ4_VALUES[nibble] * groupScale);
    }).flat();
  }).flat();
}

function half(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const mantissa = bits & 1023;
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1 + mantissa / 1024) * 2 ** (exponent - 15));
}
