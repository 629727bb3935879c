import { type Command, InvalidArgumentError, Option } from 'commander';
import { nearestName, Pi2Error } from '../base/error.js';
import { ABLATIONS, type Ablation } from '../engine/ablation.js';
import { KERNEL_SETS, type KernelSet } from '../engine/contract.js';
import { ENGINES, type EngineName, type EngineOptions, LOAD_MODES, type LoadMode } from '../engine/engine.js';
import { SAMPLING_DEFAULTS, type SamplingOptions } from '../engine/sampler.js';
import { NPU_CHOICES, type NpuChoice } from '../engine/unit-request.js';
import { LIMITS } from '../format/hyperparameters.js';
import { type MemoryLimit, parseMemoryLimit } from '../plan/memory-limit.js';

/** Options of every command that opens an engine. */
export interface EngineFlags {
  ctxSize: number;
  threads: number;
  cpu?: KernelSet;
  memory?: MemoryLimit;
  /** Only of commands that have `--engine`. */
  engine?: EngineName;
  loadMode: LoadMode;
  exact?: boolean;
  ablate?: Ablation[];
  npu?: NpuChoice;
  hotRatio?: number;
  npuLibrary?: string;
  npuProfile?: string;
}

/** Options of every command that chooses tokens. */
export interface SamplingFlags {
  temp: number;
  topK: number;
  topP: number;
  minP: number;
  repeatPenalty: number;
  repeatLastN: number;
  /** -1 for a random one. */
  seed: number;
}

/** Most threads, and the largest seed, that an option takes. */
export const THREADS_MAX = 512;
export const SEED_MAX = 0xfffffffe;

/** Adds `-m`, the model directory. */
export function addModelOption(command: Command): Command {
  return command.requiredOption('-m, --model <NAME.pi2>', 'model directory that convert made');
}

/** Adds `-c`, `-t`, `--cpu`, `--memory` and `--load-mode`. */
export function addEngineOptions(
  command: Command,
  contextHelp = 'positions of the KV cache; 0 is the model’s own',
): Command {
  const context = new Option('-c, --ctx-size <n>', contextHelp).argParser(parseInteger(0, LIMITS.context));
  const threads = new Option('-t, --threads <n>', 'threads; 0 is all cores').argParser(parseInteger(0, THREADS_MAX));
  const cpu = new Option('--cpu <set>', `force a kernel set: ${KERNEL_SETS.join(', ')}`).argParser(
    parseName(KERNEL_SETS),
  );
  const memory = new Option(
    '--memory <size>',
    'memory of the whole process: 3G, 50% of the machine, or min; default: what is available, but for 1/16 of the machine, 1 GiB at most',
  ).argParser(parseMemory);
  const modes = LOAD_MODES.join(', ');
  const loadMode = new Option('--load-mode <mode>', `where neurons are: ${modes}`).argParser(parseName(LOAD_MODES));
  const options = [context.default(0), threads.default(0), cpu, memory, loadMode.default('auto')];
  for (const option of options) command.addOption(option);
  return command;
}

/** Adds `--exact`, for commands that may predict which neurons contribute. */
export function addExactOption(command: Command): Command {
  return command.option('--exact', 'compute every neuron that fires, as if the model had no predictor');
}

/** Adds `--trace`, for commands that measure. */
export function addTraceOption(command: Command): Command {
  return command.option('--trace <file>', 'write where the time of each token goes: JSON for ui.perfetto.dev');
}

/** Adds `--npu` and `--hot-ratio`, for commands that compute. */
export function addUnitOptions(command: Command): Command {
  const npu = new Option('--npu <unit>', `what computes hot neurons beside the CPU: ${NPU_CHOICES.join(', ')}`);
  const ratio = new Option(
    '--hot-ratio <share>',
    'share of the neurons that --npu computes, 0 to 1; default: the fastest',
  );
  command.addOption(npu.argParser(parseName(NPU_CHOICES)).default('auto'));
  command.addOption(ratio.argParser(parseNumber(0, 1)));
  return command
    .option('--npu-library <file>', 'ONNX Runtime: libonnxruntime.so.1; default: that of the package onnxruntime-node')
    .option('--npu-profile <name>', 'the device of onnxruntime:qnn: a profile by name, or a file');
}

/** Adds `--engine` and `--ablate`, for commands that compare ways to compute. */
export function addEngineChoice(command: Command): Command {
  const choice = new Option('--engine <name>', `${ENGINES.join(', ')}; those after the first are baselines`);
  const ablate = new Option('--ablate <steps>', `take steps of streaming away: ${ABLATIONS.join(',')}`);
  command.addOption(choice.argParser(parseName(ENGINES)).default('pi2'));
  return command.addOption(ablate.argParser(parseAblations));
}

/** Adds the options of sampling, with llama.cpp's names, meanings and defaults. */
export function addSamplingOptions(command: Command): Command {
  const defaults = SAMPLING_DEFAULTS;
  const add = (flags: string, help: string, parse: (text: string) => number, value: number) =>
    command.addOption(new Option(flags, help).argParser(parse).default(value));
  add('--temp <t>', 'temperature; 0 is the likeliest token, always', parseNumber(-1000, 1000), defaults.temperature);
  add('--top-k <k>', 'choose from the k likeliest; 0 is all', parseInteger(0, LIMITS.vocabulary), defaults.topK);
  add('--top-p <p>', 'choose from the likeliest that sum up to p; 1 is all', parseNumber(0, 1), defaults.topP);
  add('--min-p <p>', 'at least p times as likely as the likeliest; 0 is all', parseNumber(0, 1), defaults.minP);
  add(
    '--repeat-penalty <x>',
    'make recent tokens less likely; 1 is off',
    parseNumber(0.01, 100),
    defaults.repeatPenalty,
  );
  const lastNHelp = 'how many tokens are recent; 0 is none, -1 all';
  add('--repeat-last-n <n>', lastNHelp, parseInteger(-1, LIMITS.context), defaults.repeatLastN);
  add('-s, --seed <n>', 'same seed, same text; -1 is a random one', parseInteger(-1, SEED_MAX), -1);
  return command;
}

/** The flags of `addEngineOptions` and `addExactOption` as the engine takes them. */
export function engineOptions(flags: EngineFlags): EngineOptions {
  return {
    context: flags.ctxSize,
    threads: flags.threads,
    ...(flags.cpu === undefined ? {} : { kernelSet: flags.cpu }),
    ...(flags.memory === undefined ? {} : { memory: flags.memory }),
    ...(flags.engine === undefined ? {} : { engine: flags.engine }),
    loadMode: flags.loadMode,
    exact: flags.exact === true,
    ...(flags.ablate === undefined ? {} : { ablate: flags.ablate }),
    ...(flags.npu === undefined ? {} : { npu: flags.npu }),
    ...(flags.hotRatio === undefined ? {} : { hotRatio: flags.hotRatio }),
    ...(flags.npuLibrary === undefined ? {} : { npuLibrary: flags.npuLibrary }),
    ...(flags.npuProfile === undefined ? {} : { npuProfile: flags.npuProfile }),
  };
}

/** The flags of `addSamplingOptions` as the sampler takes them. */
export function samplingOptions(flags: SamplingFlags): SamplingOptions {
  return {
    temperature: flags.temp,
    topK: flags.topK,
    topP: flags.topP,
    minP: flags.minP,
    repeatPenalty: flags.repeatPenalty,
    repeatLastN: flags.repeatLastN,
  };
}

/** A parser of whole numbers from `least` to `most`. */
export function parseInteger(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = /^[+-]?\d+$/.test(text) ? Number(text) : Number.NaN;
    if (!(value >= least && value <= most)) {
      throw new InvalidArgumentError(`Expected a whole number from ${least} to ${most}.`);
    }
    return value;
  };
}

/** A parser of numbers from `least` to `most`. */
export function parseNumber(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = text.trim() === '' ? Number.NaN : Number(text);
    if (!(value >= least && value <= most)) {
      throw new InvalidArgumentError(`Expected a number from ${least} to ${most}.`);
    }
    return value;
  };
}

/** Token ids as people write them: `1,2,3`. */
export function parseTokens(text: string): number[] {
  if (text.trim() === '') return [];
  return text.split(',').map((part) => {
    const id = part.trim();
    if (!/^\d{1,9}$/.test(id)) throw new InvalidArgumentError(`Expected token ids such as 1,2,3; '${id}' is none.`);
    return Number(id);
  });
}

/** Steps to take away, separated by commas. */
export function parseAblations(text: string): Ablation[] {
  return text.split(',').map((name) => parseName(ABLATIONS)(name.trim()));
}

/** `3G`, `50%` or `min`. */
export function parseMemory(text: string): MemoryLimit {
  try {
    return parseMemoryLimit(text);
  } catch (error) {
    if (!(error instanceof Pi2Error)) throw error;
    throw new InvalidArgumentError(`${error.message}: ${error.hint}.`);
  }
}

/** A parser of one of some names. */
export function parseName<Name extends string>(names: readonly Name[]): (text: string) => Name {
  return (text) => {
    const known = names.find((name) => name === text);
    if (known) return known;
    const nearest = nearestName(text, names);
    const hint = nearest ? `\n(Did you mean ${nearest}?)` : '';
    throw new InvalidArgumentError(`Expected one of ${names.join(', ')}.${hint}`);
  };
}
