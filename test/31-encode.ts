// Quantization: native/quantize/encode_test.cc, built for several instruction sets, which must all come to the same bytes, a
// model being the same file whichever machine converts it; and the checksums that go with it.
import { execFile, spawnSync } from 'node:child_process';
import path from 'node:path';
import { promisify } from 'node:util';
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import t from 'tap';
import { loadAddon } from '../src/engine/addon.js';
import { REPOSITORY } from './support/shared.js';

const run = promisify(execFile);
const SOURCES = ['quantize/encode_test', 'quantize/encode', 'base/crc32', 'base/threads'];
const FLAGS = ['-std=c++20', '-O3', '-fno-exceptions', '-fno-rtti', '-ffp-contract=off', '-pthread'];
const SETS: Record<string, string[]> = {
  least: [],
  avx2: ['-mavx2', '-mfma'],
  avx512f: ['-mavx2', '-mfma', '-mavx512f', '-mavx512vl', '-mavx512bw', '-mavx512dq'],
};

function installed(command: string): boolean {
  return spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0;
}

/** Builds the test program and returns what it printed. */
async function outputOf(directory: string, compiler: string, flags: string[], runner: string[]): Promise<string> {
  const program = path.join(directory, 'encode_test');
  const sources = SOURCES.map((name) => path.join(REPOSITORY, 'native', `${name}.cc`));
  await run(compiler, [...FLAGS, ...flags, '-I', REPOSITORY, ...sources, '-o', program]);
  const [file, ...args] = [...runner, program];
  return (await run(file, args).catch((error) => ({ stdout: `${error.stdout}${error.message}` }))).stdout;
}

t.test(
  'encoding follows the equations, in the same bytes with every instruction set',
  { skip: installed('g++') ? false : 'not installed: g++' },
  async (t) => {
    const { features } = loadAddon().cpu();
    const first = await outputOf(t.testdir(), 'g++', [], []);
    t.match(first, /^encode: [1-9]\d{3,} checks, [0-9a-f]{8}\n$/);
    for (const [set, flags] of Object.entries(process.arch === 'x64' ? SETS : {})) {
      if (set !== 'least' && !features.includes(set)) continue;
      t.equal(await outputOf(t.testdir(), 'g++', [...flags, '-DPI2_ONE_INSTRUCTION_SET'], []), first, set);
    }
    const emulator = ['qemu-aarch64-static', 'qemu-aarch64'].find(installed);
    if (process.arch !== 'arm64' && emulator && installed('aarch64-linux-gnu-g++')) {
      const arm = await outputOf(t.testdir(), 'aarch64-linux-gnu-g++', ['-static'], [emulator, '-cpu', 'max']);
      t.equal(arm, first, 'arm64');
    }
  },
);

t.test('checksums are those of zlib, whatever the length, the beginning and the seed', async () => {
  const addon = loadAddon();
  const bytes = Uint8Array.from({ length: 5000 }, (_, i) => (i * i * 31 + (i >> 3)) & 255);
  const size = fc.oneof(fc.integer({ min: 0, max: 200 }), fc.integer({ min: 0, max: 4900 }));
  await fc.assert(
    fc.asyncProperty(fc.nat(99), size, fc.nat(0xffffffff), async (begin, length, seed) => {
      const part = bytes.subarray(begin, begin + length);
      return (await addon.crc32(part, seed)) >>> 0 === crc32(part, seed) >>> 0;
    }),
    { numRuns: 500 },
  );
});
