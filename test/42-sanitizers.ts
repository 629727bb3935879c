// The thread pool, training and the engine, resident, streamed and with a dense unit, under ThreadSanitizer, and under AddressSanitizer with
// UndefinedBehaviorSanitizer: thread_pool_test.cc, train_test.cc, engine_test.cc, hybrid_test.cc and streamed_test.cc of native/, built here.
import { execFile, spawnSync } from 'node:child_process';
import { existsSync, readdirSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { promisify } from 'node:util';
import t, { type Test } from 'tap';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest } from '../src/engine/contract.js';
import { Engine } from '../src/engine/engine.js';
import type { QuantizationName } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY, makeModel } from './support/models.js';
import { REPOSITORY } from './support/shared.js';

const run = promisify(execFile);
const scratch = t.testdir({});

const SANITIZERS = {
  ThreadSanitizer: '-fsanitize=thread',
  'AddressSanitizer and UndefinedBehaviorSanitizer': '-fsanitize=address,undefined',
};
const AVX2 = ['-mavx2', '-mfma', '-mf16c'];
const AVX512 = [...AVX2, '-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq'];
/** Flags of the kernels, as binding.gyp has them. */
const KERNELS: Record<string, Record<string, string[]>> = {
  x64: {
    avx2: AVX2,
    avx512: [...AVX512, '-mavx512vnni'],
    amx: [...AVX512, '-mavx512bf16', '-mamx-tile', '-mamx-bf16'],
  },
  arm64: { neon: ['-march=armv8.2-a+dotprod+fp16'] },
};
const kernels = KERNELS[process.arch] ?? {};
const POOL = ['base/trace', 'base/thread_pool', 'base/thread_pool_test'];
const TRAINING = [
  'base/memory',
  'base/trace',
  'base/thread_pool',
  'predictor/product',
  'predictor/train',
  'predictor/train_test',
];
/** All that an engine needs; base/memory_test.cc is in place of base/memory.cc. */
const ENGINE = [
  ...[
    'base/bandwidth',
    'base/crc32',
    'base/memory_test',
    'base/threads',
    'base/trace',
    'base/thread_pool',
    'quantize/encode',
  ],
  ...['cache', 'engine', 'npu', 'storage'].flatMap((folder) =>
    readdirSync(join(REPOSITORY, 'native', folder))
      .filter((name) => name.endsWith('.cc') && !name.endsWith('_test.cc'))
      .map((name) => `${folder}/${basename(name, '.cc')}`),
  ),
  ...['dispatch', 'scalar', ...Object.keys(kernels)].map((name) => `kernels/${name}`),
];
/** Ways to stream that are tried for each model of streamed_test. */
const WAYS = 18;

/** Why a sanitizer cannot be used here, or false. It must run, too: some Linux kernels place memory where it cannot follow. */
function missing(sanitizer: string): string | false {
  const program = join(scratch, 'probe');
  const source = 'int main() { return 0; }';
  const built = spawnSync('g++', [sanitizer, '-x', 'c++', '-', '-o', program], { input: source });
  if (built.status !== 0) return `g++ ${sanitizer} does not work here`;
  return spawnSync(program).status !== 0 && `programs built with ${sanitizer} do not run here`;
}

/** Compiles sources below native/ that are not compiled yet in `directory`, two at a time, and links them to `name`. */
async function build(directory: string, name: string, sanitizer: string, sources: string[]): Promise<string> {
  const common = ['-std=c++20', '-O0', '-g1', '-fno-exceptions', '-fno-rtti', '-fno-sanitize-recover=all', sanitizer];
  const objects = sources.map((source) => join(directory, `${source.replace('/', '-')}.o`));
  const left = [...sources.entries()].filter(([i]) => !existsSync(objects[i]));
  const compile = async () => {
    for (let next = left.pop(); next; next = left.pop()) {
      const [i, source] = next;
      const flags = [...common, ...(kernels[basename(source)] ?? []), '-I', REPOSITORY];
      await run('g++', [...flags, '-c', join(REPOSITORY, 'native', `${source}.cc`), '-o', objects[i]]);
    }
  };
  await Promise.all([compile(), compile()]);
  const program = join(directory, name);
  await run('g++', [sanitizer, ...objects, '-pthread', '-o', program]);
  return program;
}

/** What the program printed; fails with its output and what the sanitizer said when it did not end well. */
async function outputOf(t: Test, program: string, ...args: string[]): Promise<string> {
  try {
    return (await run(program, args)).stdout;
  } catch (error) {
    const { stdout, stderr } = error as { stdout: string; stderr: string };
    t.fail(`${basename(program)} ${args.join(' ')}: ${stdout}${stderr}`);
    return '';
  }
}

/** Converts a small model and writes the request that opens it as engine_test reads it. */
async function writeRequest(options: CheckpointOptions, quantization: QuantizationName): Promise<string> {
  const model = await openModelDirectory(await makeModel(scratch, options, quantization));
  const addon = loadAddon();
  const lines: string[] = [];
  const openEngine = (request: EngineRequest) => {
    const { extents, tensors, layout, checksums: _, threads: __, kernelSet: ___, ...fields } = request;
    for (const extent of extents) lines.push(`extent ${Object.values(extent).join(' ')}`);
    for (const tensor of tensors) lines.push(`tensor ${Object.values(tensor).join(' ')}`);
    lines.push(`layout ${Object.values(layout).join(' ')}`);
    // A batch that is no multiple of anything, and smaller than the context.
    const all = { ...fields, batchSize: 13 };
    for (const [name, value] of Object.entries(all)) {
      lines.push(
        `${name} ${ArrayBuffer.isView(value) || Array.isArray(value) ? Array.from(value as number[]).join(' ') : value}`,
      );
    }
    return addon.openEngine(request);
  };
  await (await Engine.open(model, { context: 0, threads: 1 }, { ...addon, openEngine })).close();
  const file = join(scratch, `${basename(model.path)}.txt`);
  writeFileSync(file, `${lines.join('\n')}\n`);
  return file;
}

const SMALL = { vocab: MODEL_VOCABULARY, context: 22, hidden: 100, heads: 5, headDim: 12, neurons: 150 };
const REQUESTS = Promise.all([
  writeRequest({ ...SMALL, family: 'turbosparsemixtral' }, 'q4'),
  writeRequest({ ...SMALL, family: 'mistral', config: { sliding_window: 4 } }, 'q8'),
  writeRequest({ ...SMALL, family: 'qwen3', headDim: 20 }, 'q4'),
  writeRequest({ ...SMALL, family: 'opt', headDim: 20 }, 'f16'),
]);

for (const [name, sanitizer] of Object.entries(SANITIZERS)) {
  t.test(name, { skip: missing(sanitizer) }, async (t) => {
    const directory = t.testdir({});
    const pool = await build(directory, 'thread_pool_test', sanitizer, POOL);
    t.match(await outputOf(t, pool, '15000'), /^60000 regions, [0-9]{7} chunks\n$/, 'the thread pool, hammered');

    const training = await build(directory, 'train_test', sanitizer, TRAINING);
    t.equal(await outputOf(t, training), '0 of 1335 parameters differ, learned\n', 'training, one thread and three');

    const engine = await build(directory, 'engine_test', sanitizer, [...ENGINE, 'engine/engine_test']);
    const sets = loadAddon().cpu().kernelSets;
    for (const request of await REQUESTS) {
      const lines = sets.map((set) => `${set}: 28 steps\n`).join('');
      t.equal(await outputOf(t, engine, request), lines, basename(request));
    }

    const streamed = await build(directory, 'streamed_test', sanitizer, [...ENGINE, 'engine/streamed_test']);
    const hybrid = await build(directory, 'hybrid_test', sanitizer, [...ENGINE, 'engine/hybrid_test']);
    const units = ['drelu-q4', 'relu-f16', 'experts-q8'].map((model) => `hybrid-${model}: 13 engines\n`).join('');
    t.equal(await outputOf(t, hybrid, directory), units, 'the dense unit beside the CPU');

    const models = ['drelu-q4', 'relu-f16', 'experts-q8', 'silu-q4'];
    const lines = models.map((model) => `${model}: ${WAYS} ways, ${WAYS / 2} faults\n`).join('');
    t.equal(await outputOf(t, streamed, directory, String(WAYS)), lines, 'streamed in many ways, on flash that fails');
  });
}
