import fc from 'fast-check';
import t from 'tap';
import { formatBytes, parseBytes } from '../src/base/bytes.js';
import { formatDuration } from '../src/base/duration.js';
import { Pi2Error } from '../src/base/error.js';
import { ENCODINGS, paddedLength, rowBytes, scaleBytes, weightBytes } from '../src/format/encoding.js';
import {
  type BundleLayout,
  chooseBundleLayout,
  expectedReadBytes,
  expertBytes,
  isSplit,
  PAGE_BYTES,
  wasteShare,
} from '../src/format/layout.js';
import { manifestSchema } from '../src/format/manifest.js';

const bundle = fc.record({
  encoding: fc.constantFrom('q4', 'q8', 'f16'),
  hidden: fc.integer({ min: 64, max: 8192 }),
  matrices: fc.constantFrom(2, 3),
} as const);

/** Byte ranges of the parts of every bundle of a unit, in order. */
function partRanges(layout: BundleLayout): [number, number][] {
  const ranges: [number, number][] = [];
  for (let slot = 0; slot < layout.neurons_per_unit; slot++) {
    const first = slot * layout.part1_stride;
    const second = layout.part2_offset + slot * layout.part2_stride;
    ranges.push([first, first + layout.part1_bytes], [second, second + layout.part2_bytes]);
  }
  return ranges.sort((a, b) => a[0] - b[0]);
}

t.test('the worked examples of FORMAT.md', async (t) => {
  const large = chooseBundleLayout('q4', 4096, 3);
  t.same(large, {
    matrices: 3,
    part1_bytes: 2048 + 3 * 256,
    part2_bytes: 4096,
    neurons_per_unit: 1,
    unit_bytes: 8192,
    part1_stride: 2816,
    part2_offset: 4096,
    part2_stride: 4096,
  });
  t.ok(isSplit(large));
  t.equal(expectedReadBytes(large), 4096 + 0.8 * 4096);

  const small = chooseBundleLayout('q4', 256, 3);
  t.match(small, { part1_bytes: 176, part2_bytes: 256, neurons_per_unit: 9, unit_bytes: 4096, part2_offset: 176 });
  t.notOk(isSplit(small));
  t.equal(expertBytes(small, 1024), 114 * 4096, '1024 neurons are 113 units of 9 and one of 7');
});

t.test('parts of a unit lie inside it and never overlap', async () => {
  fc.assert(
    fc.property(bundle, ({ encoding, hidden, matrices }) => {
      const layout = chooseBundleLayout(encoding, hidden, matrices);
      const ranges = partRanges(layout);
      return (
        ranges[0][0] === 0 &&
        ranges.every(([begin, end]) => begin < end && end <= layout.unit_bytes) &&
        ranges.every(([begin], i) => i === 0 || begin >= ranges[i - 1][1])
      );
    }),
  );
});

t.test('units are whole pages; parts are split on a page border or joint', async () => {
  fc.assert(
    fc.property(bundle, ({ encoding, hidden, matrices }) => {
      const layout = chooseBundleLayout(encoding, hidden, matrices);
      const { part1_bytes, part2_bytes, part1_stride, part2_stride, part2_offset, neurons_per_unit } = layout;
      const split =
        part2_offset % PAGE_BYTES === 0 &&
        part2_offset >= neurons_per_unit * part1_bytes &&
        part1_stride === part1_bytes &&
        part2_stride === part2_bytes;
      const both = part1_bytes + part2_bytes;
      const joint = part2_offset === part1_bytes && part1_stride === both && part2_stride === both;
      return layout.unit_bytes % PAGE_BYTES === 0 && (split || joint);
    }),
  );
});

t.test('parts have room for the vectors they hold', async () => {
  fc.assert(
    fc.property(bundle, ({ encoding, hidden, matrices }) => {
      const layout = chooseBundleLayout(encoding, hidden, matrices);
      const weights = weightBytes(encoding, hidden);
      return (
        layout.matrices === matrices &&
        layout.part1_bytes === weights + matrices * scaleBytes(encoding, hidden) &&
        layout.part2_bytes === (matrices - 1) * weights
      );
    }),
  );
});

t.test('a layout wastes less than half, and costs no more than one neuron a unit', async () => {
  const cost = (layout: BundleLayout) => expectedReadBytes(layout) + layout.unit_bytes / layout.neurons_per_unit;
  const pages = (bytes: number) => Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES;
  fc.assert(
    fc.property(bundle, ({ encoding, hidden, matrices }) => {
      const layout = chooseBundleLayout(encoding, hidden, matrices);
      const { part1_bytes: part1, part2_bytes: part2 } = layout;
      const aloneSplit = pages(part1) + 0.8 * pages(part2) + pages(part1) + pages(part2);
      const aloneJoint = 2 * pages(part1 + part2);
      return wasteShare(layout) < 0.5 && cost(layout) <= Math.min(aloneSplit, aloneJoint) + 1e-6;
    }),
  );
  for (const hidden of [256, 2560, 4096, 5120, 8192]) {
    const waste = wasteShare(chooseBundleLayout('q4', hidden, 3));
    t.ok(waste < 0.16, `int4, hidden ${hidden} wastes ${(100 * waste).toFixed(1)} %`);
  }
});

t.test('an expert takes whole units, as few as hold its neurons', async () => {
  fc.assert(
    fc.property(bundle, fc.integer({ min: 1, max: 40000 }), ({ encoding, hidden, matrices }, neurons) => {
      const layout = chooseBundleLayout(encoding, hidden, matrices);
      const units = expertBytes(layout, neurons) / layout.unit_bytes;
      const capacity = units * layout.neurons_per_unit;
      return Number.isInteger(units) && capacity >= neurons && capacity - neurons < layout.neurons_per_unit;
    }),
  );
});

t.test('encodings: padding and sizes', async (t) => {
  t.equal(rowBytes('q4', 4096), 2048 + 256);
  t.equal(rowBytes('q8', 4096), 4096 + 256);
  t.equal(rowBytes('f16', 4096), 8192);
  t.equal(rowBytes('f32', 4096), 16384);
  t.equal(rowBytes('q4', 1), 128 + 16, 'one weight takes a group');
  t.equal(rowBytes('f32', 3), 12, 'f32 is not padded');
  fc.assert(
    fc.property(fc.constantFrom(...ENCODINGS), fc.integer({ min: 1, max: 100000 }), (encoding, columns) => {
      const n = paddedLength(encoding, columns);
      const isPadded = encoding === 'f32' ? n === columns : n % 256 === 0 && n >= columns && n - columns < 256;
      return isPadded && rowBytes(encoding, columns) === weightBytes(encoding, columns) + scaleBytes(encoding, columns);
    }),
  );
});

const manifest = {
  format: { name: 'pi2', version: 1 },
  name: 'tiny',
  hyperparameters: {
    family: 'llama',
    hidden_size: 64,
    layer_count: 1,
    head_count: 2,
    kv_head_count: 1,
    head_dim: 32,
    neuron_count: 96,
    vocab_size: 100,
    context_length: 128,
    norm: { kind: 'rms', epsilon: 1e-5 },
    position: { kind: 'rope', theta: 10000, scaling: null },
    attention: { qkv_bias: false, output_bias: false, qk_norm: false, windows: [0] },
    ffn: { gated: true, activation: 'silu', threshold: 0, bias: false },
    experts: null,
    tied_embeddings: true,
    bos_token_id: 1,
    eos_token_ids: [2],
  },
  quantization: { name: 'q4', ffn: 'q4', attention: 'q4', embedding: 'q8', head: 'q8' },
  layout: chooseBundleLayout('q4', 64, 3),
  heat_order: 'identity',
  extents: [{ name: 'embedding', file: 'resident.bin', offset: 0, bytes: 4096, crc32: '0123abcd' }],
  tensors: [{ name: 'embedding', extent: 'embedding', offset: 0, bytes: 4096, encoding: 'q8', rows: 100, columns: 64 }],
  provenance: {
    converter: 'powerinfer2 0.1.0',
    sources: [{ file: 'config.json', bytes: 2, sha256: 'ab'.repeat(32) }],
  },
};

t.test('the manifest schema takes a manifest and refuses what is not one', async (t) => {
  t.same(manifestSchema.parse(manifest), manifest);
  const refuses = (what: string, change: (m: typeof manifest) => unknown) => {
    const copy = structuredClone(manifest);
    change(copy);
    t.notOk(manifestSchema.safeParse(copy).success, what);
  };
  refuses('an unknown key', (m) => Object.assign(m, { extra: 1 }));
  refuses('an unknown key inside', (m) => Object.assign(m.hyperparameters.ffn, { extra: 1 }));
  refuses('a missing key', (m) => Reflect.deleteProperty(m, 'tensors'));
  refuses('another format', (m) => Object.assign(m.format, { name: 'gguf' }));
  refuses('an unknown family', (m) => Object.assign(m.hyperparameters, { family: 'mamba' }));
  refuses('a file that is none of ours', (m) => Object.assign(m.extents[0], { file: '../../etc/passwd' }));
  refuses('a negative offset', (m) => Object.assign(m.extents[0], { offset: -1 }));
  refuses('an offset that is not exact', (m) => Object.assign(m.extents[0], { offset: 2 ** 53 }));
  refuses('a fraction of a byte', (m) => Object.assign(m.tensors[0], { bytes: 1.5 }));
  refuses('a checksum in capitals', (m) => Object.assign(m.extents[0], { crc32: '0123ABCD' }));
  refuses('a short sha256', (m) => Object.assign(m.provenance.sources[0], { sha256: 'ab' }));
  refuses('an absurd hidden size', (m) => Object.assign(m.hyperparameters, { hidden_size: 1e9 }));
  refuses('a text for a number', (m) => Object.assign(m.hyperparameters, { layer_count: '1' }));
  refuses('an epsilon of zero', (m) => Object.assign(m.hyperparameters.norm, { epsilon: 0 }));
  refuses('an unknown encoding', (m) => Object.assign(m.quantization, { ffn: 'q3' }));
});

t.test('sizes are read and written for people', async (t) => {
  t.equal(parseBytes('4096'), 4096);
  t.equal(parseBytes('512M'), 512 * 1024 ** 2);
  t.equal(parseBytes('2g'), 2 * 1024 ** 3);
  t.equal(parseBytes('1.5GiB'), 1.5 * 1024 ** 3);
  t.equal(parseBytes(' 3 KB '), 3072);
  t.equal(parseBytes('12b'), 12);
  for (const wrong of ['', '0', '-1', 'G', '1X', '1e9', '2GG', '0x10', '99999999T', 'Infinity', '1.2.3M']) {
    t.throws(() => parseBytes(wrong), { code: 'E_USAGE' }, `"${wrong}" is refused`);
  }
  t.equal(formatBytes(0), '0 B');
  t.equal(formatBytes(1023), '1023 B');
  t.equal(formatBytes(1536), '1.50 KiB');
  t.equal(formatBytes(1000 * 1024), '1000 KiB');
  t.equal(formatBytes(999.7 * 1024), '999.7 KiB');
  t.equal(formatBytes(123.4 * 1024 ** 3), '123 GiB');
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 2 ** 50 }), (bytes) => {
      return Math.abs(parseBytes(formatBytes(bytes)) / bytes - 1) < 0.01;
    }),
  );
});

t.test('times are written for people', async (t) => {
  t.equal(formatDuration(0.04), '0.0 s');
  t.equal(formatDuration(9.96), '10 s');
  t.equal(formatDuration(185), '3 min 05 s');
  t.equal(formatDuration(59.6), '1 min 00 s');
  t.equal(formatDuration(3599.9), '1 h 00 min');
  t.equal(formatDuration(2 * 3600 + 7 * 60 + 59), '2 h 07 min');
});

t.test('errors know their exit status', async (t) => {
  t.equal(new Pi2Error('E_USAGE', 'x').exitStatus, 2);
  t.equal(new Pi2Error('E_NOT_FINITE', 'x').exitStatus, 3);
  t.equal(new Pi2Error('E_DISK_FULL', 'x').exitStatus, 5);
  t.equal(new Pi2Error('E_INTERRUPTED', 'x').exitStatus, 130);
});
