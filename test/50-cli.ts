import {
  cpSync,
  existsSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import t from 'tap';
import { likeliest } from '../src/engine/sampler.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { buildProgram, finish, jsonLines, runCli, startCli } from './support/cli.js';
import { makeModel } from './support/models.js';
import { needsShared, SHARED_MODEL_NAMES, sharedModel } from './support/shared.js';

buildProgram();
const scratch = t.testdir();
const model = await makeModel(scratch, { family: 'llama', context: 200, config: { eos_token_id: [] } });
const moe = await makeModel(scratch, { family: 'turbosparsemixtral', hidden: 192, headDim: 32, neurons: 50 }, 'q4');
const COMMANDS = ['convert', 'run', 'eval', 'perplexity', 'bench', 'inspect', 'verify'];

t.test('help: every command, with examples and exit statuses', async (t) => {
  const help = await runCli('--help');
  t.equal(help.status, 0);
  for (const command of COMMANDS) t.match(help.stdout, new RegExp(`^  ${command} `, 'm'));
  t.match(help.stdout, /Examples:[\s\S]*Exit status:[\s\S]*130/);
  const helps = await Promise.all(COMMANDS.map((command) => runCli(command, '--help')));
  for (const { status, stdout, stderr } of helps) {
    t.equal(status, 0);
    t.equal(stderr, '');
    t.match(stdout, /Usage: powerinfer2 [\s\S]*Examples:[\s\S]*Exit status:/);
    const tooWide = stdout.split('\n').filter((line) => line.length > 120);
    t.strictSame(tooWide, []);
  }
  const run = helps[COMMANDS.indexOf('run')].stdout;
  const letters = ['-m,', '-p,', '-f,', '-n,', '-c,', '-t,', '-s,', '--temp', '--top-k', '--top-p', '--min-p'];
  for (const flag of [
    ...letters,
    '--repeat-penalty',
    '--repeat-last-n',
    '--ignore-eos',
    '--json',
    '--no-report',
    '--cpu',
  ]) {
    t.ok(run.includes(flag), flag);
  }
  const version = await runCli('--version');
  t.match(version, { status: 0, stdout: /^\d+\.\d+\.\d+( \([0-9a-f]{12}\))?\n$/ });
  const nothing = await runCli();
  t.match(nothing, { status: 2, stdout: '', stderr: /Usage: powerinfer2/ });
});

t.test('wrong command lines: one line, the nearest name, status 2', async (t) => {
  const cases: [string[], RegExp][] = [
    [['rnu'], /unknown command 'rnu'\nhint: did you mean run\?/],
    [['run', '-m', 'x', '--tpo-k', '3'], /unknown option '--tpo-k'\nhint: did you mean --top-k\?/],
    [['run', '-p', 'x'], /required option '-m, --model <NAME.pi2>' not specified/],
    [['run', '-m', 'x', '-n', 'many'], /'many' is invalid. Expected a whole number from -1/],
    [['run', '-m', 'x', '--top-p', '1.5'], /Expected a number from 0 to 1/],
    [['run', '-m', 'x', '--tokens', '1,b'], /Expected token ids such as 1,2,3; 'b' is none/],
    [['run', '-m', 'x', '-t', '-1'], /Expected a whole number from 0/],
    [
      ['run', '-m', 'x', '--cpu', 'avx3', '-p', 'x'],
      /Expected one of scalar, neon, avx2, avx512, amx.\nhint: did you mean avx2\?/,
    ],
    [['run', '-m', 'x'], /no prompt is given\nhint: give one of -p/],
    [['run', '-m', 'x', '-p', 'a', '--tokens', '1'], /given more than once/],
    [['inspect', 'a', 'b'], /too many arguments/],
    [['verify'], /missing required argument/],
  ];
  for (const [args, message] of cases) {
    const { status, stdout, stderr } = await runCli(...args);
    t.equal(status, 2, args.join(' '));
    t.equal(stdout, '');
    t.match(stderr, message);
    t.match(stderr, /^error: [^\n]+\n(hint: [^\n]+\n)?$/);
  }
});

t.test('run: stdout is prompt and continuation, stderr the log and the report', async (t) => {
  const args = ['run', '-m', model, '-p', 'the cat', '-n', '12', '--seed', '5'];
  const [first, second, other] = await Promise.all([
    runCli(...args),
    runCli(...args, '-t', '1', '--no-report'),
    runCli(...args.slice(0, -1), '6'),
  ]);
  t.equal(first.status, 0);
  t.ok(first.stdout.startsWith('the cat'));
  t.ok(first.stdout.endsWith('\n'));
  t.match(first.stderr, /prompt +7 tokens[\s\S]*decode +12 tokens[\s\S]*seed +5\n/);
  t.equal(second.stdout, first.stdout, 'same seed, same text, on any number of threads');
  t.notMatch(second.stderr, /decode/);
  t.not(other.stdout, first.stdout);
});

t.test('run --json: a line for each token, then the report', async (t) => {
  const { status, stdout } = await runCli('run', '-m', model, '--tokens', '1,50,60', '-n', '30', '--json', '-c', '64');
  const lines = jsonLines(stdout);
  t.equal(status, 0);
  t.equal(lines.length, 31);
  for (const line of lines.slice(0, -1)) t.match(line, { type: 'token', id: Number, text: String });
  t.match(lines[30], {
    type: 'report',
    prompt_tokens: 3,
    generated_tokens: 30,
    stop_reason: 'length',
    context_length: 64,
  });
  t.ok(Number.isInteger(lines[30].seed), 'the random seed that was used');
  const again = await runCli(
    ...['run', '-m', model, '--tokens', '1,50,60', '-n', '30', '-c', '64', '--no-report'],
    ...['--seed', String(lines[30].seed)],
  );
  const text = lines.slice(0, -1).map((line) => line.text);
  t.equal(again.stdout, `${text.join('')}\n`, 'the same text with that seed; with --tokens no prompt is printed');
});

t.test('run: prompts from files, without their last newline', async (t) => {
  const directory = t.testdir({ prompt: 'the cat\n', empty: '\n', bytes: Buffer.of(0xff, 0xfe) });
  const greedy = ['--temp', '0', '-n', '4', '--no-report'];
  const [file, text] = await Promise.all([
    runCli('run', '-m', model, '-f', join(directory, 'prompt'), ...greedy),
    runCli('run', '-m', model, '-p', 'the cat', ...greedy),
  ]);
  t.equal(file.stdout, text.stdout);
  const cases: [string, number, RegExp][] = [
    ['empty', 2, /the prompt is empty/],
    ['bytes', 3, /not UTF-8/],
    ['none', 5, /no such file/],
  ];
  for (const [name, status, message] of cases) {
    const found = await runCli('run', '-m', model, '-f', join(directory, name));
    t.match(found, { status, stdout: '', stderr: message });
  }
});

t.test('run: prompts that cannot be', async (t) => {
  const cases: [string[], number, RegExp][] = [
    [['-p', ''], 2, /the prompt is empty\nhint/],
    [['--tokens', ''], 2, /the prompt is empty\nhint/],
    [['--tokens', '1,263'], 2, /token 263 \(number 2 of the prompt\) is not in the vocabulary of 263/],
    [['-p', 'the cat', '-c', '7'], 2, /the prompt has 7 tokens, the context 7: no room for an answer\nhint: .* -c/],
  ];
  for (const [args, status, message] of cases) {
    t.match(await runCli('run', '-m', model, ...args), { status, stdout: '', stderr: message }, args.join(' '));
  }
  const full = await runCli('run', '-m', model, '-p', 'the cat', '-c', '9', '--json');
  t.match(full, { status: 0, stderr: /context of 9 tokens is full/ });
  t.match(jsonLines(full.stdout).at(-1), { stop_reason: 'context', generated_tokens: 2 });
});

t.test('run: the end token ends the text, --ignore-eos goes on', async (t) => {
  const args = ['--tokens', '1,50', '--temp', '0', '-n', '8', '--json'];
  const ids = jsonLines((await runCli('run', '-m', model, ...args)).stdout).map((line) => line.id);
  // A twin whose end token is the third that is generated.
  const ending = await makeModel(t.testdir(), { family: 'llama', context: 200, config: { eos_token_id: ids[2] } });
  const stopped = jsonLines((await runCli('run', '-m', ending, ...args)).stdout);
  const first = ids.indexOf(ids[2]);
  t.strictSame(
    stopped.slice(0, -1).map((line) => line.id),
    ids.slice(0, first),
  );
  t.equal(stopped.at(-1).stop_reason, 'end_token');
  const on = jsonLines((await runCli('run', '-m', ending, ...args, '--ignore-eos')).stdout);
  t.strictSame(
    on.map((line) => line.id),
    ids,
  );
});

t.test('run: a model without tokenizer takes tokens and gives tokens', async (t) => {
  const bare = join(t.testdir(), 'bare.pi2');
  cpSync(model, bare, { recursive: true });
  rmSync(join(bare, 'tokenizer.json'));
  t.match(await runCli('run', '-m', bare, '-p', 'x'), { status: 3, stderr: /no tokenizer\.json\nhint: .*--tokens/ });
  const { status, stdout, stderr } = await runCli('run', '-m', bare, '--tokens', '1,50', '-n', '3', '--json');
  t.equal(status, 0);
  t.match(stderr, /tokens are shown without text/);
  t.strictSame(
    jsonLines(stdout).map((line) => line.text),
    ['', '', '', undefined],
  );
});

t.test('run: Ctrl-C and SIGTERM end cleanly with the report, status 130', async (t) => {
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    const child = startCli(['run', '-m', model, '--tokens', '1,50', '-c', '100000', '--json']);
    child.stdout?.once('data', () => child.kill(signal));
    const { status, stdout } = await finish(child);
    t.equal(status, 130);
    const lines = jsonLines(stdout);
    t.match(lines.at(-1), { type: 'report', stop_reason: 'interrupted', generated_tokens: lines.length - 1 });
  }
});

t.test('a reader that goes away ends the program quietly', async (t) => {
  const child = startCli(['run', '-m', model, '--tokens', '1,50', '-c', '100000', '--json']);
  child.stdout?.once('data', () => child.stdout?.destroy());
  const { status, stderr } = await finish(child);
  t.equal(status, 0);
  t.notMatch(stderr, /error|EPIPE/);
});

t.test('so does one that goes away before help is printed', async (t) => {
  for (const args of [['--help'], ['bench', '--help'], ['--version']]) {
    const child = startCli(args);
    child.stdout?.destroy();
    t.match(await finish(child), { status: 0, stderr: '' }, args.join(' '));
  }
});

t.test('eval: the logits of every position, as run sees them', async (t) => {
  const directory = t.testdir();
  const file = join(directory, 'logits.f32');
  const tokens = jsonLines(
    (await runCli('run', '-m', model, '--tokens', '1,50,60', '-n', '150', '--temp', '0', '--json', '--no-report'))
      .stdout,
  ).map((line) => line.id);
  const all = [1, 50, 60, ...tokens];
  const { status, stdout } = await runCli(
    'eval',
    '-m',
    model,
    '--tokens',
    all.join(','),
    '--logits',
    file,
    '--cpu',
    'scalar',
  );
  t.match({ status, stdout }, { status: 0, stdout: '' });
  const bytes = readFileSync(file);
  t.equal(bytes.length, all.length * 263 * 4);
  const logits = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  t.ok(logits.every(Number.isFinite));
  const greedy = all.map((_, i) => likeliest(logits.subarray(i * 263, (i + 1) * 263)));
  t.strictSame(greedy.slice(2, 22), tokens.slice(0, 20));
  t.strictSame(readdirSync(directory), ['logits.f32'], 'nothing else is left');

  const wrong = (...args: string[]) => runCli('eval', '-m', model, '--logits', join(directory, 'x'), ...args);
  t.match(await wrong('--tokens', '1,999'), { status: 2, stderr: /not in the vocabulary/ });
  t.match(await wrong('--tokens', '1,2,3', '-c', '2'), { status: 2, stderr: /3 tokens do not fit the context of 2/ });
  const nowhere = await runCli('eval', '-m', model, '--tokens', '1', '--logits', join(directory, 'no', 'x'));
  t.match(nowhere, { status: 5, stderr: /cannot write .*no such file or directory/ });
  t.match(await runCli('eval', '-m', model, '--tokens', '1', '--logits', directory), {
    status: 5,
    stderr: /not a file/,
  });
  t.notOk(existsSync(join(directory, 'x')));
});

t.test('perplexity: agrees with the logits of eval', async (t) => {
  const directory = t.testdir({ text: 'the cat and the hat. é', one: 'a', bare: '' });
  const file = join(directory, 'text');
  const { status, stdout } = await runCli('perplexity', '-m', model, '-f', file, '-c', '9', '--json');
  const [result] = jsonLines(stdout);
  t.equal(status, 0);
  const tokenizerText = readFileSync(file, 'utf8');
  const ids = jsonLines((await runCli('run', '-m', model, '-p', tokenizerText, '-n', '0', '--json')).stdout)[0]
    .prompt_tokens;
  t.match(result, { type: 'perplexity', tokens: ids - 1, windows: Math.ceil((ids - 1) / 8), bos_token_id: 1 });
  t.ok(Math.abs(Math.exp(result.nll_per_token) - result.ppl) < 1e-9);
  const plain = await runCli('perplexity', '-m', model, '-f', file, '-c', '9');
  t.equal(plain.stdout.split(',')[0], `ppl ${result.ppl.toFixed(4)}`);
  const one = jsonLines((await runCli('perplexity', '-m', model, '-f', join(directory, 'one'), '--json')).stdout)[0];
  t.match(one, { tokens: 1, context_length: 200 });
  const logitsFile = join(directory, 'logits');
  await runCli('eval', '-m', model, '--tokens', '1', '--logits', logitsFile);
  const bytes = readFileSync(logitsFile);
  const logits = [...new Float32Array(bytes.buffer, bytes.byteOffset, 263)];
  const sum = Math.log(logits.reduce((total, logit) => total + Math.exp(logit), 0));
  const nlls = logits.map((logit) => sum - logit);
  t.ok(
    nlls.some((nll) => Math.abs(nll - one.nll_per_token) < 1e-6),
    'the first token behind BOS',
  );
  t.match(await runCli('perplexity', '-m', model, '-f', join(directory, 'bare')), { status: 3, stderr: /too short/ });
  t.match(await runCli('perplexity', '-m', model, '-f', file, '-c', '1'), { status: 2, stderr: /give -c 2 or more/ });
});

t.test('inspect: shape, sizes, layout and provenance, in words and as JSON', async (t) => {
  const words = await runCli('inspect', moe);
  t.equal(words.status, 0);
  t.match(words.stdout, /4 experts, 2 a token, each of 50 neurons, drelu/);
  t.match(words.stdout, /ffn .*bits a weight[\s\S]*total .* 100\.0 %[\s\S]*sha256 [0-9a-f]{64}/);
  const [found] = jsonLines((await runCli('inspect', moe, '--json')).stdout);
  const { manifest } = await openModelDirectory(moe);
  t.match(found, { type: 'model', name: manifest.name, hyperparameters: manifest.hyperparameters });
  const shares = found.parts.reduce((sum: number, part: { share: number }) => sum + part.share, 0);
  t.ok(Math.abs(shares - 1) < 1e-9);
  const ffn = found.parts.find((part: { part: string }) => part.part === 'ffn');
  t.equal(ffn.weights, 2 * 4 * 50 * 3 * 192);
  t.equal(ffn.bits_per_weight, (8 * ffn.bytes) / ffn.weights);
});

t.test('verify: every flipped byte is found and named, status 1', async (t) => {
  t.match(await runCli('verify', moe), { status: 0, stdout: /^ok: 8 extents/ });
  const { manifest, extent, expertOffset } = await openModelDirectory(moe).then((opened) => ({
    manifest: opened.manifest,
    extent: opened.extent.bind(opened),
    expertOffset: opened.expertOffset.bind(opened),
  }));
  const { layout } = manifest;
  const neuron = 40;
  const unit = Math.floor(neuron / layout.neurons_per_unit) * layout.unit_bytes;
  const slot = neuron % layout.neurons_per_unit;
  const part2 = expertOffset(1, 2) + unit + layout.part2_offset + slot * layout.part2_stride;
  const attention = extent('layers.0.attention');
  const cases: [string, number, object, RegExp][] = [
    [
      'resident.bin',
      attention.offset + 99,
      { extent: 'layers.0.attention' },
      /checksum is [0-9a-f]{8}, the manifest says/,
    ],
    [
      'resident.bin',
      attention.offset + attention.bytes,
      { extent: 'layers.0.attention' },
      /padding behind it is not zero/,
    ],
    ['neurons.bin', part2, { extent: 'layers.1.neurons' }, /expert 2, neuron 40, part 2: wrong checksum/],
    ['neurons.bin', expertOffset(1, 1) - 1, { extent: 'layers.1.neurons' }, /expert 0, unit \d+: padding is not zero/],
    ['resident.bin', extent('layers.1.checksums').offset, { extent: 'layers.1.checksums' }, /checksum is/],
  ];
  const copy = join(t.testdir(), 'copy.pi2');
  cpSync(moe, copy, { recursive: true });
  for (const [file, offset, expected, problem] of cases) {
    flipByte(join(copy, file), offset);
    const { status, stdout } = await runCli('verify', copy, '--json');
    const lines = jsonLines(stdout);
    t.equal(status, 1);
    t.match(lines.at(-1), { type: 'verify', ok: false });
    const wrong = lines.find((line) => line.extent === (expected as { extent: string }).extent);
    t.ok(
      wrong?.problems.some((words: string) => problem.test(words)),
      `${JSON.stringify(lines)} has ${problem}`,
    );
    flipByte(join(copy, file), offset);
  }
  t.equal((await runCli('verify', copy)).status, 0, 'flipped back');
  flipByte(join(copy, 'neurons.bin'), part2);
  const words = await runCli('verify', copy);
  t.match(words, { status: 1, stdout: /wrong: layers\.1\.neurons \(neurons\.bin\)\n[\s\S]*1 of 8 extents are wrong/ });
  const refused = await runCli('run', '-m', copy, '--tokens', '1', '-n', '1');
  t.match(refused, { status: 4, stdout: '', stderr: /layers\.1\.neurons[\s\S]*hint: .*verify/ });
});

t.test('damaged model directories: one line, status 4, a stack only with --verbose', async (t) => {
  const copy = join(t.testdir(), 'copy.pi2');
  cpSync(model, copy, { recursive: true });
  const file = join(copy, 'model.json');
  const manifest = JSON.parse(readFileSync(file, 'utf8'));
  writeFileSync(file, JSON.stringify({ ...manifest, format: { name: 'pi2', version: 2 } }));
  const newer = await runCli('inspect', copy);
  t.match(newer, { status: 4, stderr: /^error: .*newer powerinfer2: format 2, this one reads 1\nhint: [^\n]+\n$/ });
  writeFileSync(file, '{');
  t.match(await runCli('run', '-m', copy, '-p', 'x'), {
    status: 4,
    stderr: /^error: .*not JSON[^\n]*\nhint: [^\n]+\n$/,
  });
  t.match((await runCli('inspect', copy, '--verbose')).stderr, /\n +at /);
  writeFileSync(file, JSON.stringify(manifest));
  truncateSync(join(copy, 'neurons.bin'), 4096);
  t.match(await runCli('verify', copy), { status: 4, stderr: /neurons\.bin is cut off: 4096 bytes, expected/ });
  t.match(await runCli('inspect', join(copy, 'none')), { status: 5, stderr: /no such file/ });
});

for (const name of SHARED_MODEL_NAMES) {
  t.test(`${name}: text, greedy continuation and logits are the reference's`, needsShared(name), async (t) => {
    const checkpoint = sharedModel(name) as string;
    const directory = t.testdir();
    const converted = join(directory, `${name}.pi2`);
    await runCli('convert', checkpoint, '-o', converted, '--quant', 'f16');
    const reference = JSON.parse(readFileSync(join(checkpoint, 'reference', 'cases.json'), 'utf8'));
    for (const { prompt, greedy_ids, greedy_text, greedy_top1_top2_gap } of reference.cases.slice(0, 3)) {
      const args = ['--temp', '0', '-n', '64', '--ignore-eos', '--json', '--no-report'];
      const lines = jsonLines((await runCli('run', '-m', converted, '-p', prompt, ...args)).stdout);
      const differs = lines.findIndex((line, i) => line.id !== greedy_ids[i]);
      if (differs < 0) t.equal(lines.map((line) => line.text).join(''), greedy_text);
      else t.ok(greedy_top1_top2_gap[differs] < 0.05, `token ${differs} differs only where two are nearly equal`);
    }
    const [first] = reference.cases;
    const file = join(directory, 'logits');
    await runCli('eval', '-m', converted, '--tokens', first.ids.join(','), '--logits', file);
    const expected = floats(join(checkpoint, 'reference', 'logits.f32'));
    const found = floats(file);
    t.equal(found.length, expected.length);
    const worst = found.reduce((most, value, i) => Math.max(most, Math.abs(value - expected[i])), 0);
    t.ok(worst < 2e-2, `largest difference ${worst}`);
  });
}

function floats(file: string): Float32Array {
  const bytes = readFileSync(file);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
}

function flipByte(file: string, offset: number): void {
  const byte = readFileSync(file)[offset] ^ 0xff;
  writeSync(openSync(file, 'r+'), Buffer.of(byte), 0, 1, offset);
}
