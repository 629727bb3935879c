import { execFile } from 'node:child_process';
import os from 'node:os';
import { basename, join } from 'node:path';
import { promisify } from 'node:util';
import { Command, Option } from 'commander';
import { Pi2Error } from '../src/base/error.js';
import { parseInteger } from '../src/cli/options.js';
import type { RunReport } from '../src/report/run-report.js';
import { PACKAGE_ROOT } from './models.js';
import { log, runProgram, saveOption, saveResult } from './program.js';
import { conditions, describeConditions, markdownTable } from './report.js';

interface Flags {
  model: string;
  memory: string;
  gen: number;
  repetitions: number;
  mmap: boolean;
  save?: string;
}

/** A way to run: what is measured, and the options that make it. */
interface Step {
  name: string;
  options: readonly string[];
}

const run = promisify(execFile);
const ablate = (...steps: string[]): readonly string[] => ['--ablate', steps.join(',')];

/** From nothing to everything (targets of the paper's section 3.11), then everything without one step. */
const STEPS: readonly Step[] = [
  { name: 'predictor alone', options: ablate('bundles', 'two-phase', 'cache', 'hot', 'pipeline', 'prefetch') },
  { name: '+ bundles', options: ablate('two-phase', 'cache', 'hot', 'pipeline', 'prefetch') },
  { name: '+ cache', options: ablate('two-phase', 'hot', 'pipeline', 'prefetch') },
  { name: '+ hot region', options: ablate('two-phase', 'pipeline', 'prefetch') },
  { name: '+ pipeline', options: ablate('two-phase', 'prefetch') },
  { name: '+ prefetch', options: ablate('two-phase') },
  { name: 'everything', options: [] },
  { name: 'everything, no predictor', options: ablate('predictor') },
  { name: 'llmflash', options: ['--engine', 'llmflash'] },
];
const MMAP: Step = { name: 'mmap', options: ['--engine', 'mmap'] };
/** The baseline reads nearly the whole model for each token. */
const MMAP_TOKENS = 4;

/** `npm run bench:ablation`: speed of a model under a budget with steps of streaming taken away. */
function buildProgram(): Command {
  const number = (flags: string, help: string, value: number) =>
    new Option(flags, help).argParser(parseInteger(1, 10_000)).default(value);
  return new Command('bench:ablation')
    .description('run a model from flash with steps of streaming taken away, all of them in turn')
    .requiredOption('-m, --model <NAME.pi2>', 'a model directory')
    .requiredOption('--memory <size>', 'budget of the whole process, as run takes it')
    .addOption(number('-n, --gen <n>', 'tokens to generate', 64))
    .addOption(number('-r, --repetitions <n>', 'rounds through all steps', 3))
    .option(
      '--mmap',
      'the baseline mmap too: run it in a control group that counts page cache, or it finds all in memory',
    )
    .addOption(saveOption())
    .action(bench);
}

async function bench({ model, memory, gen, repetitions, mmap, save }: Flags): Promise<void> {
  const loadBefore = os.loadavg()[0];
  const steps = mmap ? [MMAP, ...STEPS] : STEPS;
  const reports = new Map<Step, RunReport[]>(steps.map((step) => [step, []]));
  for (let round = 0; round < repetitions; round++) {
    for (const [step, done] of reports) {
      log(`round ${round + 1} of ${repetitions}: ${step.name}`);
      done.push(await measure(model, memory, step === MMAP ? MMAP_TOKENS : gen, step));
    }
  }
  const facts = conditions(['npm run bench:ablation --', ...process.argv.slice(2)].join(' '), loadBefore);
  const header = [
    'step',
    'tokens/s',
    'x before',
    'found in memory',
    'flash, a token',
    'reads',
    'waiting',
    'P99 / mean',
    'peak',
  ];
  let before: number | null = null;
  const rows = [...reports].map(([{ name }, done]) => {
    const report = medianOf(done);
    const speed = report.decode_tokens_per_second ?? 0;
    const factor = before === null || !name.startsWith('+') ? '-' : (speed / before).toFixed(2);
    before = speed;
    return [name, speed.toFixed(2), factor, ...describe(report)];
  });
  const title = `${basename(model)}, budget ${memory}, ${gen} tokens, median of ${repetitions}`;
  process.stdout.write(`${describeConditions(facts)}\n\n${title}\n\n${markdownTable(header, rows)}\n`);
  const raw = [...reports].flatMap(([{ name }, done]) => done.map((report) => ({ step: name, ...report })));
  if (save !== undefined) await saveResult(save, [facts, ...raw].map((row) => `${JSON.stringify(row)}\n`).join(''));
}

/** One run in a process of its own, whose memory is its alone. */
async function measure(model: string, memory: string, gen: number, { name, options }: Step): Promise<RunReport> {
  const prompt = ['--tokens', '1,420,439,5,900', '-n', String(gen), '-c', '512'];
  const sampling = ['--temp', '1', '-s', '1', '--ignore-eos', '--json'];
  const args = ['run', '-m', model, '--memory', memory, ...prompt, ...sampling, ...options];
  try {
    const { stdout } = await run(process.execPath, [join(PACKAGE_ROOT, 'bin', 'powerinfer2.js'), ...args]);
    return JSON.parse(stdout.trimEnd().split('\n').at(-1) as string);
  } catch (error) {
    const { stderr } = error as { stderr?: string };
    throw new Pi2Error('E_IO', `${name} failed: ${stderr ?? error}`, `the command: powerinfer2 ${args.join(' ')}`);
  }
}

function medianOf(reports: RunReport[]): RunReport {
  const speed = (report: RunReport) => report.decode_tokens_per_second ?? 0;
  return [...reports].sort((a, b) => speed(a) - speed(b))[Math.floor(reports.length / 2)];
}

function describe(report: RunReport): string[] {
  const percent = (share: number | null) => (share === null ? '-' : `${(100 * share).toFixed(1)} %`);
  const mebibytes = (bytes: number | null) => (bytes === null ? '-' : `${(bytes / 2 ** 20).toFixed(1)} MiB`);
  const { token_latency_ms_p99: p99, token_latency_ms_mean: mean, miss_share } = report;
  return [
    percent(miss_share === null ? null : 1 - miss_share),
    mebibytes(report.flash_read_bytes_per_token),
    report.flash_reads_per_token?.toFixed(0) ?? '-',
    percent(report.stall_share),
    p99 === null || mean === null ? '-' : (p99 / mean).toFixed(2),
    mebibytes(report.peak_memory_bytes),
  ];
}

await runProgram(buildProgram());
