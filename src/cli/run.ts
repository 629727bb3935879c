import { randomInt } from 'node:crypto';
import { Command } from 'commander';
import { formatBytes } from '../base/bytes.js';
import { EXIT, Pi2Error } from '../base/error.js';
import { chooseContext, type Engine } from '../engine/engine.js';
import { Generation, requirePrompt } from '../engine/generate.js';
import { modelPageCacheBytes } from '../engine/page-cache.js';
import { seededRandom } from '../engine/random.js';
import { RecallMeter, requirePredicting } from '../engine/recall.js';
import type { TimedSpan } from '../engine/timed-span.js';
import { type ModelDirectory, openModelDirectory } from '../format/model-directory.js';
import { formatMs } from '../report/format.js';
import { measureRoof } from '../report/roofline.js';
import { formatRunReport, type RunFacts, runReport } from '../report/run-report.js';
import { describeKept } from '../report/stream-report.js';
import { readTextFile } from '../text/text-file.js';
import { TokenStream } from '../text/token-stream.js';
import { TextTokenizer } from '../text/tokenizer.js';
import { openEngine } from './open-engine.js';
import {
  addEngineChoice,
  addEngineOptions,
  addExactOption,
  addModelOption,
  addSamplingOptions,
  addTraceOption,
  addUnitOptions,
  type EngineFlags,
  engineOptions,
  parseInteger,
  parseTokens,
  type SamplingFlags,
  samplingOptions,
} from './options.js';
import { ExitWith, log, withInterrupt, writeJson, writeOut } from './output.js';
import { runBatch, shareOfContext } from './run-batch.js';
import { traceOptions, withTrace } from './with-trace.js';

interface RunFlags extends EngineFlags, SamplingFlags {
  model: string;
  prompt?: string;
  file?: string;
  tokens?: number[];
  predict: number;
  ignoreEos?: boolean;
  measureRecall?: boolean;
  nParallel?: number;
  bestOf?: number;
  trace?: string;
  json?: boolean;
  report: boolean;
}

const PREDICT_MAX = 1 << 30;
/** Most continuations decoded together. */
const PARALLEL_MAX = 64;

/** `run`: continues a prompt. */
export function runCommand(): Command {
  const command = new Command('run').description('continue a prompt, token by token');
  addModelOption(command)
    .option('-p, --prompt <text>', 'the prompt')
    .option('-f, --file <file>', 'a UTF-8 file with the prompt; a newline at its end is left out')
    .option('--tokens <ids>', 'the prompt as token ids: 1,2,3', parseTokens)
    .option('-n, --predict <n>', 'most tokens to generate; -1 is until the end', parseInteger(-1, PREDICT_MAX), -1);
  addExactOption(addEngineOptions(command));
  addTraceOption(addUnitOptions(addEngineChoice(command)));
  addSamplingOptions(command)
    .option('--ignore-eos', 'do not stop at the end token')
    .option(
      '--n-parallel <n>',
      'generate n continuations together and print all, the k-th with seed + k; also -np',
      parseInteger(1, PARALLEL_MAX),
    )
    .option(
      '--best-of <n>',
      'the same, but print the one that the model finds likeliest, by mean log-probability',
      parseInteger(1, PARALLEL_MAX),
    )
    .option('--measure-recall', 'compute each token exactly too, and report what the predictor misses (slow)')
    .option('--json', 'one JSON object a line on stdout: tokens, then the report')
    .option('--no-report', 'leave the report out');
  command.addHelpText(
    'after',
    `
stdout is the prompt and its continuation (with --tokens the continuation alone), stderr the log
and the report. With --json stdout is {"type":"token","id":263,"text":" a"} for each token,
then {"type":"report",…}. Several continuations share the prompt's part of the context (-c) and
each gets an equal share of what is left; with --n-parallel each is below a line of its own, and
tokens of --json have "continuation". docs/BATCHES.md.

Examples:
  powerinfer2 run -m bamboo.pi2 -p "Once upon a time" -n 128
  powerinfer2 run -m bamboo.pi2 -f prompt.txt --temp 0 -n 64
  powerinfer2 run -m bamboo.pi2 --tokens 1,420,439 -n 16 --seed 7 --json
  powerinfer2 run -m bamboo.pi2 -p "Once upon a time" -n 64 --best-of 4 --seed 7`,
  );
  return command.action(run);
}

async function run(flags: RunFlags): Promise<void> {
  const options = engineOptions(flags);
  if (flags.measureRecall) requirePredicting(options);
  const count = requireBatch(flags);
  const text = await promptText(flags);
  const model = await openModelDirectory(flags.model);
  const tokenizer = await openTokenizer(model, text === null);
  const prompt = text === null ? (flags.tokens as number[]) : (tokenizer as TextTokenizer).encode(text);
  const { vocab_size, eos_token_ids } = model.manifest.hyperparameters;
  const contextLength = chooseContext(model, flags.ctxSize);
  requirePrompt(prompt, { contextLength, vocabSize: vocab_size });
  if (count !== null) shareOfContext(contextLength, prompt.length, count);
  await withInterrupt(async (signal) => {
    await withTrace(flags.trace, async (trace) => {
      const engine = await openEngine(model, { ...options, ...traceOptions(trace), sequences: count ?? 1 });
      try {
        trace?.beginEngine(model.manifest.name, engine);
        logOpened(model, engine, flags.ctxSize);
        const seed = flags.seed < 0 ? randomInt(0xffffffff) : flags.seed;
        const sampling = samplingOptions(flags);
        const endTokens = flags.ignoreEos ? [] : eos_token_ids;
        const onSpans = trace === null ? {} : { onSpans: (spans: readonly TimedSpan[]) => trace.add(spans, engine) };
        if (count !== null) {
          const { predict: maxTokens, bestOf } = flags;
          const how = { count, best: bestOf !== undefined, maxTokens, sampling, seed, endTokens, signal, ...onSpans };
          const outcome = await runBatch(engine, { prompt, text, tokenizer, json: flags.json === true, ...how });
          if (flags.report) await report(flags, model, engine, { ...outcome, seed });
          return;
        }
        const meter = flags.measureRecall ? new RecallMeter(engine, model.manifest.hyperparameters) : null;
        const generation = new Generation(meter ?? engine, {
          prompt,
          maxTokens: flags.predict,
          sampling,
          random: seededRandom(seed),
          endTokens,
          signal,
          ...onSpans,
        });
        await stream(flags, model, engine, generation, { text, tokenizer, seed, meter });
      } finally {
        trace?.add([], engine);
        await engine.close();
      }
    });
    if (signal.aborted) throw new ExitWith(EXIT.interrupted);
  });
}

interface StreamContext {
  /** Null when the prompt was given as tokens. */
  text: string | null;
  tokenizer: TextTokenizer | null;
  seed: number;
  /** Null unless recall is measured. */
  meter: RecallMeter | null;
}

/** Prints tokens as they come, then the report. */
async function stream(
  flags: RunFlags,
  model: ModelDirectory,
  engine: Engine,
  generation: Generation,
  { text, tokenizer, seed, meter }: StreamContext,
): Promise<void> {
  const printer = flags.json ? new JsonPrinter() : new TextPrinter();
  const decoder = new TokenStream(tokenizer ?? { bytes: () => new Uint8Array(0) });
  let countersAfterPrompt = engine.counters();
  if (text !== null) await printer.prompt(text);
  for await (const id of generation.tokens()) {
    if (generation.timings.generatedTokens === 1) countersAfterPrompt = engine.counters();
    await printer.token(id, decoder.push(id), decoder.isWaiting);
  }
  await printer.end(decoder.flush());
  if (generation.stopReason === 'context') {
    log(`stopped: the context of ${engine.contextLength} tokens is full; a larger one: -c`);
  }
  if (generation.timings.generatedTokens === 0) countersAfterPrompt = engine.counters();
  if (!flags.report) return;
  const { timings, stopReason } = generation;
  const recall = meter ? { recall: meter.recall() } : {};
  await report(flags, model, engine, { timings, stopReason, seed, countersAfterPrompt, ...recall });
}

/** Says what a run took: on stdout with `--json`, else on stderr. */
async function report(
  { json }: RunFlags,
  model: ModelDirectory,
  engine: Engine,
  outcome: Pick<RunFacts, 'timings' | 'stopReason' | 'seed' | 'countersAfterPrompt' | 'recall' | 'batch'>,
): Promise<void> {
  const counters = engine.counters();
  const roof = await measureRoof(engine, outcome.countersAfterPrompt, counters);
  const pageCacheBytes = await modelPageCacheBytes(model);
  const made = runReport({ ...outcome, manifest: model.manifest, engine, counters, pageCacheBytes, roof });
  if (json) await writeJson(made);
  else log(`\n${formatRunReport(made).trimEnd()}`);
}

/** How many continuations are decoded together; null for the one of an ordinary run. */
function requireBatch({ nParallel, bestOf, measureRecall, predict }: RunFlags): number | null {
  const count = bestOf ?? (nParallel === 1 ? undefined : nParallel);
  const refuse = (what: string, hint: string) => new Pi2Error('E_USAGE', what, hint);
  if (nParallel !== undefined && bestOf !== undefined) {
    throw refuse('--n-parallel and --best-of exclude each other', '--best-of prints one of them, --n-parallel all');
  }
  if (count === undefined) return null;
  if (measureRecall) throw refuse('--measure-recall follows one continuation', 'leave out one of the options');
  if (predict === 0) throw refuse('-n 0 generates nothing to choose from', 'give -n 1 or more');
  return count;
}

/** stdout is the text and a newline. */
class TextPrinter {
  async prompt(text: string): Promise<void> {
    await writeOut(text);
  }

  async token(_id: number, text: string, _isWaiting: boolean): Promise<void> {
    if (text !== '') await writeOut(text);
  }

  async end(rest: string): Promise<void> {
    await writeOut(`${rest}\n`);
  }
}

/** stdout is one object for each token. One whose character is unfinished waits for the next: the end may belong to it. */
class JsonPrinter {
  #waiting: { type: 'token'; id: number; text: string } | null = null;

  async prompt(_text: string): Promise<void> {}

  async token(id: number, text: string, isWaiting: boolean): Promise<void> {
    if (this.#waiting) await writeJson(this.#waiting);
    this.#waiting = { type: 'token', id, text };
    if (!isWaiting) await this.end('');
  }

  async end(rest: string): Promise<void> {
    if (this.#waiting) await writeJson({ ...this.#waiting, text: this.#waiting.text + rest });
    this.#waiting = null;
  }
}

/** The prompt's text, or null when it is given as tokens. Exactly one source is wanted. */
async function promptText(flags: RunFlags): Promise<string | null> {
  const given = [flags.prompt, flags.file, flags.tokens].filter((source) => source !== undefined).length;
  if (given !== 1) {
    const what = given === 0 ? 'no prompt is given' : 'the prompt is given more than once';
    throw new Pi2Error('E_USAGE', what, 'give one of -p TEXT, -f FILE, --tokens 1,2,3');
  }
  if (flags.tokens !== undefined) return null;
  // As llama.cpp does: the newline that editors put at the end of a file is not part of the prompt.
  const text = flags.prompt ?? (await readTextFile(flags.file as string)).replace(/\r?\n$/, '');
  if (text === '')
    throw new Pi2Error('E_EMPTY_PROMPT', 'the prompt is empty', 'give -p TEXT, -f FILE or --tokens 1,2,3');
  return text;
}

/** The model's tokenizer. When it is only wanted to show text, a model without one runs all the same. */
async function openTokenizer(model: ModelDirectory, optional: boolean): Promise<TextTokenizer | null> {
  try {
    return await TextTokenizer.open(model.tokenizerPaths);
  } catch (error) {
    if (!optional || !(error instanceof Pi2Error)) throw error;
    log(`${error.message}: tokens are shown without text`);
    return null;
  }
}

function logOpened(model: ModelDirectory, engine: Engine, asked: number): void {
  const { name, hyperparameters: h, quantization } = model.manifest;
  const { weightBytes, kvBytes } = engine.counters();
  const isMapped = engine.storage === 'mmap';
  // Streamed neurons come in with the first steps.
  const what = `${formatBytes(weightBytes)} of weights`;
  const weights = isMapped
    ? 'weights mapped'
    : engine.storage === 'resident'
      ? `${what} loaded`
      : `opened with room for ${what}`;
  log(`${name}: ${h.family}, ${quantization.name}, ${weights} in ${formatMs(engine.loadMs)}`);
  const own = asked === 0 ? ' (the model’s own)' : '';
  log(
    `context ${engine.contextLength}${own}, KV cache ${formatBytes(kvBytes)}; ${engine.threads} threads, ${engine.kernelSet}`,
  );
  if (engine.gatesResidentShare === null) {
    log('page cache is not part of the budget: the kernel decides what is in memory');
  } else if (engine.storage !== 'resident') {
    log(
      `neurons from flash: ${engine.storage}; in memory ${describeKept(engine)}, budget ${formatBytes(engine.budgetBytes)}`,
    );
  }
  if (engine.contextLength > h.context_length) {
    log(`warning: the model was trained on ${h.context_length} positions; text beyond them gets worse`);
  }
}
