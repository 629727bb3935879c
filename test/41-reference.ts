// The engine against references computed by PyTorch on trained checkpoints: the project's own (demo/stories-drelu) always, those
// beside the repository where they are.
import { spawn } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import t, { type Test } from 'tap';
import { convert } from '../converter/convert.js';
import { loadAddon } from '../src/engine/addon.js';
import { Engine } from '../src/engine/engine.js';
import { cutWindows, evaluateSequence, measurePerplexity, negativeLogLikelihood } from '../src/engine/evaluate.js';
import { Generation } from '../src/engine/generate.js';
import { seededRandom } from '../src/engine/random.js';
import { likeliest, SAMPLING_DEFAULTS } from '../src/engine/sampler.js';
import { QUANTIZATIONS, type QuantizationName } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { TextTokenizer } from '../src/text/tokenizer.js';
import { compileProgram } from './support/compiled.js';
import { needsShared, REPOSITORY, SHARED_MODEL_NAMES, type SharedModel, sharedModel } from './support/shared.js';

/** What a quantized model may lose of perplexity. */
const LOSS_MOST = { q8: 0.005, q4: 0.04 };
/** Keys and values are half floats: logits move that much. Found: up to 0.0035. */
const LOGITS_MOST = 0.01;
/** Two logits as near as this may change places. */
const NEAR_TIE = 0.05;
const CONTEXT = 256;

/** The parts of `cases.json` that are compared. */
interface Cases {
  cases: {
    prompt: string;
    ids: number[];
    top10_ids: number[];
    top10_logits: number[];
    greedy_ids: number[];
    greedy_top1_top2_gap: number[];
  }[];
  /** `counts[layer][position]`: neurons that fired. */
  active_neurons?: { ids: number[]; counts: number[][] };
}

/** A trained checkpoint and the directory of its references. */
interface Trained {
  checkpoint: string;
  references: string;
}

const own: Trained = {
  checkpoint: join(REPOSITORY, 'demo/stories-drelu'),
  references: join(REPOSITORY, 'test/fixtures/stories-drelu'),
};

function trained(name: SharedModel): Trained {
  if (name === 'stories-drelu') return own;
  const checkpoint = sharedModel(name) as string;
  return { checkpoint, references: join(checkpoint, 'reference') };
}

const scratch = t.testdir({});
const converted = new Map<string, Promise<string>>();

/** Converts a checkpoint, once. */
function modelOf(checkpoint: string, quantization: QuantizationName): Promise<string> {
  const output = join(scratch, `${basename(checkpoint)}-${quantization}.pi2`);
  const request = { checkpoint, output, quantization, maxMemoryBytes: 2 ** 30, force: false };
  const directory =
    converted.get(output) ?? convert(request, () => undefined, new AbortController().signal).then(() => output);
  converted.set(output, directory);
  return directory;
}

async function open(t: Test, directory: string, context = 0): Promise<Engine> {
  const engine = await Engine.open(await openModelDirectory(directory), { context, threads: 2 });
  t.teardown(() => engine.close());
  return engine;
}

const readJson = (file: string) => JSON.parse(readFileSync(file, 'utf8'));

function readFloats(file: string): Float32Array {
  const bytes = readFileSync(file);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
}

async function logitsOf(engine: Engine, tokens: readonly number[]): Promise<Float32Array> {
  const logits = new Float32Array(tokens.length * engine.vocabSize);
  await evaluateSequence(engine, tokens, (rows, first) => logits.set(rows, first * engine.vocabSize));
  return logits;
}

async function generate(engine: Engine, prompt: number[], count: number, temperature: number): Promise<number[]> {
  const sampling = { ...SAMPLING_DEFAULTS, temperature, topK: 0, topP: 1, minP: 0 };
  const random = seededRandom(prompt.length);
  const generation = new Generation(engine, { prompt, maxTokens: count, sampling, random, endTokens: [] });
  const tokens: number[] = [];
  for await (const token of generation.tokens()) tokens.push(token);
  return tokens;
}

/** Logits, continuations and firing neurons of the f16 model are the reference's. */
async function compareWithReference(t: Test, { checkpoint, references }: Trained): Promise<void> {
  const engine = await open(t, await modelOf(checkpoint, 'f16'));
  const { cases, active_neurons }: Cases = readJson(join(references, 'cases.json'));
  const expected = readFloats(join(references, 'logits.f32'));
  const found = await logitsOf(engine, cases[0].ids);
  const errors = found.map((logit, i) => Math.abs(logit - expected[i]));
  const worst = errors.reduce((a, b) => Math.max(a, b));
  t.equal(found.length, expected.length);
  t.ok(worst < LOGITS_MOST, `logits of all positions: ${worst}`);

  const tokenizer = await TextTokenizer.open(
    (await openModelDirectory(await modelOf(checkpoint, 'f16'))).tokenizerPaths,
  );
  for (const { prompt, ids, top10_ids, top10_logits, greedy_ids, greedy_top1_top2_gap } of cases) {
    t.same(tokenizer.encode(prompt), ids, JSON.stringify(prompt));
    const last = (await logitsOf(engine, ids)).slice(-engine.vocabSize);
    const top10 = top10_ids.map((id, i) => Math.abs(last[id] - top10_logits[i]));
    t.ok(Math.max(...top10) < LOGITS_MOST, `top 10: ${Math.max(...top10)}`);
    const tokens = await generate(engine, ids, greedy_ids.length, 0);
    const fork = tokens.findIndex((token, i) => token !== greedy_ids[i]);
    t.ok(
      fork < 0 || greedy_top1_top2_gap[fork] < NEAR_TIE,
      `continuation: ${fork < 0 ? 'the same' : `forks at ${fork}`}`,
    );
  }

  if (!active_neurons) return;
  const before = engine.counters().neuronsFired;
  await logitsOf(engine, active_neurons.ids);
  const fired = engine.counters().neuronsFired - before;
  const reference = active_neurons.counts.flat().reduce((a, b) => a + b, 0);
  t.ok(Math.abs(fired / reference - 1) < 0.002, `${fired} neurons fired, ${reference} of the reference`);
}

t.test('the demo checkpoint gives the reference’s logits and text', async (t) => {
  await compareWithReference(t, own);
});

t.test('quantized models predict a text that the f16 model wrote about as well', async (t) => {
  const author = await open(t, await modelOf(own.checkpoint, 'f16'));
  const { cases }: Cases = readJson(join(own.references, 'cases.json'));
  const texts: number[][] = [];
  for (const { ids } of cases) texts.push([...ids, ...(await generate(author, ids, 300, 1))]);
  const windows = texts.flatMap((tokens) => [...cutWindows(tokens, CONTEXT, 1)]);
  const { ppl } = await measurePerplexity(author, windows, () => undefined);
  for (const quantization of ['q8', 'q4'] as const) {
    const engine = await open(t, await modelOf(own.checkpoint, quantization));
    const loss = (await measurePerplexity(engine, windows, () => undefined)).ppl / ppl - 1;
    t.ok(Math.abs(loss) < LOSS_MOST[quantization], `${quantization}: ${loss} of ${ppl}`);
  }
});

for (const name of SHARED_MODEL_NAMES) {
  if (name !== 'stories-drelu') {
    t.test(`${name} gives the reference’s logits and text`, needsShared(name), async (t) => {
      await compareWithReference(t, trained(name));
    });
  }

  const needs = sharedModel(name) ? needsShared('text') : needsShared(name);
  t.test(`${name} predicts held-out text as well as the reference`, needs, async (t) => {
    const { checkpoint, references } = trained(name);
    const text = readFileSync(join(sharedModel('text') as string, 'heldout.txt'), 'utf8');
    const { windows_256: reference } = readJson(join(references, 'perplexity.json'));
    const perplexity = async (quantization: QuantizationName, windowsMost: number) => {
      const directory = await modelOf(checkpoint, quantization);
      const tokenizer = await TextTokenizer.open((await openModelDirectory(directory)).tokenizerPaths);
      const windows = [...cutWindows(tokenizer.encodePlain(text), CONTEXT, tokenizer.bosTokenId)].slice(0, windowsMost);
      return measurePerplexity(await open(t, directory, CONTEXT), windows, () => undefined);
    };
    const q4 = await perplexity('q4', Number.POSITIVE_INFINITY);
    t.equal(q4.tokens, reference.tokens);
    t.ok(Math.abs(q4.ppl / reference.ppl - 1) < LOSS_MOST.q4, `q4: ${q4.ppl}, reference ${reference.ppl}`);
    // A part of the text is enough for what hardly differs.
    const [q8, f16] = [await perplexity('q8', 40), await perplexity('f16', 40)];
    t.ok(Math.abs(q8.ppl / f16.ppl - 1) < LOSS_MOST.q8, `q8: ${q8.ppl}, f16 ${f16.ppl}`);
  });
}

t.test('eval, run and perplexity agree', async (t) => {
  const program = join(compileProgram(), 'main.js');
  writeFileSync(
    program,
    `import { main } from './src/cli/main.js';
    process.exitCode = await main(process.argv);`,
  );
  const run = async (...args: string[]): Promise<string> => {
    const child = spawn(process.execPath, [program, ...args], { env: {}, stdio: ['ignore', 'pipe', 'pipe'] });
    const output = { stdout: '', stderr: '' };
    child.stdout.on('data', (bytes) => {
      output.stdout += bytes;
    });
    child.stderr.on('data', (bytes) => {
      output.stderr += bytes;
    });
    const status = await new Promise((resolve) => child.on('close', resolve));
    if (status !== 0) throw new Error(`${args.join(' ')}: ${status} ${output.stderr}`);
    return output.stdout;
  };
  const vocabulary = 4096;
  // A matrix unit computes prompts otherwise than eval, which is meant for exact comparison, computes its tokens.
  const sets = loadAddon().cpu().kernelSets;
  const cpu = ['--cpu', sets.filter((set) => set !== 'amx').at(-1) as string];
  for (const quantization of QUANTIZATIONS) {
    const model = await modelOf(own.checkpoint, quantization);
    const logitsFile = join(scratch, 'logits.f32');
    const evaluate = async (tokens: number[], ...more: string[]): Promise<Float32Array[]> => {
      await run('eval', '-m', model, '--tokens', tokens.join(), '--logits', logitsFile, ...cpu, ...more);
      const logits = readFloats(logitsFile);
      t.equal(logits.length, tokens.length * vocabulary);
      return tokens.map((_, i) => logits.subarray(i * vocabulary, (i + 1) * vocabulary));
    };

    const prompt = [1, 420, 439, 264];
    const sampling = ['--temp', '0', '-n', '40', '--ignore-eos'];
    const lines = await run('run', '-m', model, '--tokens', prompt.join(), ...sampling, '--json', '-t', '2', ...cpu);
    const objects = lines
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
    const tokens = objects.filter(({ type }) => type === 'token').map(({ id }) => id);
    const rows = await evaluate([...prompt, ...tokens], '-t', '1');
    t.same(rows.slice(prompt.length - 1, -1).map(likeliest), tokens, `${quantization}: run takes eval's likeliest`);
    t.equal(tokens.length, 40);
    t.equal(objects.at(-1).type, 'report');

    const text = 'Once upon a time there was a dog. It ran to the park, and there it saw a big red ball.\n';
    const textFile = join(scratch, 'text.txt');
    writeFileSync(textFile, text);
    const result = JSON.parse(await run('perplexity', '-m', model, '-f', textFile, '-c', '16', '--json'));
    const tokenizer = await TextTokenizer.open((await openModelDirectory(model)).tokenizerPaths);
    let nll = 0;
    let predicted = 0;
    for (const { inputs, targets } of cutWindows(tokenizer.encodePlain(text), 16, tokenizer.bosTokenId)) {
      const rows = await evaluate(inputs);
      for (const [i, target] of targets.entries()) nll += negativeLogLikelihood(rows[i], target);
      predicted += targets.length;
    }
    t.equal(result.tokens, predicted);
    t.ok(
      Math.abs(result.nll_per_token - nll / predicted) < 1e-12,
      `${quantization}: perplexity is that of eval's logits`,
    );
  }
});
