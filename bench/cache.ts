import os from 'node:os';
import { basename } from 'node:path';
import { Command, Option } from 'commander';
import { readModelProfile } from '../converter/activation/profile-file.js';
import { cutText, PROFILE_CONTEXT } from '../converter/activation/profiler.js';
import { Pi2Error } from '../src/base/error.js';
import { parseInteger } from '../src/cli/options.js';
import { loadAddon } from '../src/engine/addon.js';
import { Engine } from '../src/engine/engine.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { formatShare } from '../src/report/format.js';
import { readTextFile } from '../src/text/text-file.js';
import { comparePolicies, type PolicyResult } from './cache-compare.js';
import { heatRates, type NeuronTrace, recordTrace } from './cache-trace.js';
import { log, runProgram, saveOption, saveResult } from './program.js';
import { type Conditions, conditions, describeConditions, markdownTable } from './report.js';

interface Flags {
  model: string;
  file: string;
  chunks: number;
  save?: string;
}

const CHUNKS_MAX = 1 << 20;
/** Shares of all neurons that are kept. */
const KEPT_SHARES = [0.25, 0.5, 0.75];
/** This part of the trace fills the caches and is not counted. */
const WARM_UP_SHARE = 0.25;

/** A trace and what policies find of it. */
interface CacheRow {
  type: 'cache';
  model: string;
  text_sha256: string;
  tokens: number;
  /** Of all neurons, those a token needs. */
  needed_share: number;
  policy: string;
  kept_share: number;
  found_share: number;
  gap_closed: number | null;
}

/** `npm run bench:cache`: what the engine's cache finds of a recorded trace, next to other policies. */
function buildProgram(): Command {
  return new Command('bench:cache')
    .description('record which neurons a text needs, replay it through the engine’s cache and through other policies')
    .requiredOption('-m, --model <NAME.pi2>', 'a model converted with --calibration or --profile')
    .requiredOption('-f, --file <file>', 'a UTF-8 text that the profile has not seen')
    .addOption(
      new Option('--chunks <n>', `windows of ${PROFILE_CONTEXT} tokens to take at most; 0 is the whole text`)
        .argParser(parseInteger(0, CHUNKS_MAX))
        .default(0),
    )
    .addOption(saveOption())
    .action(bench);
}

async function bench({ model: path, file, chunks, save }: Flags): Promise<void> {
  const loadBefore = os.loadavg()[0];
  const model = await openModelDirectory(path);
  const profile = await readModelProfile(model);
  if (profile === null) {
    const hint = 'convert it with --calibration TEXT, and give another text here';
    throw new Pi2Error('E_MODEL', `${path} has no activation profile`, hint);
  }
  const context = Math.min(PROFILE_CONTEXT, model.manifest.hyperparameters.context_length);
  const { sha256, windows } = await cutText(model, await readTextFile(file), context, chunks);
  if (profile.texts.some((text) => text.sha256 === sha256)) {
    throw new Pi2Error(
      'E_USAGE',
      `${path} was calibrated on ${file} itself`,
      'give a text that the profile has not seen',
    );
  }
  const engine = await Engine.open(model, { context, threads: 0 });
  let trace: NeuronTrace;
  try {
    log(`recording ${windows.length} windows of ${context} tokens`);
    trace = await recordTrace(model, engine, windows);
  } finally {
    await engine.close();
  }
  log(`replaying ${trace.tokens} tokens`);
  const countFrom = Math.floor(WARM_UP_SHARE * trace.tokens);
  const results = await comparePolicies(loadAddon(), trace, heatRates(profile), KEPT_SHARES, countFrom);
  const rows = results.map((result) => cacheRow(basename(path), sha256, trace, result));
  const facts = conditions(['npm run bench:cache --', ...process.argv.slice(2)].join(' '), loadBefore);
  process.stdout.write(toMarkdown(facts, rows));
  if (save !== undefined) await saveResult(save, [facts, ...rows].map((row) => `${JSON.stringify(row)}\n`).join(''));
}

function cacheRow(model: string, sha256: string, trace: NeuronTrace, result: PolicyResult): CacheRow {
  let needed = 0;
  for (const byte of trace.fired) for (let rest = byte; rest !== 0; rest &= rest - 1) needed++;
  return {
    type: 'cache',
    model,
    text_sha256: sha256,
    tokens: trace.tokens,
    needed_share: needed / (trace.tokens * trace.layerCount * trace.expertCount * trace.neuronCount),
    policy: result.policy,
    kept_share: result.keptShare,
    found_share: result.foundShare,
    gap_closed: result.gapClosed,
  };
}

/** A line for each policy; for each kept share what it finds and how much of the gap from LRU to Belady that closes. */
function toMarkdown(facts: Conditions, rows: readonly CacheRow[]): string {
  const [{ model, tokens, needed_share }] = rows;
  const policies = [...new Set(rows.map((row) => row.policy))];
  const header = ['kept', ...KEPT_SHARES.flatMap((share) => [formatShare(share), 'gap'])];
  const lines = policies.map((policy) => [
    policy,
    ...rows
      .filter((row) => row.policy === policy)
      .flatMap((row) => [
        formatShare(row.found_share),
        row.gap_closed === null ? '-' : `${Math.round(100 * row.gap_closed)} %`,
      ]),
  ]);
  const trace = `${model}: ${tokens} tokens, each needs ${formatShare(needed_share)} of the neurons\n`;
  return [describeConditions(facts), trace, markdownTable(header, lines)].join('\n');
}

await runProgram(buildProgram());
