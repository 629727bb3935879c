import { execFile, spawn } from 'node:child_process';
import { stat, writeFile } from 'node:fs/promises';
import os from 'node:os';
import { basename, join } from 'node:path';
import { promisify } from 'node:util';
import { Command, Option } from 'commander';
import { Pi2Error } from '../src/base/error.js';
import { parseInteger } from '../src/cli/options.js';
import { modelPageCacheBytes } from '../src/engine/page-cache.js';
import { type ModelDirectory, openModelDirectory } from '../src/format/model-directory.js';
import type { RunReport } from '../src/report/run-report.js';
import { PACKAGE_ROOT } from './models.js';
import { log, runProgram, saveOption, saveResult } from './program.js';
import { conditions, describeConditions, markdownTable } from './report.js';

interface Flags {
  model: string;
  memory: string;
  prompt: number;
  repetitions: number;
  save?: string;
}

/** A round: a first token after a cold start, then what the token cannot do without, read once. Seconds. */
interface Round {
  firstToken: number;
  load: number;
  prompt: number;
  fixedRead: number;
  /** Of the weights, when the program was started; null where the kernel does not tell. */
  cachedBytes: number | null;
}

const run = promisify(execFile);

/** `npm run bench:start`: how long a first token takes when nothing is in memory. */
function buildProgram(): Command {
  const number = (flags: string, help: string, value: number) =>
    new Option(flags, help).argParser(parseInteger(1, 10_000)).default(value);
  return new Command('bench:start')
    .description(
      'time from the start of the program to its first token, against one read of the fixed region (needs root, dd)',
    )
    .requiredOption('-m, --model <NAME.pi2>', 'a model directory')
    .requiredOption('--memory <size>', 'budget of the whole process, as run takes it')
    .addOption(number('-p, --prompt <n>', 'tokens of the prompt', 16))
    .addOption(number('-r, --repetitions <n>', 'rounds', 3))
    .addOption(saveOption())
    .action(bench);
}

async function bench({ model, memory, prompt, repetitions, save }: Flags): Promise<void> {
  const loadBefore = os.loadavg()[0];
  const directory = await openModelDirectory(model);
  const fixed = [directory.residentPath, ...(directory.manifest.predictor ? [directory.predictorPath] : [])];
  let fixedBytes = 0;
  for (const path of fixed) fixedBytes += (await stat(path)).size;
  const rounds: Round[] = [];
  for (let i = 0; i < repetitions; i++) {
    log(`round ${i + 1} of ${repetitions}`);
    rounds.push(await measure(directory, fixed, memory, prompt));
  }
  const facts = conditions(['npm run bench:start --', ...process.argv.slice(2)].join(' '), loadBefore);
  const header = [
    'first token',
    'loading',
    'prompt',
    'fixed region, read once',
    'GB/s',
    'ratio',
    'was in the page cache',
  ];
  const rows = rounds.map(({ firstToken, load, prompt, fixedRead, cachedBytes }) => [
    ...[firstToken, load, prompt, fixedRead].map((seconds) => `${seconds.toFixed(2)} s`),
    (fixedBytes / fixedRead / 1e9).toFixed(2),
    (firstToken / fixedRead).toFixed(2),
    cachedBytes === null ? '-' : `${(cachedBytes / 2 ** 20).toFixed(0)} MiB`,
  ]);
  const title = `${basename(model)}, budget ${memory}, ${prompt} tokens; fixed region ${(fixedBytes / 2 ** 20).toFixed(0)} MiB`;
  process.stdout.write(`${describeConditions(facts)}\n\n${title}\n\n${markdownTable(header, rows)}\n`);
  if (save === undefined) return;
  await saveResult(save, [facts, ...rounds].map((row) => `${JSON.stringify(row)}\n`).join(''));
}

async function measure(model: ModelDirectory, fixed: string[], memory: string, prompt: number): Promise<Round> {
  await dropPageCache();
  const cachedBytes = await modelPageCacheBytes(model);
  const { seconds, report } = await runOnce(model.path, memory, prompt);
  await dropPageCache();
  const start = performance.now();
  for (const path of fixed) await run('dd', [`if=${path}`, 'of=/dev/null', 'bs=4M', 'iflag=direct']);
  return {
    firstToken: seconds,
    load: report.load_ms / 1000,
    prompt: (report.time_to_first_token_ms ?? 0) / 1000,
    fixedRead: (performance.now() - start) / 1000,
    cachedBytes,
  };
}

/** Runs the program until it has said one token; `seconds` are from its start to that. */
async function runOnce(model: string, memory: string, prompt: number): Promise<{ seconds: number; report: RunReport }> {
  const tokens = Array.from({ length: prompt }, (_, i) => 1 + ((i * 97) % 900)).join(',');
  const options = [
    '--memory',
    memory,
    '--tokens',
    tokens,
    '-n',
    '1',
    '-c',
    String(Math.max(512, prompt + 1)),
    '--json',
  ];
  const args = [join(PACKAGE_ROOT, 'bin', 'powerinfer2.js'), 'run', '-m', model, ...options];
  const start = performance.now();
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  let seconds = 0;
  let text = '';
  child.stdout.setEncoding('utf8').on('data', (piece: string) => {
    if (text === '') seconds = (performance.now() - start) / 1000;
    text += piece;
  });
  const status = await new Promise((resolve, reject) => child.on('error', reject).on('close', resolve));
  if (status !== 0) throw new Pi2Error('E_IO', 'the run failed', 'its message is above');
  return { seconds, report: JSON.parse(text.trimEnd().split('\n').at(-1) as string) };
}

/** Throws `E_IO` without the right to. */
async function dropPageCache(): Promise<void> {
  try {
    await run('sync');
    await writeFile('/proc/sys/vm/drop_caches', '3');
  } catch {
    throw new Pi2Error('E_IO', 'the page cache cannot be dropped', 'run this benchmark as root');
  }
}

await runProgram(buildProgram());
