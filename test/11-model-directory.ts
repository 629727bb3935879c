import { cpSync, readFileSync, rmSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import t from 'tap';
import { Pi2Error } from '../src/base/error.js';
import { FAMILIES } from '../src/format/hyperparameters.js';
import type { Manifest } from '../src/format/manifest.js';
import { openModelDirectory, parseManifest } from '../src/format/model-directory.js';
import { partSizes } from '../src/format/sizes.js';
import { makeModel } from './support/models.js';

// biome-ignore lint/suspicious/noExplicitAny: tests write wrong values on purpose.
type Json = any;

const scratch = t.testdir();
const moePath = await makeModel(scratch, { family: 'mixtral', hidden: 160, headDim: 32, neurons: 44 }, 'q4');
const optPath = await makeModel(scratch, { family: 'opt', neurons: 40 }, 'q8');
const moeText = readFileSync(join(moePath, 'model.json'), 'utf8');

/** The manifest after `edit`, parsed. */
function parseEdited(edit: (manifest: Json) => void, text = moeText): Manifest {
  const manifest = JSON.parse(text);
  edit(manifest);
  return parseManifest(JSON.stringify(manifest), 'model.json');
}

/** A copy of a model directory, to be damaged. */
function copyOf(model: string): string {
  const copy = join(scratch, 'damaged.pi2');
  rmSync(copy, { recursive: true, force: true });
  cpSync(model, copy, { recursive: true });
  return copy;
}

t.test('models of every family open, with every tensor and extent found', async (t) => {
  for (const family of FAMILIES) {
    for (const quantization of ['f16', 'q4'] as const) {
      const model = await openModelDirectory(await makeModel(scratch, { family }, quantization));
      const { hyperparameters: h } = model.manifest;
      t.equal(h.family, family);
      t.equal(model.tensor('embedding')?.rows, h.vocab_size);
      t.equal(model.tensor('layers.9.q'), undefined);
      t.throws(() => model.extent('layers.9.neurons'));
      t.equal(model.extent('layers.1.neurons').offset, model.expertOffset(1, 0));
      const bytes = partSizes(model.manifest).reduce((sum, part) => sum + part.bytes, 0);
      t.ok(bytes <= model.manifest.extents.reduce((sum, extent) => sum + extent.bytes, 0), 'parts are in extents');
    }
  }
});

t.test('what is not a model directory is refused in words', async (t) => {
  const directory = t.testdir({ 'a.pi2.partial': {}, 'empty.pi2': {}, file: '' });
  const rejects = (name: string, expected: { code: string; message: RegExp; hint?: RegExp }) =>
    t.rejects(openModelDirectory(join(directory, name)), expected, name);
  await rejects('none.pi2', { code: 'E_FILE', message: /no such file/ });
  await rejects('file', { code: 'E_MODEL', message: /not a model directory/ });
  await rejects('empty.pi2', { code: 'E_MODEL', message: /no model\.json/, hint: /converted first/ });
  await rejects('a.pi2.partial', {
    code: 'E_MODEL',
    message: /conversion of .*a\.pi2 is unfinished/,
    hint: /continues/,
  });
  await rejects('a.pi2.partial/', { code: 'E_MODEL', message: /is unfinished/ });
  await rejects('a.pi2', { code: 'E_MODEL', message: /is unfinished/ });
});

t.test('a directory that is cut off, too long, incomplete or that points outside is refused', async (t) => {
  let copy = copyOf(moePath);
  const neurons = join(copy, 'neurons.bin');
  const { length } = readFileSync(neurons);
  truncateSync(neurons, length - 1);
  await t.rejects(openModelDirectory(copy), { code: 'E_MODEL', message: /neurons\.bin is cut off/ });
  truncateSync(neurons, length + 1);
  await t.rejects(openModelDirectory(copy), { code: 'E_MODEL', message: /too long/ });
  rmSync(neurons);
  await t.rejects(openModelDirectory(copy), { code: 'E_MODEL', message: /neurons\.bin is missing/ });
  symlinkSync(join(moePath, 'neurons.bin'), neurons);
  await t.rejects(openModelDirectory(copy), { code: 'E_MODEL', message: /not a regular file/ });
  copy = copyOf(moePath);
  rmSync(join(copy, 'model.json'));
  symlinkSync(join(moePath, 'model.json'), join(copy, 'model.json'));
  await t.rejects(openModelDirectory(copy), { code: 'E_MODEL', message: /not a regular file/ });
  rmSync(join(copy, 'model.json'));
  writeFileSync(join(copy, 'model.json'), '');
  truncateSync(join(copy, 'model.json'), 2 ** 26);
  await t.rejects(openModelDirectory(copy), { code: 'E_MODEL', message: /more than any manifest/ });
  copy = copyOf(moePath);
  rmSync(join(copy, 'tokenizer.json'));
  t.equal((await openModelDirectory(copy)).tokenizerPaths.tokenizer, null, 'a model may have no tokenizer');
});

t.test('manifests that lie are refused, naming what does not add up', (t) => {
  const cases: [string, (m: Json) => void, RegExp][] = [
    ['unknown key', (m) => (m.colour = 1), /colour/],
    ['unknown hyper-parameter', (m) => (m.hyperparameters.extra = 1), /hyperparameters.*extra/],
    ['wrong type', (m) => (m.hyperparameters.hidden_size = '160'), /hyperparameters\.hidden_size/],
    ['absurd size', (m) => (m.hyperparameters.hidden_size = 1e9), /hyperparameters\.hidden_size/],
    ['file outside', (m) => (m.extents[0].file = '../../etc/passwd'), /extents\.0\.file/],
    ['heads', (m) => (m.hyperparameters.kv_head_count = 2), /head_count 3 is not a multiple of kv_head_count 2/],
    ['windows', (m) => m.hyperparameters.attention.windows.push(0), /windows has 3 entries for 2 layers/],
    ['experts', (m) => (m.hyperparameters.experts.used_per_token = 5), /used_per_token 5 is more/],
    ['bos', (m) => (m.hyperparameters.bos_token_id = 263), /outside the vocabulary/],
    ['expert biases', (m) => (m.hyperparameters.ffn.bias = true), /with experts/],
    ['no gate', (m) => (m.hyperparameters.ffn.gated = false), /needs a gate/],
    ['f32 bundles', (m) => (m.quantization.ffn = 'f32'), /quantization\.ffn/],
    ['matrices', (m) => (m.layout.matrices = 2), /layout\.matrices/],
    ['part 1', (m) => m.layout.part1_bytes--, /part1_bytes/],
    ['part 2', (m) => m.layout.part2_bytes++, /part2_bytes/],
    ['stride', (m) => m.layout.part1_stride--, /neither split nor joint/],
    ['unit', (m) => (m.layout.unit_bytes += 4096), /neither split nor joint/],
    ['neurons in a unit', (m) => (m.layout.neurons_per_unit = 1e6), /neurons_per_unit/],
    ['extent missing', (m) => m.extents.pop(), /extent layers\.1\.neurons is missing/],
    ['extent twice', (m) => m.extents.push(m.extents.at(-1)), /is there twice/],
    ['extent unknown', (m) => (m.extents[0].name = 'other'), /unknown extent other/],
    ['extent not aligned', (m) => (m.extents[0].offset = 64), /not on a page/],
    ['extents out of order', (m) => m.extents.reverse(), /out of order/],
    ['extent in the other file', (m) => (m.extents[0].file = 'neurons.bin'), /is in neurons\.bin/],
    ['extent beyond', (m) => (m.extents.at(-1).offset = 2 ** 53 - 4096), /ends beyond any file/],
    ['bundles too few', (m) => (m.extents.at(-1).bytes -= 4096), /its bundles take/],
    ['tensor missing', (m) => m.tensors.shift(), /tensor embedding is missing/],
    ['tensor twice', (m) => m.tensors.push(m.tensors[0]), /is there twice/],
    ['tensor unknown', (m) => (m.tensors[1].name = 'x'), /unknown tensor x/],
    ['tensor elsewhere', (m) => (m.tensors[0].extent = 'head'), /in extent head, not embedding/],
    ['tensor shape', (m) => m.tensors[0].rows--, /262 x 160, the model needs 263 x 160/],
    ['tensor encoding', (m) => (m.tensors[0].encoding = 'q4'), /stored as q4, expected q8/],
    ['tensor bytes', (m) => m.tensors[0].bytes++, /its shape takes/],
    ['tensor not aligned', (m) => (m.tensors[0].offset = 32), /multiple of 64/],
    ['tensor beyond', (m) => (m.tensors[0].offset = 64), /ends beyond its extent/],
  ];
  for (const [name, edit, message] of cases) {
    t.throws(() => parseEdited(edit), { code: 'E_MODEL', message, hint: /convert/ }, name);
  }
  const overlap = (manifest: Json) => {
    const inExtent = manifest.tensors.filter((tensor: Json) => tensor.extent === 'layers.0.attention');
    inExtent[1].offset = inExtent[0].offset;
  };
  t.throws(() => parseEdited(overlap), { message: /overlap/ });
  t.throws(() => parseManifest('{', 'model.json'), { code: 'E_MODEL', message: /not JSON/ });
  t.throws(() => parseManifest('null', 'model.json'), { code: 'E_MODEL' });
  const newer = (manifest: Json) => {
    manifest.format.version = 2;
    manifest.new_key = 1;
  };
  t.throws(() => parseEdited(newer), {
    code: 'E_MODEL_VERSION',
    message: /newer powerinfer2: format 2, this one reads 1/,
  });
  t.end();
});

t.test('a layout that another version would choose is read all the same', (t) => {
  const edit = (manifest: Json) => {
    const { layout, hyperparameters } = manifest;
    layout.neurons_per_unit = 1;
    layout.part1_stride = layout.part2_stride = layout.part1_bytes + layout.part2_bytes;
    layout.part2_offset = layout.part1_bytes;
    layout.unit_bytes = 4096;
    const { experts, neuron_count } = hyperparameters;
    let offset = 0;
    for (const extent of manifest.extents.filter((e: Json) => e.file === 'neurons.bin')) {
      extent.offset = offset;
      extent.bytes = experts.count * neuron_count * 4096;
      offset += extent.bytes;
    }
  };
  t.equal(parseEdited(edit).layout.neurons_per_unit, 1);
  t.end();
});

t.test('whatever is changed in a manifest: it is read or refused, never a crash', (t) => {
  for (const text of [moeText, readFileSync(join(optPath, 'model.json'), 'utf8')]) {
    const paths = leaves(JSON.parse(text));
    const value = fc.oneof(
      fc.integer(),
      fc.double(),
      fc.constantFrom(null, true, 0, -1, 1, 2 ** 53, 2 ** 31, '', 'q4', '__proto__', [], {}),
      fc.string(),
    );
    const change = fc.record({ path: fc.constantFrom(...paths), value, remove: fc.boolean() });
    fc.assert(
      fc.property(fc.array(change, { minLength: 1, maxLength: 3 }), (changes) => {
        const manifest = JSON.parse(text);
        for (const { path, value, remove } of changes) {
          const parent = path.slice(0, -1).reduce((node: Json, key) => node?.[key], manifest);
          if (typeof parent !== 'object' || parent === null) continue;
          const key = path.at(-1) as string;
          if (remove) delete parent[key];
          else parent[key] = value;
        }
        try {
          parseManifest(JSON.stringify(manifest), 'model.json');
        } catch (error) {
          if (!(error instanceof Pi2Error)) throw error;
          if (/\n/.test(error.message)) throw new Error(`more than a line: ${error.message}`);
        }
      }),
      { numRuns: 400 },
    );
  }
  fc.assert(
    fc.property(fc.json(), (json) => {
      try {
        parseManifest(json, 'model.json');
      } catch (error) {
        if (!(error instanceof Pi2Error)) throw error;
      }
    }),
  );
  t.end();
});

/** The paths of all values in a JSON value, objects and arrays included. */
function leaves(value: Json, path: string[] = []): string[][] {
  const children = typeof value === 'object' && value !== null ? Object.entries(value) : [];
  const below = children.flatMap(([key, child]) => leaves(child, [...path, key]));
  return path.length > 0 ? [path, ...below] : below;
}
