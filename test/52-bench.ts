// `powerinfer2 bench`: its forms, what it measures, and wrong command lines. The roofline of `run` is here too.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { convert } from '../converter/convert.js';
import { joinCounters, type PromptSource, TestRunner, testName, testPositions } from '../src/bench/runner.js';
import type { SequenceRun } from '../src/engine/contract.js';
import type { EngineCounters } from '../src/engine/counters.js';
import { Engine, type StepOptions } from '../src/engine/engine.js';
import { seededRandom } from '../src/engine/random.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { buildProgram, finish, jsonLines, runCli, startCli } from './support/cli.js';
import { makeModel } from './support/models.js';
import { REPOSITORY } from './support/shared.js';

buildProgram();
const scratch = t.testdir();
const model = join(scratch, 'demo.pi2');
await convert(
  {
    checkpoint: join(REPOSITORY, 'demo', 'stories-drelu'),
    output: model,
    quantization: 'q4',
    maxMemoryBytes: 2 ** 30,
    force: false,
  },
  () => {},
  new AbortController().signal,
);
const other = await makeModel(scratch, { family: 'llama', context: 200 });
const QUICK = ['-p', '16', '-n', '4', '-r', '2', '-t', '1'];

t.test('jsonl: llama-bench’s fields, then ours, all of them numbers where they should be', async (t) => {
  const { status, stdout, stderr } = await runCli('bench', '-m', model, ...QUICK, '-o', 'jsonl');
  t.match({ status, stderr }, { status: 0, stderr: '' });
  const [prompt, decode, ...more] = jsonLines(stdout);
  t.strictSame(more, []);
  t.match(prompt, { n_prompt: 16, n_gen: 0, n_depth: 0, token_latency_ms_mean: null });
  t.match(decode, { n_prompt: 0, n_gen: 4, n_depth: 0, token_latency_ms_mean: Number });
  for (const row of [prompt, decode]) {
    t.match(row, {
      build_commit: String,
      build_version: /^\d+\.\d+\.\d+$/,
      cpu_info: String,
      gpu_info: '',
      backends: 'CPU',
      model_filename: model,
      model_type: /^bamboo \d+[MB] q4$/,
      model_size: Number,
      model_n_params: Number,
      n_batch: Number,
      n_threads: 1,
      test_time: /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/,
      kernel_set: String,
      engine: 'pi2',
      predicted: false,
      load_mode: 'resident',
      cache_bytes: null,
      hit_share: null,
      peak_memory_bytes: Number,
      weight_bytes_per_token: Number,
      kv_bytes_per_token: Number,
      memory_bytes_per_second: Number,
      memory_bandwidth_bytes_per_second: Number,
      flash_bytes_per_second: null,
      flash_bandwidth_share: null,
    });
    t.equal(row.samples_ns.length, 2);
    const mean = (sample: number[]) => sample.reduce((sum, value) => sum + value, 0) / sample.length;
    t.equal(row.avg_ns, Math.round(mean(row.samples_ns)));
    t.ok(Math.abs(row.avg_ts - mean(row.samples_ts)) < 1e-6);
    t.ok(Math.abs(row.stddev_ts - Math.abs(row.samples_ts[0] - row.samples_ts[1]) / Math.SQRT2) < 1e-6);
    const tokens = row.n_prompt + row.n_gen;
    row.samples_ns.forEach((ns: number, i: number) => {
      t.ok(Math.abs(row.samples_ts[i] / ((1e9 * tokens) / ns) - 1) < 1e-3);
    });
    t.ok(row.memory_bandwidth_share > 0 && row.memory_bandwidth_share < 2);
  }
});

t.test('json is one array, csv a table of the same values, md a table for people', async (t) => {
  const bench = async (output: string) => (await runCli('bench', '-m', model, ...QUICK, '-o', output)).stdout;
  const [json, csv, md] = await Promise.all(['json', 'csv', 'md'].map(bench));
  const rows = JSON.parse(json);
  t.equal(rows.length, 2);
  const [header, ...lines] = csv.trimEnd().split('\n');
  const names = header.split(',');
  t.strictSame(
    names,
    Object.keys(rows[0]).filter((name) => !name.startsWith('samples_')),
  );
  t.equal(lines.length, 2);
  for (const [i, line] of lines.entries()) {
    const values = JSON.parse(
      `[${line.replaceAll('""', '\\"')}]`.replaceAll('\\",', '"",').replaceAll(',\\"]', ',""]'),
    );
    t.equal(values.length, names.length);
    for (const name of ['n_prompt', 'n_gen', 'model_size', 'model_filename', 'load_mode']) {
      t.equal(values[names.indexOf(name)], String(rows[i][name]), name);
    }
  }
  const table = md.split('\n');
  const cells = (line: string) =>
    line
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim());
  t.strictSame(cells(table[0]).slice(0, 7), ['model', 'size', 'params', 'backend', 'threads', 'test', 't/s']);
  for (const rule of cells(table[1])) t.match(rule, /^-+:?$/);
  const [pp, tg] = [cells(table[2]), cells(table[3])];
  t.equal(pp.length, cells(table[0]).length);
  t.match(pp.slice(3, 7), ['CPU', '1', 'pp16', /^\d+\.\d\d ± \d+\.\d\d$/]);
  t.equal(pp.at(-1), 'resident');
  t.equal(tg[5], 'tg4');
  t.match(md, /\nroofline pp16: [\d.]+ of [\d.]+ GB\/s memory \(\d+ %\)\nroofline tg4: .*\nbuild: \w+ \(\d/);
});

t.test('lists run the product of their values, each on an engine of its own', async (t) => {
  const lists = ['-m', `${model},${other}`, '-p', '8,16', '-n', '0', '-n', '4', '-t', '1,2', '-d', '0,8'];
  const { stdout } = await runCli('bench', ...lists, '-pg', '8,4', '-r', '1', '--no-warmup', '-o', 'jsonl');
  const rows = jsonLines(stdout);
  t.equal(rows.length, 2 * 2 * 2 * 4);
  const keys = rows.map((row) => [row.model_filename, row.n_threads, row.n_depth, row.n_prompt, row.n_gen].join(' '));
  t.equal(new Set(keys).size, rows.length, 'no two are the same');
  t.ok(keys.includes(`${other} 2 8 8 4`));
  t.strictSame(
    rows.slice(0, 4).map((row) => [row.n_prompt, row.n_gen]),
    [
      [8, 0],
      [16, 0],
      [0, 4],
      [8, 4],
    ],
  );
});

t.test('budgets: what is streamed is counted, and the budget is kept', async (t) => {
  const options = ['-p', '8', '-n', '8', '-r', '2', '-t', '1', '--memory', 'min,1G', '--exact', '0,1'];
  const { status, stdout } = await runCli('bench', '-m', model, ...options, '-o', 'jsonl');
  t.equal(status, 0);
  const rows = jsonLines(stdout);
  t.equal(rows.length, 8);
  for (const row of rows) {
    if (row.memory === '1G') {
      t.match(row, { load_mode: 'resident', memory_budget_bytes: 2 ** 30, flash_reads_per_token: null });
      continue;
    }
    t.match(row, {
      memory: 'min',
      load_mode: /^(direct|buffered)$/,
      cache_bytes: Number,
      hit_share: Number,
      flash_read_bytes_per_token: Number,
      stall_share: Number,
      flash_bytes_per_second: Number,
      flash_bandwidth_bytes_per_second: Number,
      flash_bandwidth_share: Number,
    });
    t.ok(row.flash_read_bytes_per_token > 0);
    t.ok(row.peak_memory_bytes <= row.memory_budget_bytes, 'the peak is this test’s alone');
  }
  const table = await runCli('bench', '-m', model, ...options.slice(0, -2), '-o', 'md');
  t.match(table.stdout, /\| +memory \| +test \|[\s\S]*\| +min \| +pp8 \|[\s\S]*GB\/s flash/);
  const both = await runCli('bench', '-m', model, '-p', '8', '-n', '0', '-r', '1', '--memory', '1G,1M', '-o', 'json');
  t.match(both, { status: 5, stderr: /^error: .*take \d+M[\s\S]*hint: / });
  t.equal(JSON.parse(both.stdout).length, 1, 'what was measured before is there, and the array is whole');
});

t.test('-npl: several sequences decoded together', async (t) => {
  const options = ['-m', model, '-p', '8', '-n', '6', '-npl', '1,3', '-r', '1', '-t', '1'];
  const rows = jsonLines((await runCli('bench', ...options, '-o', 'jsonl')).stdout);
  t.strictSame(
    rows.map(({ n_prompt, n_gen, n_pl }) => [n_prompt, n_gen, n_pl]),
    [
      [8, 0, 1],
      [8, 0, 3],
      [0, 6, 1],
      [0, 6, 3],
    ],
  );
  for (const { samples_ns, samples_ts, n_prompt, n_gen, n_pl } of rows) {
    t.ok(Math.abs((samples_ts[0] * samples_ns[0]) / 1e9 - n_pl * (n_prompt + n_gen)) < 0.01, 'tokens of all sequences');
  }
  const table = await runCli('bench', ...options);
  t.match(table.stdout, /\| +n_pl \| +test \|[\s\S]*\| +3 \| +tg6 \|/);
});

t.test('prompts from a text', async (t) => {
  const file = join(scratch, 'text');
  writeFileSync(file, 'a text of some length');
  const options = ['-p', '8', '-n', '0', '-r', '1', '-t', '1', '-f', file, '-o', 'jsonl'];
  t.equal(jsonLines((await runCli('bench', '-m', model, ...options)).stdout).length, 1);
  const short = await runCli('bench', '-m', model, ...options, '-d', '100');
  t.match(short, { status: 2, stderr: /the text has \d+ tokens, pp8 @ d100 takes 108\nhint: / });
});

t.test('wrong command lines', async (t) => {
  const cases: [string[], RegExp][] = [
    [['-p', '16'], /required option '-m, --model <NAME.pi2>' not specified/],
    [['-m', model, '--repetitoins', '3'], /unknown option '--repetitoins'\nhint: did you mean --repetitions\?/],
    [['-m', model, '-p', '16,x'], /Expected a whole number from 0/],
    [['-m', model, '-p', ''], /Expected a whole number from 0/],
    [['-m', model, '-r', '0'], /Expected a whole number from 1/],
    [['-m', model, '-t', '1,-1'], /Expected a whole number from 0 to/],
    [['-m', model, '-o', 'yaml'], /Expected one of md, csv, json, jsonl/],
    [['-m', model, '-o', 'cvs'], /hint: did you mean csv\?/],
    [['-m', model, '-npl', '0'], /Expected a whole number from 1 to 64/],
    [['-m', model, '-pg', '16'], /Expected two numbers: 512,128/],
    [['-m', model, '--exact', '2'], /Expected 0, 1 or 0,1/],
    [['-m', model, '--memory', '1G,lots'], /"lots" is no amount of memory/],
    [['-m', model, '-p', '0', '-n', '0'], /there is nothing to measure\nhint: give -p, -n or --pg/],
  ];
  for (const [args, message] of cases) {
    const { status, stdout, stderr } = await runCli('bench', ...args);
    t.match({ status, stdout }, { status: 2, stdout: '' }, args.join(' '));
    t.match(stderr, message);
  }
  t.match(await runCli('bench', '-m', join(scratch, 'none')), { status: 5, stdout: '', stderr: /no such file/ });
});

t.test('Ctrl-C ends it with what was measured, status 130', async (t) => {
  const child = startCli(['bench', '-m', model, '-p', '8', '-n', '100000', '-r', '1', '-o', 'json']);
  let seen = '';
  child.stdout?.on('data', (piece) => {
    seen += piece;
    if (seen.includes('"n_prompt": 8')) child.kill('SIGINT');
  });
  const { status, stdout } = await finish(child);
  t.equal(status, 130);
  t.equal(JSON.parse(stdout).length, 1);
});

t.test('a run: depth is not timed, tokens are the model’s own and the same each time', async (t) => {
  const engine = await Engine.open(await openModelDirectory(model), { context: 64, threads: 1 });
  t.teardown(() => engine.close());
  const steps: { tokens: number[]; position: number; options: StepOptions | undefined }[] = [];
  const watched = {
    contextLength: 64,
    vocabSize: engine.vocabSize,
    batchSize: 4,
    counters: () => engine.counters(),
    sequences: 1,
    stepRuns: (
      tokens: Int32Array,
      runs: readonly SequenceRun[],
      logits: Float32Array,
      options?: StepOptions,
    ): Promise<void> => {
      steps.push({ tokens: [...tokens], position: runs[0].position, options });
      return engine.stepRuns(tokens, runs, logits, options);
    },
    fork: () => t.fail('nothing is forked'),
    release: () => t.fail('nothing is released'),
  };
  const prompts: PromptSource = (count) => Array.from({ length: count }, (_, i) => i + 5);
  const test = { promptTokens: 6, generatedTokens: 3, depth: 5, sequences: 1 };
  t.equal(testName(test), 'pp6+tg3 @ d5');
  t.equal(testPositions(test), 14);
  const runOnce = () => new TestRunner(watched, prompts, seededRandom(7)).run(test);
  const sample = await runOnce();
  t.strictSame(
    steps.map(({ tokens, position, options }) => [position, tokens.length, options?.exact, options?.prompt]),
    [
      [0, 4, true, true],
      [4, 1, true, true],
      [5, 4, true, true],
      [9, 2, true, true],
      [11, 1, false, false],
      [12, 1, false, false],
      [13, 1, false, false],
    ],
  );
  t.strictSame(
    steps.slice(0, 4).flatMap(({ tokens }) => tokens),
    prompts(11),
  );
  t.equal(sample?.latenciesMs.length, 3);
  t.equal((sample?.after.tokens ?? 0) - (sample?.before.tokens ?? 0), 9, 'what fills the depth is not counted');
  const first = steps.splice(0).slice(4);
  await runOnce();
  t.strictSame(steps.slice(4), first, 'the same seed, the same tokens');
  const aborted = new AbortController();
  aborted.abort();
  t.equal(await new TestRunner(watched, prompts, seededRandom(7)).run(test, aborted.signal), null);
});

t.test('counters of samples are added up, what lies between them left out', async (t) => {
  const state = (tokens: number) =>
    ({ tokens, weightBytes: 9, stream: { reads: 2 * tokens, storage: 'direct' } }) as unknown as EngineCounters;
  const sample = (from: number, to: number) => ({ ms: 1, latenciesMs: [], before: state(from), after: state(to) });
  const { before, after } = joinCounters([sample(10, 13), sample(20, 24)]);
  t.strictSame(before, state(10));
  t.strictSame(after, state(17));
});

t.test('run reports what was moved against what memory and flash give', async (t) => {
  const args = ['run', '-m', model, '--tokens', '1,50', '-n', '8', '-t', '1', '--json'];
  const [whole, streamed, one] = await Promise.all([
    runCli(...args),
    runCli(...args, '--memory', 'min'),
    runCli(...args, '-n', '1'),
  ]);
  const keys = { memory_bytes_per_second: Number, memory_bandwidth_bytes_per_second: Number };
  t.match(jsonLines(whole.stdout).at(-1), { ...keys, flash_bandwidth_bytes_per_second: null });
  t.match(jsonLines(streamed.stdout).at(-1), { ...keys, flash_bandwidth_share: Number });
  t.match(jsonLines(one.stdout).at(-1), { memory_bytes_per_second: null, memory_bandwidth_share: null });
});
