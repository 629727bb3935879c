import { rm } from 'node:fs/promises';
import os from 'node:os';
import { Command, Option } from 'commander';
import { parseInteger } from '../src/cli/options.js';
import { KERNEL_SETS, type KernelSet } from '../src/engine/contract.js';
import { measureModel } from './measure.js';
import { addModelOptions, type ModelFlags, requestOf } from './model-options.js';
import { prepareDemo, prepareSynthetic } from './models.js';
import { log, runProgram, saveOption, saveResult } from './program.js';
import { type Conditions, conditions, conversionRows, type Row, testRows, toMarkdown } from './report.js';

interface Flags extends ModelFlags {
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
  const command = new Command('bench')
    .description('measure prefill and decode in tokens a second and as a share of the memory bandwidth')
    .addOption(number('-p, --prompt <n>', 'tokens of the prefill test; 0 leaves it out', 0, TOKENS_MAX, 512))
    .addOption(number('-n, --gen <n>', 'tokens of the decode test; 0 leaves it out', 0, TOKENS_MAX, 128))
    .addOption(number('-r, --repetitions <n>', 'times that each test is run', 1, REPETITIONS_MAX, 3))
    .addOption(number('-t, --threads <n>', 'threads; 0 is all cores', 0, THREADS_MAX, 0))
    .addOption(new Option('--cpu <set>', 'force a kernel set').choices(KERNEL_SETS))
    .addOption(new Option('-o, --output <format>', 'form of the result').choices(['md', 'json', 'jsonl']).default('md'))
    .addOption(saveOption())
    .option('--keep', 'leave what is made in bench/cache for the next run');
  return addModelOptions(command).action(bench);
}

async function bench(flags: Flags): Promise<void> {
  const loadBefore = os.loadavg()[0];
  const rows: Row[] = [];
  const made: string[] = [];
  const models = [
    { synthetic: true, prepare: () => prepareSynthetic(requestOf(flags), log) },
    { synthetic: false, prepare: () => prepareDemo(flags.quant, log) },
  ];
  try {
    for (const { synthetic, prepare } of models) {
      const prepared = await prepare();
      made.push(...prepared.made);
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
    if (!flags.keep) for (const path of made) await rm(path, { recursive: true, force: true });
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

await runProgram(buildProgram());
