// `run --n-parallel` and `run --best-of`: what is printed, by seed, and command lines that cannot be.
import { join } from 'node:path';
import t from 'tap';
import { Engine } from '../src/engine/engine.js';
import { negativeLogLikelihood } from '../src/engine/evaluate.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { buildProgram, jsonLines, runCli } from './support/cli.js';
import { makeModel } from './support/models.js';

buildProgram();
const scratch = t.testdir();
const checkpoint = {
  family: 'bamboo',
  neurons: 300,
  context: 200,
  config: { eos_token_id: [9, 60, 61, 62, 63] },
} as const;
const model = await makeModel(join(scratch, 'model'), checkpoint, 'q4');
const PROMPT = ['-m', model, '-t', '2', '--temp', '1.2'];
// biome-ignore lint/suspicious/noExplicitAny: tests look into what they expect.
type Json = any;

async function json(...args: string[]): Promise<{ tokens: Json[]; report: Json }> {
  const { status, stdout, stderr } = await runCli('run', ...PROMPT, ...args, '--json');
  t.equal(status, 0, stderr);
  const lines = jsonLines(stdout);
  return { tokens: lines.slice(0, -1), report: lines.at(-1) };
}

const idsOf = (tokens: Json[], continuation: number) =>
  tokens.filter((token) => token.continuation === continuation).map(({ id }) => id);

t.test('each continuation is that of its seed alone, whatever is beside it', async (t) => {
  const args = ['--tokens', '1,50,7', '-n', '25'];
  const { tokens, report } = await json(...args, '--seed', '40', '-np', '4');
  t.match(report, { seed: 40, best_continuation: null, prompt_tokens: 3, live_batch_sizes: Array });
  t.strictSame(
    report.continuations.map(({ seed }: Json) => seed),
    [40, 41, 42, 43],
  );
  t.equal(report.generated_tokens, tokens.length);
  let steps = 0;
  for (const size of report.live_batch_sizes) steps += size.sequences * size.steps;
  t.ok(steps >= tokens.length - 4, 'each token behind the first is of a step');
  for (const k of [0, 1, 2, 3]) {
    const alone = await json(...args, '--seed', String(40 + k));
    t.strictSame(
      idsOf(tokens, k),
      alone.tokens.map(({ id }) => id),
    );
    const { generated_tokens, stop_reason, mean_log_probability } = report.continuations[k];
    t.equal(generated_tokens, alone.tokens.length);
    t.equal(stop_reason, alone.report.stop_reason);
    t.equal(mean_log_probability, null);
    t.equal(alone.report.continuations, null);
  }
  const two = await json(...args, '--seed', '42', '--n-parallel', '2');
  t.strictSame(idsOf(two.tokens, 0), idsOf(tokens, 2), 'other numbers beside it');
  const streamed = await json(...args, '--seed', '40', '-np', '4', '--memory', 'min', '-t', '1');
  t.strictSame(
    [0, 1, 2, 3].map((k) => idsOf(streamed.tokens, k)),
    [0, 1, 2, 3].map((k) => idsOf(tokens, k)),
    'streamed, with a batch of one',
  );
});

t.test('--best-of prints the one with the largest mean log-probability', async (t) => {
  const args = ['--tokens', '1,50,7', '-n', '20', '--seed', '40', '--repeat-penalty', '1.2'];
  const { tokens, report } = await json(...args, '--best-of', '4');
  const all = await json(...args, '--n-parallel', '4');
  const best = report.best_continuation;
  t.strictSame(idsOf(tokens, best), idsOf(all.tokens, best));
  t.equal(tokens.length, idsOf(tokens, best).length, 'nothing else is printed');
  const engine = await Engine.open(await openModelDirectory(model), { context: 0, threads: 2 });
  t.teardown(() => engine.close());
  const logits = new Float32Array(engine.vocabSize);
  const scores: number[] = [];
  for (const k of [0, 1, 2, 3]) {
    const ids = idsOf(all.tokens, k);
    let sum = 0;
    await engine.step(Int32Array.of(1, 50, 7), 0, logits, { exact: true, prompt: true });
    for (const [i, id] of ids.entries()) {
      sum -= negativeLogLikelihood(logits, id);
      await engine.step(Int32Array.of(id), 3 + i, logits);
    }
    scores.push(sum / ids.length);
    t.equal(report.continuations[k].mean_log_probability, scores[k], `log-probability of continuation ${k}`);
  }
  t.equal(best, scores.indexOf(Math.max(...scores)));
  t.equal(report.stop_reason, report.continuations[best].stop_reason);
});

t.test('text: one below another, the best alone', async (t) => {
  const args = [...PROMPT, '-p', 'Hi you', '-n', '12', '--seed', '5'];
  const texts: string[] = [];
  for (const k of [0, 1, 2]) {
    texts.push((await runCli('run', ...args, '--seed', String(5 + k), '--no-report')).stdout);
  }
  const all = await runCli('run', ...args, '--n-parallel', '3');
  const expected = texts.map((text, k) => `--- continuation ${k + 1} of 3, seed ${5 + k}\n${text}`).join('');
  t.equal(all.stdout, expected);
  t.match(
    all.stderr,
    /decode +\d+ tokens, [\d.]+ tokens\/s\n +live sequences +\d+ steps of 3[\s\S]*continuation 3 +seed 7, \d+ tokens/,
  );
  const best = await runCli('run', ...args, '--best-of', '3');
  const chosen = /continuation (\d) .*log-probability -\d+\.\d+ a token.*the best/.exec(best.stderr);
  t.equal(best.stdout, texts[Number(chosen?.[1]) - 1]);
  const one = await runCli('run', ...args, '--n-parallel', '1', '--no-report');
  t.equal(one.stdout, texts[0], 'one is an ordinary run');
});

t.test('the context is shared out; what cannot be is refused', async (t) => {
  const args = ['--tokens', '1,50,7', '--ignore-eos', '--seed', '1'];
  const { report } = await json(...args, '-c', '24', '-np', '5');
  for (const { generated_tokens, stop_reason } of report.continuations) {
    t.strictSame([generated_tokens, stop_reason], [4, 'context'], '(24 - 3) / 5 positions each');
  }
  const cases: [string[], number, RegExp][] = [
    [
      ['--n-parallel', '2', '--best-of', '2'],
      2,
      /--n-parallel and --best-of exclude each other\nhint: --best-of prints one/,
    ],
    [['--n-parallel', '0'], 2, /Expected a whole number from 1 to 64/],
    [['--best-of', 'x'], 2, /Expected a whole number from 1 to 64/],
    [['--best-of', '2', '-n', '0'], 2, /generates nothing/],
    [
      ['-np', '8', '-c', '10'],
      2,
      /prompt has 3 tokens, the context 10: no room for 8 continuations\nhint: ask for fewer/,
    ],
    [['-np', '2', '--measure-recall'], 2, /follows one continuation/],
  ];
  for (const [more, status, message] of cases) {
    const result = await runCli('run', ...PROMPT, '--tokens', '1,50,7', ...more);
    t.match(result, { status, stdout: '', stderr: message }, more.join(' '));
  }
});
