// A dense unit beside the CPU on trained models: the same greedy tokens whatever is whose, kept to a budget, and said in words.
import { join } from 'node:path';
import t from 'tap';
import { convert } from '../converter/convert.js';
import { Engine, type EngineOptions } from '../src/engine/engine.js';
import { likeliest } from '../src/engine/sampler.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import { clusterNeurons } from '../src/format/npu.js';
import { findOnnxruntime } from '../src/npu/onnxruntime-library.js';
import { buildProgram, jsonLines, runCli } from './support/cli.js';
import { REPOSITORY, SHARED_MODEL_NAMES, sharedModel } from './support/shared.js';

const scratch = t.testdir();
buildProgram();

const PROMPT = [1, 420, 439, 264, 299, 1057, 12, 77];

/** 48 greedy tokens behind a prompt, and the engine as it was left. */
async function greedy(model: ModelDirectory, options: Partial<EngineOptions>) {
  const engine = await Engine.open(model, { context: 128, threads: 2, ...options });
  try {
    const logits = new Float32Array(engine.vocabSize);
    const tokens: number[] = [];
    await engine.step(Int32Array.from(PROMPT), 0, logits, { exact: true, prompt: true });
    for (let i = 0; i < 48; i++) {
      tokens.push(likeliest(logits));
      await engine.step(Int32Array.of(tokens[i]), PROMPT.length + i, logits);
    }
    return { tokens, unit: engine.unit, counters: engine.counters(), budgetBytes: engine.budgetBytes };
  } finally {
    await engine.close();
  }
}

async function makeTrained(name: string, checkpoint: string, npu = false): Promise<ModelDirectory> {
  const output = join(scratch, `${name}.pi2`);
  const request = { checkpoint, output, quantization: 'q4', maxMemoryBytes: 2 ** 31, force: true, npu } as const;
  await convert(request, () => {}, new AbortController().signal);
  return openModelDirectory(output);
}

t.test('trained models: the same greedy tokens for every ratio, in memory and from flash', async (t) => {
  const trained: [string, string][] = [['demo', join(REPOSITORY, 'demo', 'stories-drelu')]];
  for (const name of SHARED_MODEL_NAMES) {
    const checkpoint = sharedModel(name);
    if (checkpoint !== null) trained.push([name, checkpoint]);
    else t.comment(`${name} is not on this machine`);
  }
  for (const [name, checkpoint] of trained) {
    const model = await makeTrained(name, checkpoint);
    const alone = await greedy(model, {});
    const { neuron_count } = model.manifest.hyperparameters;
    const halfCluster = clusterNeurons(neuron_count) / neuron_count / 2;
    t.strictSame(alone.unit, null, `${name}: by default there is no unit`);
    for (const hotRatio of [0, 0.25, 0.5, 1]) {
      for (const options of [{ threads: 1 }, {}, { loadMode: 'direct' as const }]) {
        const hybrid = await greedy(model, { npu: 'host', hotRatio, ...options });
        const what = `${name}, ratio ${hotRatio}, ${JSON.stringify(options)}`;
        t.strictSame(hybrid.tokens, alone.tokens, what);
        t.ok(
          Math.abs((hybrid.unit?.hotRatios[0] ?? -1) - hotRatio) <= halfCluster,
          `${what}: ${hybrid.unit?.hotRatios}`,
        );
        t.equal((hybrid.counters.unit?.jobs ?? 0) > 0, hotRatio > 0, `${what}: the unit computes`);
      }
    }
    const measured = await greedy(model, { npu: 'host' });
    t.strictSame(
      measured.tokens,
      alone.tokens,
      `${name}: with what was measured to be fastest, ${measured.unit?.hotRatios}`,
    );
  }
});

const library = findOnnxruntime();
const skip = library.includes('/') ? false : 'the package onnxruntime-node is not installed';
t.test('ONNX Runtime beside the CPU: the same greedy tokens for every ratio', { skip }, async (t) => {
  const model = await makeTrained('demo-npu', join(REPOSITORY, 'demo', 'stories-drelu'), true);
  const alone = await greedy(model, {});
  for (const hotRatio of [0, 0.25, 0.5, 1]) {
    for (const options of [{ threads: 1 }, {}, { loadMode: 'direct' as const }]) {
      const hybrid = await greedy(model, { npu: 'onnxruntime', hotRatio, ...options });
      const what = `ratio ${hotRatio}, ${JSON.stringify(options)}`;
      t.strictSame(hybrid.tokens, alone.tokens, what);
      t.match(hybrid.unit?.name, /^onnxruntime \d+\.\d+\.\d+, cpu$/);
      t.equal((hybrid.counters.unit?.jobs ?? 0) > 0, hotRatio > 0, `${what}: the unit computes`);
    }
  }
  t.strictSame((await greedy(model, { npu: 'onnxruntime:cpu' })).tokens, alone.tokens, 'measured');
});

t.test('a budget: the hot region holds the clusters, or the ratio is lowered in words', async (t) => {
  const model = await openModelDirectory(join(scratch, 'demo.pi2'));
  const request = { npu: 'host', hotRatio: 1, loadMode: 'direct', threads: 2 } as const;
  const least = await greedy(model, { ...request, memory: { kind: 'min' } });
  t.equal(least.unit?.hotRatios[0], 0, 'the least memory keeps no neuron');
  t.match(least.unit?.notice, /memory holds the neurons of a hot ratio of 0.00, not of 1.00/);
  const ratios: number[] = [];
  for (let more = 1; more <= 8; more++) {
    const bytes = least.budgetBytes + more * 2 ** 19 + 2 ** 23;
    const found = await greedy(model, { ...request, memory: { kind: 'bytes', bytes } });
    ratios.push(found.unit?.hotRatios[0] ?? -1);
  }
  t.ok(
    ratios.some((ratio) => ratio > 0),
    `more memory, more for the unit: ${ratios}`,
  );
});

t.test('the command line', async (t) => {
  const model = join(scratch, 'demo.pi2');
  const run = (...args: string[]) =>
    runCli('run', '-m', model, '--tokens', '1,420,439', '-n', '20', '--temp', '0', ...args);
  const alone = jsonLines((await run('--json')).stdout);
  t.match(alone.at(-1), { npu: 'none', npu_hot_ratios: null, npu_neurons_per_token: null });
  const { status, stdout, stderr } = await run('--json', '--npu', 'host', '--hot-ratio', '0.5');
  t.equal(status, 0, stderr);
  const hybrid = jsonLines(stdout);
  t.strictSame(
    hybrid.slice(0, -1).map(({ id }) => id),
    alone.slice(0, -1).map(({ id }) => id),
  );
  const report = hybrid.at(-1);
  t.equal(report.npu, 'host');
  t.equal(report.npu_hot_ratios.length, 5);
  t.ok(report.npu_neurons_per_token > 0 && report.npu_wait_share >= 0 && report.npu_idle_share >= 0);
  t.match(
    (await run('--npu', 'host', '--hot-ratio', '1', '-t', '1')).stderr,
    /dense unit +host, hot ratio 1.00 1.00 1.00 1.00 of 1 to 4 tokens/,
  );
  for (const [args, words, expected] of [
    [['--npu', 'hots'], /did you mean host\?/, 2],
    [['--hot-ratio', '0.5'], /--npu auto means that there is none/, 2],
    [['--npu', 'none', '--hot-ratio', '1'], /--npu none means that there is none/, 2],
    [['--npu', 'host', '--hot-ratio', '1.5'], /number from 0 to 1/, 2],
    [['--npu', 'host', '--engine', 'mmap'], /--engine mmap has no dense unit/, 2],
    [['--npu', 'onnxruntime'], /no graphs for ONNX Runtime\n.*convert the checkpoint again with --npu/, 5],
    [['--npu', 'onnxruntime:qnn'], /needs the profile of its device\n.*oneplus-12/, 2],
    [['--npu-profile', 'oneplus-11'], /did you mean oneplus-12\?/, 2],
  ] as const) {
    const refused = await run(...args);
    t.match(refused.stderr, words, args.join(' '));
    t.equal(refused.status, expected, args.join(' '));
  }
  const bench = await runCli(
    'bench',
    '-m',
    model,
    '-p',
    '0',
    '-n',
    '4',
    '-r',
    '1',
    '--npu',
    'none,host',
    '--hot-ratio',
    '0,1',
    '-o',
    'jsonl',
  );
  t.equal(bench.status, 0, bench.stderr);
  const rows = jsonLines(bench.stdout);
  t.strictSame(
    rows.map(({ npu, npu_hot_ratios }) => [npu, npu_hot_ratios?.[0] ?? null]),
    [
      ['none', null],
      ['host', 0],
      ['host', 1],
    ],
  );
  const table = await runCli(
    'bench',
    '-m',
    model,
    '-p',
    '0',
    '-n',
    '2',
    '-r',
    '1',
    '--npu',
    'host',
    '--hot-ratio',
    '1',
  );
  t.match(table.stdout, /\| +npu \| +hot \|/);
  t.match(
    (await runCli('bench', '-m', model, '-n', '2', '-p', '0', '--hot-ratio', '1')).stderr,
    /means that there is none/,
  );
});
