import { spawnSync } from 'node:child_process';
import {
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import t, { type Test } from 'tap';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { Config } from '../converter/checkpoint/config.js';
import { readHyperparameters } from '../converter/checkpoint/families.js';
import { HEADER_BYTES_MOST, parseHeader } from '../converter/checkpoint/safetensors.js';
import { ROOM_SPARE_BYTES, SourceFile } from '../converter/checkpoint/source-file.js';
import { type ErrorCode, Pi2Error } from '../src/base/error.js';
import { loadAddon } from '../src/engine/addon.js';
import { FAMILIES, type Family, type Hyperparameters } from '../src/format/hyperparameters.js';
import { type CheckpointOptions, makeCheckpoint } from './support/make-checkpoint.js';
import { decode, encode, fromBrain, fromHalf, toBrain, toHalf } from './support/numbers.js';
import { editHeader, type Header, safetensors, splitFile, withHeader } from './support/safetensors.js';
import { needsShared, SHARED_MODEL_NAMES, sharedModel } from './support/shared.js';

const make = (t: Test, options: CheckpointOptions) => makeCheckpoint(join(t.testdir(), 'checkpoint'), options);

/** Expects a `Pi2Error` of this code whose one line of message has every one of `words`. */
async function refused(t: Test, act: () => unknown, code: ErrorCode, ...words: string[]): Promise<void> {
  try {
    const checkpoint = await act();
    if (checkpoint instanceof Checkpoint) await checkpoint.close();
  } catch (error) {
    if (!(error instanceof Pi2Error)) throw error;
    t.equal(error.code, code, error.message);
    t.notMatch(error.message, /\n/, 'one line');
    const text = `${error.message} ${error.hint}`;
    for (const word of words) t.ok(text.includes(word), `"${word}" in: ${text}`);
    return;
  }
  t.fail(`accepted; expected ${code} with ${words.join(', ')}`);
}

const opening = (directory: string) => () => Checkpoint.open(directory);

t.test('number types', async (t) => {
  for (let half = 0; half < 65536; half++) {
    const isNumber = (half & 0x7c00) !== 0x7c00;
    if (isNumber && toHalf(fromHalf(half)) !== half) t.fail(`half ${half}`);
    if ((half & 0x7f80) !== 0x7f80 && toBrain(fromBrain(half)) !== half) t.fail(`brain ${half}`);
  }
  t.equal(toHalf(65519), 0x7bff);
  t.equal(toHalf(65520), 0x7c00);
  t.equal(toHalf(1 + 2 ** -11), 0x3c00, 'a tie goes to even');
  t.equal(toHalf(1 + 3 * 2 ** -11), 0x3c02);
  t.equal(toHalf(2 - 2 ** -12), 0x4000, 'rounding up carries into the exponent');
  t.equal(toBrain(1 + 2 ** -8), 0x3f80);
  t.equal(toBrain(1 + 3 * 2 ** -8), 0x3f82);
});

t.test('every family: single file and shards, every number type, tied and untied', async (t) => {
  const heads = ['q', 'k', 'v'].map((name) => `${name}_bias`);
  const expected: Record<Family, string[]> = {
    llama: [],
    mistral: [],
    qwen2: heads,
    qwen3: ['q_norm', 'k_norm'],
    mixtral: ['router'],
    bamboo: [],
    turbosparsemixtral: ['router'],
    sparsellama: [],
    opt: [...heads, 'o_bias', 'attention_norm_bias', 'ffn_norm_bias', 'up_bias', 'down_bias'],
  };
  const always = ['attention_norm', 'q', 'k', 'v', 'o', 'ffn_norm', 'experts'];
  for (const family of FAMILIES) {
    for (const [i, type] of (['F32', 'F16', 'BF16'] as const).entries()) {
      const options = { family, type, shards: i + 1, tied: i === 1, hidden: 60, heads: 3, neurons: 44, layers: 3 };
      const checkpoint = await Checkpoint.open(make(t, options));
      const { model } = checkpoint;
      const layer = Object.entries(model.layers[1]).filter(([, tensor]) => tensor !== undefined);
      t.same(layer.map(([name]) => name).sort(), [...always, ...expected[family]].sort(), family);
      t.equal(model.layers.length, 3);
      t.equal(model.layers[2].experts.length, model.hyperparameters.experts ? 4 : 1);
      t.equal(model.layers[2].experts[0].gate === undefined, family === 'opt');
      t.equal(model.head === undefined, options.tied);
      t.equal(model.embedding.type, type);
      t.equal(checkpoint.name, 'checkpoint');
      t.same(model.ignored, []);
      t.equal(checkpoint.sources.length, i === 0 ? 2 : 2 + options.shards);
      await checkpoint.close();
    }
  }
});

t.test('reads the bytes of tensors, and no others', async (t) => {
  const directory = make(t, { family: 'llama', type: 'F32', shards: 2 });
  const checkpoint = await Checkpoint.open(directory);
  t.teardown(() => checkpoint.close());
  const norm = checkpoint.model.output_norm;
  const { header, data } = splitFile(join(directory, 'model-00002-of-00002.safetensors'));
  const [begin, end] = header['model.norm.weight'].data_offsets;
  const whole = new Uint8Array(end - begin);
  await checkpoint.read(norm, 0, whole);
  t.same(whole, new Uint8Array(data.subarray(begin, end)));
  t.equal(checkpoint.bytes(norm), whole.length);
  const part = new Uint8Array(8);
  await checkpoint.read(norm, 12, part);
  t.same(part, whole.slice(12, 20));
  await t.rejects(checkpoint.read(norm, whole.length - 7, part), RangeError);
  await t.rejects(checkpoint.read(norm, -1, part), RangeError);
  await t.rejects(checkpoint.read(norm, 0.5, part), RangeError);
  await t.rejects(checkpoint.read({ ...norm, name: 'constructor' }, 0, part), RangeError);
  truncateSync(join(directory, 'model-00002-of-00002.safetensors'), 100);
  await refused(t, () => checkpoint.read(norm, 0, part), 'E_IO', 'model-00002-of-00002.safetensors');
});

t.test('sources and text files come in a fixed order', async (t) => {
  const directory = make(t, { family: 'llama', shards: 2 });
  for (const file of ['chat_template.jinja', 'tokenizer_config.json', 'tokenizer.json', 'README.md']) {
    writeFileSync(join(directory, file), '{}');
  }
  const checkpoint = await Checkpoint.open(directory);
  await checkpoint.close();
  const files = [
    'config.json',
    'model.safetensors.index.json',
    'model-00001-of-00002.safetensors',
    'model-00002-of-00002.safetensors',
  ];
  t.same(
    checkpoint.sources,
    files.map((file) => ({ file, bytes: readFileSync(join(directory, file)).length })),
  );
  t.same(checkpoint.textFiles, ['tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja']);
});

t.test('finds weights under another name, through symbolic links, and with predictors beside them', async (t) => {
  const directory = make(t, { family: 'bamboo', predictors: true });
  renameSync(join(directory, 'model.safetensors'), join(directory, 'weights.safetensors'));
  let checkpoint = await Checkpoint.open(directory);
  await checkpoint.close();
  t.equal(checkpoint.sources[1].file, 'weights.safetensors');
  t.equal(checkpoint.model.ignored.length, 4);
  t.equal(checkpoint.model.ignored[0], 'model.layers.0.mlp.predictor.fc1.weight');

  // As in HuggingFace's cache: snapshots of links into a directory of blobs.
  mkdirSync(join(t.testdirName, 'snapshot'));
  symlinkSync('../checkpoint/weights.safetensors', join(t.testdirName, 'snapshot/model.safetensors'));
  symlinkSync('../checkpoint/config.json', join(t.testdirName, 'snapshot/config.json'));
  checkpoint = await Checkpoint.open(join(t.testdirName, 'snapshot'));
  await checkpoint.close();
  t.equal(checkpoint.name, 'snapshot');

  const moe = await Checkpoint.open(make(t, { family: 'turbosparsemixtral', predictors: true }));
  await moe.close();
  t.equal(moe.model.ignored.length, 2 * 4 * 2);
});

t.test('both spellings of OPT', async (t) => {
  for (const decoder of ['model.decoder', 'decoder'] as const) {
    for (const config of [{}, { enable_bias: false }]) {
      const checkpoint = await Checkpoint.open(make(t, { family: 'opt', decoder, config, context: 50 }));
      await checkpoint.close();
      t.same(checkpoint.model.position_embedding?.tensor.shape, [52, 96]);
      t.equal(checkpoint.model.position_embedding?.skippedRows, 2);
      t.equal(checkpoint.model.layers[0].down_bias === undefined, 'enable_bias' in config);
    }
  }
});

t.test('directories that are no checkpoint', async (t) => {
  const root = t.testdir({
    empty: {},
    pickle: { 'config.json': '{}', 'pytorch_model-00001-of-00002.bin': 'x', 'training_args.bin': 'x' },
    lightning: { 'model.ckpt': 'x' },
    gguf: { 'model-q4.gguf': 'GGUF' },
    'model.gguf': 'GGUF',
    'model.safetensors': 'x',
    bare: { 'model.safetensors': 'x' },
    several: { 'config.json': '{}', 'a.safetensors': 'x', 'b.safetensors': 'x' },
    'done.pi2': { 'model.json': '{}', 'neurons.bin': '', 'resident.bin': '' },
    json: { 'config.json': '{"model_type": ', 'model.safetensors': 'x' },
    list: { 'config.json': '[]', 'model.safetensors': 'x' },
    latin: { 'config.json': Buffer.from([0x22, 0xe9, 0x22]), 'model.safetensors': 'x' },
    directory: { 'config.json': {}, 'model.safetensors': 'x' },
  });
  const cases: [string, ErrorCode, ...string[]][] = [
    ['absent', 'E_FILE', 'absent', 'no such file'],
    ['empty', 'E_CHECKPOINT', 'no *.safetensors'],
    [
      'pickle',
      'E_PICKLE',
      'pytorch_model-00001-of-00002.bin',
      'not opened',
      'save_pretrained',
      'safe_serialization=True',
    ],
    ['lightning', 'E_PICKLE', 'model.ckpt'],
    ['gguf', 'E_CHECKPOINT', 'GGUF', 'original'],
    ['model.gguf', 'E_CHECKPOINT', 'GGUF', 'directory'],
    ['model.safetensors', 'E_CHECKPOINT', 'is a file', 'directory'],
    ['bare', 'E_CHECKPOINT', 'config.json'],
    ['several', 'E_CHECKPOINT', 'a.safetensors', 'model.safetensors.index.json'],
    ['done.pi2', 'E_CHECKPOINT', 'converted'],
    ['json', 'E_CHECKPOINT', 'config.json', 'not valid JSON'],
    ['list', 'E_CHECKPOINT', 'config.json', 'not a JSON object'],
    ['latin', 'E_CHECKPOINT', 'config.json', 'not valid JSON'],
    ['directory', 'E_CHECKPOINT', 'config.json', 'not a regular file'],
  ];
  for (const [name, ...expected] of cases) await refused(t, opening(join(root, name)), ...expected);
});

t.test('an index that lies', async (t) => {
  const directory = make(t, { family: 'llama', shards: 3 });
  const path = join(directory, 'model.safetensors.index.json');
  const good = JSON.parse(readFileSync(path, 'utf8'));
  const norm = 'model.norm.weight';
  const shard = 'model-00001-of-00003.safetensors';
  const withMap = (weight_map: unknown) => {
    writeFileSync(path, JSON.stringify({ ...good, weight_map }));
    return opening(directory);
  };
  for (const name of [
    '../evil.safetensors',
    '/etc/evil.safetensors',
    'a/b.safetensors',
    '..',
    '',
    'model.bin',
    7,
    null,
  ]) {
    const words = [norm, JSON.stringify(name), 'plain name'];
    await refused(t, withMap({ ...good.weight_map, [norm]: name }), 'E_CHECKPOINT', ...words);
  }
  await refused(
    t,
    withMap({ ...good.weight_map, [norm]: 'x.safetensors' }),
    'E_CHECKPOINT',
    'x.safetensors',
    'not there',
  );
  await refused(t, withMap({ ...good.weight_map, [norm]: shard }), 'E_SAFETENSORS', norm, shard, 'model-00003');
  await refused(t, withMap({ ...good.weight_map, extra: shard }), 'E_SAFETENSORS', 'extra', shard);
  for (const wrong of [{}, [], null, undefined, 'x']) await refused(t, withMap(wrong), 'E_CHECKPOINT', 'weight_map');
  writeFileSync(path, 'not json');
  await refused(t, opening(directory), 'E_CHECKPOINT', 'index.json');

  // The same tensor in two shards.
  writeFileSync(path, JSON.stringify(good));
  const first = splitFile(join(directory, shard));
  const extra = encode(new Float32Array(96), 'BF16');
  first.header[norm] = {
    dtype: 'BF16',
    shape: [96],
    data_offsets: [first.data.length, first.data.length + extra.length],
  };
  const file = withHeader(JSON.stringify(first.header), Buffer.concat([first.data, extra]));
  writeFileSync(join(directory, shard), file);
  await refused(t, opening(directory), 'E_SAFETENSORS', norm, shard, 'model-00003-of-00003.safetensors');

  rmSync(join(directory, 'model-00002-of-00003.safetensors'));
  await refused(t, opening(directory), 'E_CHECKPOINT', 'model-00002-of-00003.safetensors', 'not there');
});

t.test('safetensors files that are damaged or lie', async (t) => {
  const directory = make(t, { family: 'llama' });
  const path = join(directory, 'model.safetensors');
  const good = readFileSync(path);
  const q = 'model.layers.0.self_attn.q_proj.weight';
  const damaged = async (bytes: Uint8Array, ...words: string[]) => {
    writeFileSync(path, bytes);
    await refused(t, opening(directory), 'E_SAFETENSORS', 'model.safetensors', ...words);
  };
  const length = (bytes: bigint) => {
    const file = Buffer.from(good);
    file.writeBigUInt64LE(bytes);
    return file;
  };
  await damaged(new Uint8Array(0), '0 bytes');
  await damaged(good.subarray(0, 7), '7 bytes');
  await damaged(good.subarray(0, 100), 'truncated');
  await damaged(good.subarray(0, good.length - 1), 'truncated');
  await damaged(Buffer.concat([good, Buffer.alloc(3)]), 'last 3 bytes');
  await damaged(length(0n), 'claims 0 bytes');
  await damaged(length(BigInt(good.length)), 'truncated');
  await damaged(length(BigInt(HEADER_BYTES_MOST) + 1n), `${HEADER_BYTES_MOST + 1}`);
  await damaged(length(2n ** 64n - 1n), `${2n ** 64n - 1n}`);
  await damaged(withHeader('{"a": ', Buffer.alloc(0)), 'not valid JSON');
  await damaged(withHeader('[1]', Buffer.alloc(0)), 'not a JSON object');
  await damaged(withHeader('null', Buffer.alloc(0)), 'not a JSON object');
  const notUtf8 = withHeader('{"aaaa":1}', Buffer.alloc(0));
  notUtf8[11] = 0xff;
  await damaged(notUtf8, 'not valid JSON');

  const edited = async (edit: (header: Header) => void, ...words: string[]) => {
    writeFileSync(path, good);
    editHeader(path, edit);
    await refused(t, opening(directory), 'E_SAFETENSORS', 'model.safetensors', ...words);
  };
  const set = (key: string, value: unknown) => (header: Header) => {
    header[q][key] = value;
  };
  await edited(set('dtype', 'F99'), q, 'F99', 'F32, F16, BF16');
  await edited(set('dtype', 7), q, 'number type 7');
  await edited(set('dtype', 'I16'), q, 'I16', 'F32, F16, BF16');
  await edited(set('dtype', 'F32'), q, 'shape [96, 96] needs 36864 bytes, but has 18432');
  await edited(set('shape', [96, 97]), q, '[96, 97]');
  await edited(set('shape', [-96, -96]), q, '[-96,-96]');
  await edited(set('shape', [2 ** 53, 96]), q);
  await edited(set('shape', [2 ** 50, 2 ** 50]), q);
  await edited(set('shape', [9.5, 96]), q, '[9.5,96]');
  await edited(set('shape', '96'), q);
  await edited(set('data_offsets', [-2, 18430]), q, '[-2,18430]');
  await edited(set('data_offsets', [0.5, 18432.5]), q);
  await edited(set('data_offsets', [2 ** 60, 2 ** 60 + 18432]), q);
  await edited(set('data_offsets', [good.length, good.length + 18432]), q, 'truncated or wrong');
  await edited(set('data_offsets', [18432, 0]), q, 'before it begins');
  await edited(set('data_offsets', [0]), q);
  await edited(set('data_offsets', null), q);
  await edited(set('extra', 1), q, 'extra');
  for (const key of ['dtype', 'shape', 'data_offsets']) {
    await edited((header) => delete header[q][key], q, `"${key}"`);
  }
  for (const entry of [null, 1, 'x', []]) {
    await edited((header) => {
      header[q] = entry;
    }, q);
  }
  await edited((header) => {
    header[q].data_offsets = header['model.layers.0.self_attn.o_proj.weight'].data_offsets;
  }, 'overlap');
  await edited((header) => delete header[q], '18432 bytes', 'belong to no tensor');
});

t.test('names that mean something to JavaScript are names like any other', async (t) => {
  const directory = make(t, { family: 'llama' });
  const path = join(directory, 'model.safetensors');
  const { header, data } = splitFile(path);
  for (const name of ['__proto__', 'constructor', 'toString', 'model.\u202e\nfake']) {
    const entry = { dtype: 'F32', shape: [1], data_offsets: [data.length, data.length + 4] };
    // Assigning `__proto__` would change the object; only JSON text can hold it as a key.
    const text = `${JSON.stringify(header).slice(0, -1)},${JSON.stringify(name)}:${JSON.stringify(entry)}}`;
    writeFileSync(path, withHeader(text, Buffer.concat([data, Buffer.alloc(4)])));
    await refused(t, opening(directory), 'E_TENSOR', 'no part of the model uses');
    const polluted = withHeader(`{${JSON.stringify(name)}:{"__proto__":{"dtype":"F32"}}}`, Buffer.alloc(0));
    writeFileSync(path, polluted);
    await refused(t, opening(directory), 'E_SAFETENSORS', '"dtype"');
  }
  t.equal(({} as Record<string, unknown>).dtype, undefined);
});

t.test('metadata is not a tensor, and a tensor that is known to be useless may be of any type', async (t) => {
  const directory = make(t, { family: 'llama', tied: true });
  const path = join(directory, 'model.safetensors');
  const { header, data } = splitFile(path);
  t.ok(header.__metadata__);
  const add = (name: string, dtype: string, shape: number[], bytes: number) => {
    const begin = Math.max(...Object.values(header).map((entry) => entry.data_offsets?.[1] ?? 0));
    header[name] = { dtype, shape, data_offsets: [begin, begin + bytes] };
    return bytes;
  };
  const more =
    add('model.layers.0.self_attn.rotary_emb.inv_freq', 'F64', [2], 16) +
    add('model.layers.1.self_attn.masked_bias', 'BOOL', [], 1) +
    add('lm_head.weight', 'U8', [3], 3);
  writeFileSync(path, withHeader(JSON.stringify(header), Buffer.concat([data, Buffer.alloc(more)])));
  const checkpoint = await Checkpoint.open(directory);
  await checkpoint.close();
  t.equal(checkpoint.model.ignored.length, 3);
});

t.test('tensors that are missing, of another shape, or left over', async (t) => {
  const directory = make(t, { family: 'llama' });
  const path = join(directory, 'model.safetensors');
  const good = readFileSync(path);
  const q = 'model.layers.1.self_attn.q_proj.weight';
  const edited = async (edit: (header: Header) => void, ...words: string[]) => {
    writeFileSync(path, good);
    editHeader(path, edit);
    await refused(t, opening(directory), 'E_TENSOR', ...words);
  };
  const rename = (to: string) => (header: Header) => {
    header[to] = header[q];
    delete header[q];
  };
  await edited(rename('model.layers.1.self_attn.q_projj.weight'), q, '[96, 96]', 'nearest', 'q_projj');
  await edited(
    (header) => {
      header[q].shape = [48, 192];
    },
    q,
    '[48, 192]',
    '[96, 96]',
    'model.safetensors',
  );
  await edited(
    (header) => {
      header[q].shape = [96 * 96];
    },
    q,
    '[9216]',
  );

  const withConfig = async (options: CheckpointOptions, config: Record<string, unknown>, ...words: string[]) => {
    const made = make(t, options);
    const file = join(made, 'config.json');
    writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, 'utf8')), ...config }));
    await refused(t, opening(made), 'E_TENSOR', ...words);
  };
  await withConfig(
    { family: 'llama', config: { attention_bias: true } },
    { attention_bias: false },
    'q_proj.bias',
    'uses',
  );
  await withConfig({ family: 'llama' }, { attention_bias: true }, 'no tensor', 'q_proj.bias');
  await withConfig({ family: 'qwen2' }, { model_type: 'mistral' }, 'k_proj.bias');
  await withConfig({ family: 'llama', layers: 3 }, { num_hidden_layers: 2 }, 'model.layers.2', 'and 6 more');
  await withConfig({ family: 'llama' }, { num_hidden_layers: 3 }, 'no tensor "model.layers.2.input_layernorm.weight"');
  await withConfig({ family: 'llama', tied: true }, { tie_word_embeddings: false }, 'no tensor "lm_head.weight"');
  await withConfig({ family: 'llama' }, { hidden_size: 192, head_dim: 32 }, 'embed_tokens', '[131, 192]', '[131, 96]');
  await withConfig({ family: 'mixtral' }, { num_local_experts: 5 }, 'gate.weight', '[5, 96]');
  await withConfig({ family: 'mistral', predictors: true }, {}, 'predictor');
  await withConfig({ family: 'opt' }, { max_position_embeddings: 100 }, 'embed_positions', '[130, 96]', '[102, 96]');
});

/** Hyper-parameters of a config that has the required keys and these. `undefined` takes a key out. */
function read(model_type: unknown, config: Record<string, unknown> = {}, generation?: object): Hyperparameters {
  const required =
    model_type === 'opt'
      ? { hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, ffn_dim: 64, vocab_size: 1000 }
      : { hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 32, intermediate_size: 64, vocab_size: 1000 };
  const hidden_act = model_type === 'bamboo' || model_type === 'turbosparsemixtral' ? 'relu' : undefined;
  const text = JSON.stringify({ model_type, hidden_act, ...required, ...config });
  return readHyperparameters(
    new Config(JSON.parse(text), 'config.json'),
    generation ? new Config(generation, 'generation_config.json') : null,
  );
}

t.test("what a config leaves out has HuggingFace's default", async (t) => {
  const defaults = (family: Family) => {
    const h = read(family);
    const theta = h.position.kind === 'rope' ? h.position.theta : null;
    const { attention, norm } = h;
    return [
      h.kv_head_count,
      h.head_dim,
      h.context_length,
      norm.epsilon,
      theta,
      attention.windows[0],
      h.tied_embeddings,
    ];
  };
  t.same(defaults('llama'), [32, 4, 2048, 1e-6, 1e4, 0, false]);
  t.same(defaults('sparsellama'), [32, 4, 2048, 1e-6, 1e4, 0, false]);
  t.same(defaults('mistral'), [8, 4, 131072, 1e-6, 1e4, 4096, false]);
  t.same(defaults('bamboo'), [8, 4, 131072, 1e-6, 1e4, 4096, false]);
  t.same(defaults('mixtral'), [8, 4, 131072, 1e-5, 1e6, 0, false]);
  t.same(defaults('turbosparsemixtral'), [8, 4, 131072, 1e-5, 1e6, 0, false]);
  t.same(defaults('qwen2'), [32, 4, 32768, 1e-6, 1e4, 0, false]);
  t.same(defaults('qwen3'), [32, 128, 32768, 1e-6, 1e4, 0, false]);
  t.same(defaults('opt'), [4, 32, 2048, 1e-5, null, 0, true]);
  t.same(read('mixtral').experts, { count: 8, used_per_token: 2 });
  t.equal(read('mistral', { num_key_value_heads: null }).kv_head_count, 32, 'null is one for each head');
  t.equal(read('llama', { head_dim: null }).head_dim, 4);
});

t.test('activations: the family decides what relu means', async (t) => {
  const ffn = (family: Family, hidden_act: string, config = {}) => read(family, { hidden_act, ...config }).ffn;
  for (const family of ['llama', 'mistral', 'qwen2', 'qwen3', 'mixtral', 'sparsellama'] as const) {
    t.same(ffn(family, 'silu'), { gated: true, activation: 'silu', threshold: 0, bias: false });
    t.equal(ffn(family, 'relu').activation, 'relu');
  }
  for (const family of ['bamboo', 'turbosparsemixtral'] as const) {
    t.equal(ffn(family, 'relu').activation, 'drelu');
    await refused(t, () => ffn(family, 'silu'), 'E_UNSUPPORTED', 'hidden_act "silu"', 'relu');
  }
  for (const family of ['llama', 'sparsellama'] as const) {
    const found = ffn(family, 'fatrelu', { hidden_act_param: 0.01 });
    t.same(found, { gated: true, activation: 'fatrelu', threshold: 0.01, bias: false });
    await refused(t, () => ffn(family, 'fatrelu'), 'E_CONFIG', 'hidden_act_param is missing');
    await refused(t, () => ffn(family, 'fatrelu', { hidden_act_param: '1' }), 'E_CONFIG', 'hidden_act_param', '"1"');
  }
  await refused(t, () => ffn('llama', 'gelu'), 'E_UNSUPPORTED', 'hidden_act "gelu"', 'silu', 'fatrelu');
  await refused(t, () => ffn('mistral', 'constructor'), 'E_UNSUPPORTED', 'constructor');
  await refused(t, () => read('bamboo', { hidden_act: null }), 'E_CONFIG', 'hidden_act');
  t.same(read('opt').ffn, { gated: false, activation: 'relu', threshold: 0, bias: true });
  await refused(t, () => read('opt', { activation_function: 'gelu' }), 'E_UNSUPPORTED', 'activation_function');
});

t.test('rotary embedding: old keys and new', async (t) => {
  const position = (config: Record<string, unknown>) => read('llama', config).position;
  const rope = (theta: number, scaling: object | null = null) => ({ kind: 'rope', theta, scaling });
  t.same(position({ rope_theta: 5e5 }), rope(5e5));
  t.same(position({ rope_scaling: null, rope_theta: 7 }), rope(7));
  t.same(position({ rope_scaling: { type: 'default' } }), rope(1e4));
  t.same(position({ rope_scaling: { type: 'linear', factor: 2 } }), rope(1e4, { kind: 'linear', factor: 2 }));
  t.same(position({ rope_scaling: { rope_type: 'linear', factor: 2.5 } }), rope(1e4, { kind: 'linear', factor: 2.5 }));
  const llama3 = { factor: 8, low_freq_factor: 1, high_freq_factor: 4 };
  const given = { ...llama3, rope_type: 'llama3', original_max_position_embeddings: 8192 };
  const expected = { ...llama3, kind: 'llama3', original_context_length: 8192 };
  t.same(position({ rope_scaling: given, rope_theta: 5e5 }), rope(5e5, expected));
  t.same(position({ rope_parameters: { ...given, rope_theta: 5e5 } }), rope(5e5, expected));
  t.same(position({ rope_parameters: { rope_type: 'default', rope_theta: 3e4 } }), rope(3e4));
  t.same(position({ rope_parameters: { rope_theta: 3e4 } }), rope(3e4));
  t.same(
    position({ rope_parameters: { ...given, rope_theta: 5e5 }, rope_scaling: given, rope_theta: 5e5 }),
    rope(5e5, expected),
  );

  const bad = (config: Record<string, unknown>, code: ErrorCode, ...words: string[]) =>
    refused(t, () => position(config), code, ...words);
  for (const type of ['yarn', 'dynamic', 'longrope', 'su', 'mrope', 'llama4']) {
    const words = ['type', `"${type}"`, 'linear, llama3'];
    await bad({ rope_scaling: { type, factor: 2 } }, 'E_UNSUPPORTED', 'rope_scaling.type', ...words);
    await bad({ rope_parameters: { rope_type: type } }, 'E_UNSUPPORTED', 'rope_parameters.rope_type', ...words);
  }
  await bad({ rope_scaling: { factor: 2 } }, 'E_CONFIG', 'rope_scaling.rope_type is missing');
  await bad({ rope_scaling: { type: 'linear' } }, 'E_CONFIG', 'rope_scaling.factor is missing');
  await bad({ rope_scaling: { type: 'linear', factor: -1 } }, 'E_CONFIG', 'rope_scaling.factor is -1');
  await bad({ rope_scaling: 'linear' }, 'E_CONFIG', 'rope_scaling is "linear"');
  await bad({ rope_scaling: { ...given, high_freq_factor: 1 } }, 'E_CONFIG', 'high_freq_factor');
  await bad({ rope_scaling: { ...given, original_max_position_embeddings: 0 } }, 'E_CONFIG', 'original_max_position');
  await bad({ rope_theta: 0 }, 'E_CONFIG', 'rope_theta is 0');
  await bad({ rope_theta: 1, rope_parameters: { rope_theta: 2 } }, 'E_CONFIG', 'rope_theta is 1', 'expected 2');
  await bad({ rope_scaling: given, rope_parameters: { rope_theta: 1 } }, 'E_CONFIG', 'rope_parameters');
  await bad({ rope_parameters: { full_attention: { rope_theta: 1 } } }, 'E_UNSUPPORTED', 'full_attention');
  await bad({ rope_parameters: { partial_rotary_factor: 0.5 } }, 'E_UNSUPPORTED', 'partial_rotary_factor');
  await bad({ partial_rotary_factor: 0.5 }, 'E_UNSUPPORTED', 'partial_rotary_factor');
});

t.test('sliding windows', async (t) => {
  const windows = (family: Family, config: Record<string, unknown>) => read(family, config).attention.windows;
  const all = (window: number) => new Array(4).fill(window);
  t.same(windows('mistral', { sliding_window: 7 }), all(7));
  t.same(windows('mistral', { sliding_window: null }), all(0));
  t.same(windows('mixtral', { sliding_window: 9 }), all(9));
  t.same(windows('llama', { sliding_window: 7 }), all(0), 'HuggingFace does not look at it either');
  const upper = { use_sliding_window: true, sliding_window: 5, max_window_layers: 3 };
  t.same(windows('qwen2', upper), [0, 0, 0, 5]);
  t.same(windows('qwen2', { ...upper, max_window_layers: 0 }), all(5));
  t.same(windows('qwen2', { ...upper, use_sliding_window: false }), all(0));
  const layer_types = ['full_attention', 'sliding_attention', 'full_attention', 'sliding_attention'];
  t.same(windows('qwen3', { ...upper, layer_types }), [0, 5, 0, 5]);
  t.same(windows('qwen3', { layer_types: new Array(4).fill('full_attention') }), all(0));
  await refused(t, () => windows('qwen3', { layer_types }), 'E_CONFIG', 'layer_types');
  await refused(t, () => windows('qwen3', { ...upper, layer_types: ['full_attention'] }), 'E_CONFIG', 'list of 4');
  const chunked = { layer_types: new Array(4).fill('chunked_attention') };
  await refused(t, () => windows('qwen2', { ...upper, ...chunked }), 'E_UNSUPPORTED', 'layer_types');
  await refused(t, () => windows('mistral', { sliding_window: 5, layer_types }), 'E_UNSUPPORTED', 'layer_types');
  for (const window of [0, -1, 1.5, '4', 2 ** 40]) {
    await refused(t, () => windows('mistral', { sliding_window: window }), 'E_CONFIG', 'sliding_window');
  }
});

t.test('begin and end tokens of both files', async (t) => {
  t.same(read('llama').eos_token_ids, [2]);
  t.same(read('qwen2').eos_token_ids, []);
  t.same(read('llama', { eos_token_id: null }).eos_token_ids, []);
  t.same(read('llama', { eos_token_id: 5 }).eos_token_ids, [5]);
  t.same(read('llama', { eos_token_id: [5, 7] }, { eos_token_id: [7, 9] }).eos_token_ids, [5, 7, 9]);
  t.same(read('llama', {}, { eos_token_id: 8 }).eos_token_ids, [8]);
  t.equal(read('llama').bos_token_id, 1);
  t.equal(read('llama', { bos_token_id: null }).bos_token_id, null);
  t.equal(read('qwen2').bos_token_id, null);
  await refused(t, () => read('llama', { eos_token_id: 'x' }), 'E_CONFIG', 'eos_token_id');
  await refused(
    t,
    () => read('llama', {}, { eos_token_id: [-1] }),
    'E_CONFIG',
    'generation_config.json',
    'eos_token_id',
  );
  await refused(t, () => read('llama', { bos_token_id: 1000 }), 'E_CONFIG', 'bos_token_id is 1000', '1000');
});

t.test('what is not supported is refused by name, with what is', async (t) => {
  for (const name of ['gpt2', 'gemma2', 'Llama', '__proto__', 'constructor', '']) {
    await refused(t, () => read(name), 'E_UNSUPPORTED', JSON.stringify(name), ...FAMILIES);
  }
  await refused(t, () => read(undefined), 'E_CONFIG', 'model_type is missing');
  await refused(t, () => read(7), 'E_UNSUPPORTED', 'model_type 7');
  const gptq = { quantization_config: { quant_method: 'gptq', bits: 4 } };
  await refused(t, () => read('llama', gptq), 'E_UNSUPPORTED', 'gptq', 'original');
  const foreign: [string, unknown, unknown][] = [
    ['mlp_bias', true, false],
    ['attn_logit_softcapping', 50, null],
    ['final_logit_softcapping', 30, null],
    ['query_pre_attn_scalar', 256, null],
    ['clip_qkv', 8, null],
    ['qk_layernorm', true, false],
    ['attention_multiplier', 0.1, null],
    ['embedding_multiplier', 12, 1],
    ['residual_multiplier', 0.2, 1.0],
    ['scale_attn_by_inverse_layer_idx', true, false],
    ['use_parallel_residual', true, false],
    ['no_rope_layers', [1, 0], null],
  ];
  for (const [key, wrong, harmless] of foreign) {
    await refused(t, () => read('llama', { [key]: wrong }), 'E_UNSUPPORTED', key);
    t.same(read('llama', { [key]: harmless }), read('llama'), key);
  }
  const opt: [string, unknown][] = [
    ['do_layer_norm_before', false],
    ['word_embed_proj_dim', 64],
    ['_remove_final_layer_norm', true],
    ['layer_norm_elementwise_affine', false],
  ];
  for (const [key, wrong] of opt) await refused(t, () => read('opt', { [key]: wrong }), 'E_UNSUPPORTED', key);
  t.same(read('llama', { use_cache: true, pretraining_tp: 2, mystery: [1] }), read('llama'), 'other keys are harmless');
});

t.test('hyper-parameters that cannot be', async (t) => {
  const bad = (family: Family, config: Record<string, unknown>, ...words: string[]) =>
    refused(t, () => read(family, config), 'E_CONFIG', 'config.json', ...words);
  const sizes = ['hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'vocab_size'];
  for (const key of [...sizes, 'num_key_value_heads', 'head_dim', 'max_position_embeddings']) {
    for (const value of [0, -4, 1.5, '32', true, [32], {}, 2 ** 31, 1e300, 2 ** 53]) {
      await bad('llama', { [key]: value }, key, JSON.stringify(value), 'whole number');
    }
    if (sizes.includes(key)) await bad('llama', { [key]: undefined }, `${key} is missing`);
  }
  for (const key of ['num_local_experts', 'num_experts_per_tok']) await bad('mixtral', { [key]: 0 }, `${key} is 0`);
  await bad('mixtral', { num_experts_per_tok: 9 }, 'num_experts_per_tok is 9', 'num_local_experts 8');
  await bad('llama', { num_key_value_heads: 5 }, 'num_key_value_heads is 5', 'divisor', '32');
  await bad('llama', { num_key_value_heads: 64 }, 'num_key_value_heads is 64');
  await bad('llama', { hidden_size: 130 }, 'hidden_size is 130', '32');
  await bad('llama', { head_dim: 7 }, 'head_dim is 7', 'even');
  await bad('llama', { hidden_size: 96 }, 'head_dim is 3', 'even');
  await bad('llama', { rms_norm_eps: 0 }, 'rms_norm_eps is 0');
  await bad('llama', { rms_norm_eps: 2 }, 'rms_norm_eps is 2');
  await bad('llama', { rms_norm_eps: '1e-5' }, 'rms_norm_eps is "1e-5"');
  await bad('llama', { tie_word_embeddings: 'no' }, 'tie_word_embeddings is "no"', 'true or false');
  await bad('llama', { attention_bias: 1 }, 'attention_bias is 1');
  await bad('opt', { hidden_size: 126 }, 'hidden_size is 126');
  await bad('opt', { ffn_dim: undefined }, 'ffn_dim is missing');
});

t.test('no header, whatever it says, gets anything but tensors or a Pi2Error', async (t) => {
  const size = fc.oneof(fc.nat(64), fc.integer(), fc.double(), fc.constantFrom(2 ** 53, -1, 2 ** 63, '1', null));
  const entry = fc.record(
    {
      dtype: fc.oneof(fc.constantFrom('F32', 'F16', 'BF16', 'U8', 'F4'), fc.jsonValue()),
      shape: fc.oneof(fc.array(size, { maxLength: 4 }), fc.jsonValue()),
      data_offsets: fc.oneof(fc.tuple(size, size), fc.array(size), fc.jsonValue()),
      other: fc.jsonValue(),
    },
    { requiredKeys: [] },
  );
  const name = fc.oneof(fc.string(), fc.constantFrom('__proto__', '__metadata__', 'constructor', 'model.norm.weight'));
  const header = fc.oneof(
    fc.dictionary(name, fc.oneof(entry, fc.jsonValue())).map((value) => JSON.stringify(value)),
    fc.json(),
  );
  const never = (parse: () => unknown) => {
    try {
      parse();
    } catch (error) {
      if (!(error instanceof Pi2Error) || /[\n\r]/.test(error.message) || error.message.length > 1000) throw error;
    }
  };
  const texts = fc.property(header, fc.nat(100), (text, bytes) =>
    never(() => parseHeader(Buffer.from(text), bytes, 'x')),
  );
  const bytes = fc.property(fc.uint8Array({ maxLength: 64 }), (text) => never(() => parseHeader(text, 8, 'x')));
  fc.assert(texts, { numRuns: 2000 });
  fc.assert(bytes, { numRuns: 500 });
  t.pass('2500 headers');
});

t.test('a header that is right comes back as it was', async (t) => {
  const names = fc.uniqueArray(
    fc.string({ minLength: 1 }).filter((name) => name !== '__proto__' && name !== '__metadata__'),
  );
  const tensors = fc.array(
    fc.record({ type: fc.constantFrom('F32', 'F16', 'BF16'), shape: fc.array(fc.nat(5), { maxLength: 3 }) }),
  );
  fc.assert(
    fc.property(names, tensors, (names, tensors) => {
      const given = tensors.slice(0, names.length).map(({ type, shape }, i) => {
        const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
        return { name: names[i], dtype: type, shape, bytes: encode(values, type as 'F32') };
      });
      const file = safetensors(given);
      const dataOffset = 8 + Number(file.readBigUInt64LE());
      const found = parseHeader(file.subarray(8, dataOffset), file.length - dataOffset, 'x');
      const plain = found.map(({ name, type, shape, bytes }) => ({ name, type, shape, bytes }));
      const expected = given.map(({ name, dtype, shape, bytes }) => ({
        name,
        type: dtype,
        shape,
        bytes: bytes.length,
      }));
      const byName = (a: { name: string }, b: { name: string }) => (a.name < b.name ? -1 : 1);
      t.same(plain.sort(byName), expected.sort(byName));
    }),
    { numRuns: 100 },
  );
});

t.test('no byte changed in a file makes it fail in another way', async (t) => {
  const directory = make(t, { family: 'qwen3', hidden: 8, heads: 2, headDim: 4, neurons: 4, vocab: 5, layers: 1 });
  const path = join(directory, 'model.safetensors');
  const good = readFileSync(path);
  const headerEnd = 8 + Number(good.readBigUInt64LE());
  const config = readFileSync(join(directory, 'config.json'));
  const anyByte = fc.asyncProperty(
    fc.nat(headerEnd - 1),
    fc.nat(config.length - 1),
    fc.nat(255),
    async (at, atConfig, byte) => {
      const changed = Buffer.from(good);
      changed[at] = byte;
      const changedConfig = Buffer.from(config);
      changedConfig[atConfig] = byte;
      for (const [weights, text] of [
        [changed, config],
        [good, changedConfig],
      ]) {
        writeFileSync(path, weights);
        writeFileSync(join(directory, 'config.json'), text);
        try {
          await (await Checkpoint.open(directory)).close();
        } catch (error) {
          if (!(error instanceof Pi2Error)) throw error;
        }
      }
    },
  );
  await fc.assert(anyByte, { numRuns: 300 });
  t.pass('300 bytes in header and config');
});

t.test('no file stays open after a refusal', async (t) => {
  const directory = make(t, { family: 'llama', shards: 3 });
  editHeader(join(directory, 'model-00003-of-00003.safetensors'), (header) => {
    header['model.norm.weight'].dtype = 'F32';
  });
  const openFiles = () => readdirSync('/proc/self/fd').length;
  await refused(t, opening(directory), 'E_SAFETENSORS', 'model.norm.weight');
  const before = openFiles();
  for (let i = 0; i < 5; i++) await refused(t, opening(directory), 'E_SAFETENSORS');
  t.equal(openFiles(), before);
});

t.test('decoding', async (t) => {
  const values = Float32Array.of(0, 1, -2.5, 0.15625, 65504, 2 ** -24);
  t.same(decode(encode(values, 'F32'), 'F32'), values);
  t.same(decode(encode(values, 'F16'), 'F16'), values);
});

for (const name of SHARED_MODEL_NAMES) {
  t.test(`${name}: a trained checkpoint`, needsShared(name), async (t) => {
    const checkpoint = await Checkpoint.open(sharedModel(name) as string);
    await checkpoint.close();
    const { hyperparameters: h } = checkpoint.model;
    t.equal(checkpoint.name, name);
    t.match(h, { hidden_size: 256, head_dim: 64, kv_head_count: 2, vocab_size: 4096, tied_embeddings: false });
    t.equal(h.ffn.activation, name === 'stories-silu' ? 'silu' : 'drelu');
    t.same(h.eos_token_ids, [2]);
    t.ok(checkpoint.textFiles.includes('tokenizer.json'));
  });
}

t.test('a weight file reads alike through the page cache and past it, from any byte to any other', async (t) => {
  const addon = loadAddon();
  const directory = t.testdir();
  for (const bytes of [3 * 1024 * 1024 + 1234, 4096, 77]) {
    const path = join(directory, String(bytes));
    const content = Buffer.from(Array.from({ length: bytes }, (_, i) => (i * i) >> 5));
    writeFileSync(path, content);
    for (const isCached of [true, false]) {
      if (!isCached) spawnSync('dd', [`of=${path}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0']);
      const isDropped = (await addon.pageCacheBytes(path)) === 0;
      const file = await SourceFile.open(directory, String(bytes));
      const room = new Uint8Array(addon.allocatePages(bytes + ROOM_SPARE_BYTES));
      for (const [begin, end] of [
        [0, bytes],
        [1, bytes - 1],
        [bytes - 60, bytes],
        [4095, 4097],
        [8192, 12288],
      ]) {
        if (end > bytes) continue;
        const got = await file.readPages(begin, end - begin, room);
        t.ok(content.subarray(begin, end).equals(got), `${begin} to ${end} of ${bytes}, cached: ${isCached}`);
      }
      await t.rejects(file.readPages(bytes - 50, 51, room), {
        code: 'E_IO',
        message: new RegExp(`${path}.*1 bytes too early`),
      });
      await file.close();
      const cached = (await addon.pageCacheBytes(path)) ?? 0;
      if (isDropped && bytes > 4096) t.ok(cached < bytes / 4, `${cached} bytes of ${bytes} came into the page cache`);
    }
  }
  for (const wrong of [0, -1, Number.NaN, 2 ** 60, '4096']) t.throws(() => addon.allocatePages(wrong as number));
});
