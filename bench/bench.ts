import os from 'node:os';
import { Command, InvalidArgumentError, Option } from 'commander';
import { nearestName } from '../src/base/error.js';
import { parseInteger } from '../src/cli/options.js';
import { KERNEL_SETS, type KernelSet } from '../src/engine/contract.js';
import { QUANTIZATIONS, type QuantizationName } from '../src/format/manifest.js';
import { measureModel } from './measure.js';
import { clearCache, prepareDemo, prepareSynthetic } from './models.js';
import { log, runProgram, saveOption, saveResult } from './program.js';
import { type Conditions, conditions, conversionRows, type Row, testRows, toMarkdown } from './report.js';
import { SHAPES, type Shape } from './shapes.js';

interface Flags {
  shape: Shape;
  quant: QuantizationName;
  prompt: number;
  gen: number;
  repetitions: number;
  threads: number;
  cpu?: KernelSet;
  output: 'md' | 'json' | 'jsonl';
  save?: string;
  keep?: boolean;
}

const TOKENS_MAX = 32_000;
const REPETITIONS_MAX = 1000;
const THREADS_MAX = 512;

/** `npm run bench`: speed of a synthetic model of a real one's shape and of the demo model, against the memory bandwidth. */
function buildProgram(): Command {
  const number = (flags: string, help: string, least: number, most: number, value: number) =>
    new Option(flags, help).argParser(parseInteger(least, most)).default(value);
  const shape = new Option('--shape <name>', `synthetic model: ${SHAPES.map(({ name }) => name).join(', ')}`);
  return new Command('bench')
    .description('measure prefill and decode in tokens a second and as a share of the memory bandwidth')
    .addOption(shape.argParser(parseShape).default(SHAPES[0], SHAPES[0].name))
    .addOption(new Option('--quant <kind>', 'how weights are stored').choices(QUANTIZATIONS).default('q4'))
    .addOption(number('-p, --prompt <n>', 'tokens of the prefill test; 0 leaves it out', 0, TOKENS_MAX, 512))
    .addOption(number('-n, --gen <n>', 'tokens of the decode test; 0 leaves it out', 0, TOKENS_MAX, 128))
    .addOption(number('-r, --repetitions <n>', 'times that each test is run', 1, REPETITIONS_MAX, 3))
    .addOption(number('-t, --threads <n>', 'threads; 0 is all cores', 0, THREADS_MAX, 0))
    .addOption(new Option('--cpu <set>', 'force a kernel set').choices(KERNEL_SETS))
    .addOption(new Option('-o, --output <format>', 'form of the result').choices(['md', 'json', 'jsonl']).default('md'))
    .addOption(saveOption())
    .option('--keep', 'leave checkpoints and models in bench/cache for the next run')
    .action(bench);
}

async function bench(flags: Flags): Promise<void> {
  const loadBefore = os.loadavg()[0];
  const rows: Row[] = [];
  const models = [
    { synthetic: true, prepare: () => prepareSynthetic(flags.shape, flags.quant, log) },
    { synthetic: false, prepare: () => prepareDemo(flags.quant, log) },
  ];
  try {
    for (const { synthetic, prepare } of models) {
      const prepared = await prepare();
      log(`measuring ${prepared.path}`);
      const result = await measureModel(prepared.path, {
        promptTokens: flags.prompt,
        generatedTokens: flags.gen,
        repetitions: flags.repetitions,
        threads: flags.threads,
        kernelSet: flags.cpu,
      });
      rows.push(...testRows(result, synthetic), ...conversionRows(result, prepared, synthetic));
    }
  } finally {
    if (!flags.keep) await clearCache();
  }
  const command = ['npm run bench --', ...process.argv.slice(2)].join(' ');
  const facts = conditions(command, loadBefore);
  process.stdout.write(format(flags.output, facts, rows));
  if (flags.save !== undefined) await saveResult(flags.save, format('jsonl', facts, rows));
}

function format(kind: Flags['output'], facts: Conditions, rows: Row[]): string {
  switch (kind) {
    case 'md':
      return toMarkdown(facts, rows);
    case 'json':
      return `${JSON.stringify({ ...facts, rows }, null, 2)}\n`;
    case 'jsonl':
      return [facts, ...rows].map((row) => `${JSON.stringify(row)}\n`).join('');
  }
}

function parseShape(text: string): Shape {
  const found = SHAPES.find(({ name }) => name === text);
  if (found) return found;
  const names = SHAPES.map(({ name }) => name);
  const nearest = nearestName(text, names);
  throw new InvalidArgumentError(`Expected one of ${names.join(', ')}.${nearest ? ` Did you mean ${nearest}?` : ''}`);
}

await runProgram(buildProgram());
