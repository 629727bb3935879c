import { Command, InvalidArgumentError, Option } from 'commander';
import { EXIT, Pi2Error } from '../base/error.js';
import { type BenchCase, measureCase } from '../bench/bench.js';
import { BENCH_OUTPUTS, type BenchOutput, benchPrinter, type OptionColumn } from '../bench/output.js';
import type { BenchTest } from '../bench/runner.js';
import { ABLATIONS, type Ablation } from '../engine/ablation.js';
import { KERNEL_SETS, type KernelSet } from '../engine/contract.js';
import { ENGINES, type EngineName, type EngineOptions, LOAD_MODES, type LoadMode } from '../engine/engine.js';
import { NPU_CHOICES, type NpuChoice } from '../engine/unit-request.js';
import { LIMITS } from '../format/hyperparameters.js';
import { type ModelDirectory, openModelDirectory } from '../format/model-directory.js';
import { readTextFile } from '../text/text-file.js';
import { TextTokenizer } from '../text/tokenizer.js';
import { openEngine } from './open-engine.js';
import {
  addTraceOption,
  parseAblations,
  parseInteger,
  parseMemory,
  parseName,
  parseNumber,
  SEED_MAX,
  THREADS_MAX,
} from './options.js';
import { ExitWith, withInterrupt, writeOut } from './output.js';
import { traceOptions, withTrace } from './with-trace.js';

interface BenchFlags {
  model: string[];
  prompt?: number[];
  gen?: number[];
  pg?: PromptAndGen[];
  depth?: number[];
  npl?: number[];
  repetitions: number;
  threads?: number[];
  memory?: string[];
  exact?: boolean[];
  cpu?: KernelSet[];
  engine?: EngineName[];
  loadMode?: LoadMode[];
  ablate?: Ablation[];
  npu?: NpuChoice[];
  hotRatio?: number[];
  file?: string;
  seed: number;
  warmup: boolean;
  output: BenchOutput;
  trace?: string;
}

interface PromptAndGen {
  promptTokens: number;
  generatedTokens: number;
}

const REPETITIONS_MAX = 1000;
const PARALLEL_MAX = 64;
const DEFAULTS = { prompt: [512], gen: [128] };

/** `bench`: speed of models, as llama-bench measures it. */
export function benchCommand(): Command {
  const command = new Command('bench').description('measure prefill and decode, as llama-bench does');
  const lists = 'Every option marked * takes a list (1,2,4), or is given several times: all combinations are measured';
  const list = (flags: string, help: string, parse: (text: string) => unknown) =>
    new Option(flags, `* ${help}`).argParser(parseList(parse));
  const counts = parseInteger(0, LIMITS.context);
  addTraceOption(command)
    .addOption(list('-m, --model <NAME.pi2>', 'model directories', String).makeOptionMandatory())
    .addOption(list('-p, --prompt <n>', 'tokens of a prompt (pp); 0 is none (default: 512)', counts))
    .addOption(list('-n, --gen <n>', 'tokens to generate (tg); 0 is none (default: 128)', counts))
    .addOption(
      new Option('--pg <pp,tg>', '* a prompt and generation behind it as one test; also -pg').argParser(parsePair),
    )
    .addOption(list('-d, --depth <n>', 'positions filled before, not timed (default: 0)', counts))
    .addOption(list('--npl <n>', 'sequences decoded together; also -npl (default: 1)', parseInteger(1, PARALLEL_MAX)))
    .addOption(
      new Option('-r, --repetitions <n>', 'times that each test is run')
        .argParser(parseInteger(1, REPETITIONS_MAX))
        .default(5),
    )
    .addOption(list('-t, --threads <n>', 'threads; 0 is all cores (default: 0)', parseInteger(0, THREADS_MAX)))
    .addOption(list('--memory <size>', 'memory of the whole process: 3G, 50%, min', checkMemory))
    .addOption(
      list('--exact [0,1]', '1 computes every neuron that fires, 0 asks the predictor (default: 0)', parseSwitch),
    )
    .addOption(list('--cpu <set>', `kernels: ${KERNEL_SETS.join(', ')}`, parseName(KERNEL_SETS)))
    .addOption(
      list('--engine <name>', `${ENGINES.join(', ')}; those after the first are baselines`, parseName(ENGINES)),
    )
    .addOption(list('--load-mode <mode>', `where neurons are: ${LOAD_MODES.join(', ')}`, parseName(LOAD_MODES)))
    .addOption(
      new Option('--ablate <steps>', `take steps of streaming away: ${ABLATIONS.join(',')}`).argParser(parseAblations),
    )
    .addOption(
      list('--npu <unit>', `beside the CPU: ${NPU_CHOICES.join(', ')} (default: auto)`, parseName(NPU_CHOICES)),
    )
    .addOption(
      list('--hot-ratio <share>', 'share of the neurons that --npu computes (default: the fastest)', parseNumber(0, 1)),
    )
    .option('-f, --file <file>', 'prompts are the beginning of this UTF-8 text, not random tokens')
    .addOption(
      new Option('-s, --seed <n>', 'of random prompts and of the choice of tokens')
        .argParser(parseInteger(0, SEED_MAX))
        .default(1),
    )
    .option('--no-warmup', 'do not run each test once before it is timed')
    .addOption(
      new Option('-o, --output <format>', BENCH_OUTPUTS.join(', ')).argParser(parseName(BENCH_OUTPUTS)).default('md'),
    )
    .addHelpText(
      'after',
      `
${lists},
each on an engine of its own.

pp512 computes a prompt of 512 tokens, in batches; tg128 generates 128 tokens, each drawn from what the model says
(llama-bench feeds random ones, but which neurons fire depends on the text), from an empty context; choosing them is
not timed. t/s is mean ± standard deviation of -r runs; with -npl 4 it is of four sequences that are decoded together,
as llama-batched-bench has them, each with a prompt of its own. Columns behind it: docs/PERFORMANCE.md.

Examples:
  powerinfer2 bench -m bamboo.pi2
  powerinfer2 bench -m bamboo.pi2 -p 0 -n 64 --memory 2G,3G,4G --exact 0,1
  powerinfer2 bench -m bamboo.pi2 -p 0 -n 64 -npl 1,2,4
  powerinfer2 bench -m bamboo.pi2 -p 128,512 -n 0 -t 1,2 -r 3 -o jsonl`,
    );
  return command.action(bench);
}

async function bench(flags: BenchFlags): Promise<void> {
  const tests = listTests(flags);
  const paths = flags.model;
  const models = await Promise.all(paths.map(openModelDirectory));
  const text = flags.file === undefined ? null : await readTextFile(flags.file);
  const printer = benchPrinter(flags.output, givenColumns(flags));
  await withInterrupt((signal) =>
    withTrace(flags.trace, async (trace) => {
      const settings = {
        trace,
        repetitions: flags.repetitions,
        warmUp: flags.warmup,
        seed: flags.seed,
        text: text === null ? null : (model: ModelDirectory) => encode(model, text),
        open: (model: ModelDirectory, options: EngineOptions) =>
          openEngine(model, { ...options, ...traceOptions(trace) }),
        signal,
      };
      await writeOut(printer.begin());
      try {
        for (const one of listCases(models, tests, flags)) {
          const row = await measureCase(one, settings);
          if (row === null) break;
          await writeOut(printer.row(row));
        }
      } finally {
        // Rows that were measured are worth something though a later one failed.
        await writeOut(printer.end());
      }
      if (signal.aborted) throw new ExitWith(EXIT.interrupted);
    }),
  );
}

/** Prompts first, then generation, then both, at each depth. */
function listTests({
  prompt = DEFAULTS.prompt,
  gen = DEFAULTS.gen,
  pg = [],
  depth = [0],
  npl = [1],
}: BenchFlags): BenchTest[] {
  const tests = depth.flatMap((of) =>
    [
      ...prompt.map((promptTokens) => ({ promptTokens, generatedTokens: 0 })),
      ...gen.map((generatedTokens) => ({ promptTokens: 0, generatedTokens })),
      ...pg,
    ].flatMap((test) => npl.map((sequences) => ({ ...test, depth: of, sequences }))),
  );
  const wanted = tests.filter(({ promptTokens, generatedTokens }) => promptTokens + generatedTokens > 0);
  if (wanted.length === 0) throw new Pi2Error('E_USAGE', 'there is nothing to measure', 'give -p, -n or --pg');
  return wanted;
}

/** The product of all lists; the first of them changes slowest. */
function listCases(models: readonly ModelDirectory[], tests: readonly BenchTest[], flags: BenchFlags): BenchCase[] {
  const { threads = [0], memory = [null], exact = [false], engine = ['pi2'], loadMode = ['auto'], cpu } = flags;
  return product(models, engine, loadMode, memory, exact, cpu ?? [undefined], threads, listUnits(flags), tests).map(
    ([model, engine, loadMode, memory, exact, kernelSet, threads, unit, test]) => ({
      model,
      test,
      memory,
      options: {
        engine,
        loadMode,
        exact,
        threads,
        ...unit,
        ...(kernelSet === undefined ? {} : { kernelSet }),
        ...(memory === null ? {} : { memory: parseMemory(memory) }),
        ...(flags.ablate === undefined ? {} : { ablate: flags.ablate }),
      },
    }),
  );
}

/** Units, each with every ratio; those that have none come once. */
function listUnits({ npu = ['auto'], hotRatio }: BenchFlags): Pick<EngineOptions, 'npu' | 'hotRatio'>[] {
  const hasRatio = (unit: NpuChoice) => unit !== 'auto' && unit !== 'none';
  // Without a unit that ratios could be of, they are refused when the model is opened.
  const isMixed = npu.some(hasRatio);
  return npu.flatMap((unit) => {
    if (hotRatio === undefined || (isMixed && !hasRatio(unit))) return [{ npu: unit }];
    return hotRatio.map((ratio) => ({ npu: unit, hotRatio: ratio }));
  });
}

function product<Lists extends readonly (readonly unknown[])[]>(
  ...lists: Lists
): { -readonly [I in keyof Lists]: Lists[I][number] }[] {
  const rows = lists.reduce<unknown[][]>(
    (rows, list) => rows.flatMap((row) => list.map((value) => [...row, value])),
    [[]],
  );
  return rows as { -readonly [I in keyof Lists]: Lists[I][number] }[];
}

function givenColumns({ memory, exact, engine, cpu, npu, hotRatio, npl }: BenchFlags): OptionColumn[] {
  const given = { engine, memory, exact, cpu, npu, hotRatio: hotRatio ?? npu, npl };
  return (Object.keys(given) as (keyof typeof given)[]).filter((name) => given[name] !== undefined);
}

async function encode(model: ModelDirectory, text: string): Promise<number[]> {
  return (await TextTokenizer.open(model.tokenizerPaths)).encode(text);
}

/** A parser of `1,2,3` that adds to what was given before. */
function parseList<Value>(parse: (text: string) => Value): (text: string, before?: Value[]) => Value[] {
  return (text, before = []) => [...before, ...text.split(',').map((part) => parse(part.trim()))];
}

function parsePair(text: string, before: PromptAndGen[] = []): PromptAndGen[] {
  const [promptTokens, generatedTokens, ...more] = text.split(',').map(parseInteger(1, LIMITS.context));
  if (generatedTokens === undefined || more.length > 0)
    throw new InvalidArgumentError('Expected two numbers: 512,128.');
  return [...before, { promptTokens, generatedTokens }];
}

/** Words are kept: they are shown as they were given. */
function checkMemory(text: string): string {
  parseMemory(text);
  return text;
}

function parseSwitch(text: string): boolean {
  if (text !== '0' && text !== '1') throw new InvalidArgumentError('Expected 0, 1 or 0,1.');
  return text === '1';
}
