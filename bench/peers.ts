import os from 'node:os';
import { join } from 'node:path';
import { Command, InvalidArgumentError, Option } from 'commander';
import { parseBytes } from '../src/base/bytes.js';
import { Pi2Error } from '../src/base/error.js';
import { parseInteger } from '../src/cli/options.js';
import { loadAddon } from '../src/engine/addon.js';
import { dropPageCache } from './memory-group.js';
import { CACHE } from './models.js';
import { capFor, type PeerCap, type PeerEntry, peerShapes, prepareEntries } from './peer-cases.js';
import {
  describePeers,
  type Limits,
  type PeerFailure,
  type PeerResult,
  type PeerRow,
  peerRows,
  testName,
} from './peer-rows.js';
import { type PeerFacts, PeerProcess, type PeerSample, type PeerTest } from './peer-worker.js';
import { log, runProgram, saveOption, saveResult } from './program.js';
import { conditions, describeConditions } from './report.js';
import { SHAPES, type Shape } from './shapes.js';

interface Flags {
  shape: string;
  offload: number[];
  cap?: number[];
  prompt: number;
  gen: number;
  repetitions: number;
  threads: number;
  seconds: number;
  large?: boolean;
  only: string[];
  output: 'md' | 'jsonl';
  save?: string;
}

const ENTRIES = ['llama', 'predicted', 'exact', 'measured', 'dense'];
const RAM_PROBE_BYTES = 2 ** 30;
const FLASH_PROBE_SECONDS = 1;
/** llama-bench warms up with a run of what it measures; a short one wakes threads and touches weights as well. */
const WARM_UP = { pp: 32, tg: 2 };

/** `npm run bench:peers`: ours and llama.cpp on the same shape, under the same caps of memory, in turn. */
function buildProgram(): Command {
  const number = (flags: string, help: string, least: number, most: number, value: number) =>
    new Option(flags, help).argParser(parseInteger(least, most)).default(value);
  const list = (parse: (text: string) => number) => (text: string) => text.split(',').map(parse);
  return new Command('bench:peers')
    .description('measure ours and llama.cpp in turn, each process under the same cap of memory and page cache (root)')
    .addOption(new Option('--shape <name>', 'synthetic model').choices(peerShapes()).default('tinyllama-1.1b'))
    .addOption(
      new Option('--offload <shares>', 'shares of the FFN that do not fit: a cap for each; 0 is no cap')
        .argParser(list(parseShare))
        .default([0, 0.5, 0.75], '0,0.5,0.75'),
    )
    .addOption(new Option('--cap <sizes>', 'caps in bytes, in place of --offload').argParser(list(parseSize)))
    .addOption(number('-p, --prompt <n>', 'tokens of the prefill test; 0 leaves it out', 0, 32_000, 512))
    .addOption(number('-n, --gen <n>', 'tokens of the decode test; 0 leaves it out', 0, 32_000, 128))
    .addOption(number('-r, --repetitions <n>', 'rounds, in which all engines take turns', 1, 1000, 3))
    .addOption(number('-t, --threads <n>', 'threads', 1, 512, loadAddon().cpu().cores))
    .addOption(number('--seconds <n>', 'time for one run of the decode test', 1, 3600, 20))
    .addOption(
      new Option('--only <names>', `entries: ${ENTRIES.join(', ')}`)
        .argParser((text: string) => text.split(',').map(parseEntry))
        .default([], 'all'),
    )
    .option('--large', 'allow shapes of tens of gigabytes')
    .addOption(new Option('-o, --output <format>', 'form of the result').choices(['md', 'jsonl']).default('md'))
    .addOption(saveOption())
    .action(bench);
}

async function bench(flags: Flags): Promise<void> {
  const loadBefore = os.loadavg()[0];
  const shape = SHAPES.find(({ name }) => name === flags.shape) as Shape;
  const caps =
    flags.cap?.map((bytes): PeerCap => ({ offload: null, bytes })) ?? flags.offload.map((o) => capFor(shape, o));
  const rows: PeerRow[] = [];
  const failures: PeerFailure[] = [];
  const ramProbes = [await probeRam(flags.threads)];
  let flash: FlashLimits | null = null;
  const results: { cap: PeerCap; measured: PeerResult[] }[] = [];
  for (const cap of caps) {
    const sizes = {
      threads: flags.threads,
      promptTokens: flags.prompt,
      generatedTokens: flags.gen,
      isLargeAllowed: flags.large === true,
    };
    const entries = await prepareEntries(flags.shape, cap, sizes, flags.only, log);
    if (entries.length === 0) continue;
    flash ??= await probeFlash(entries[0]);
    const { measured, failed } = await measureInTurn(entries, cap, flags);
    results.push({ cap, measured });
    failures.push(...failed.map((failure) => ({ ...failure, shape: flags.shape, cap_bytes: cap.bytes })));
    ramProbes.push(await probeRam(flags.threads));
  }
  if (flash === null)
    throw new Pi2Error('E_USAGE', 'no entry is left to measure', 'dense is compared without a cap only');
  const limits: Limits = {
    type: 'limits',
    threads: flags.threads,
    ram_bytes_per_second: Math.max(...ramProbes),
    ram_probes_bytes_per_second: ramProbes,
    ...flash,
  };
  for (const { cap, measured } of results) rows.push(...peerRows(flags.shape, cap, limits, measured));
  const facts = conditions(['npm run bench:peers --', ...process.argv.slice(2)].join(' '), loadBefore);
  const raw = [facts, limits, ...rows, ...failures].map((row) => `${JSON.stringify(row)}\n`).join('');
  process.stdout.write(
    flags.output === 'jsonl' ? raw : `${describeConditions(facts)}\n${describePeers(limits, rows, failures)}`,
  );
  if (flags.save !== undefined) await saveResult(flags.save, raw);
}

/** An entry, its open process and what it measured so far. */
interface Running {
  entry: PeerEntry;
  process: PeerProcess;
  facts: PeerFacts;
  samples: { test: PeerTest; runs: PeerSample[] }[];
}

type Failed = Pick<PeerFailure, 'type' | 'engine' | 'name' | 'reason' | 'oom_kills'>;

/** Opens all entries, the page cache dropped before each, then lets them take turns: A B C, A B C. */
async function measureInTurn(
  entries: readonly PeerEntry[],
  cap: PeerCap,
  { prompt, gen, repetitions, seconds }: Flags,
): Promise<{ measured: PeerResult[]; failed: Failed[] }> {
  const tests = [
    { kind: 'pp' as const, tokens: prompt, seconds },
    { kind: 'tg' as const, tokens: gen, seconds },
  ].filter(({ tokens }) => tokens > 0);
  let running: Running[] = [];
  const failed: Failed[] = [];
  /** Does a step of an entry; one that fails is closed and leaves the others to go on. */
  const attempt = async (entry: PeerEntry, peer: PeerProcess, step: () => Promise<void>) => {
    try {
      await step();
    } catch (error) {
      if (!(error instanceof Pi2Error)) throw error;
      const { oomKills } = await peer.close();
      running = running.filter((other) => other.process !== peer);
      log(`${entry.engine} ${entry.name} failed: ${error.message}`);
      const { engine, name } = entry;
      failed.push({ type: 'failure', engine, name, reason: error.message, oom_kills: oomKills });
    }
  };
  try {
    for (const entry of entries) {
      log(`opening ${entry.model} with ${entry.engine}, ${entry.name}`);
      dropPageCache();
      const peer = PeerProcess.start(entry.program, entry.request, cap.bytes);
      await attempt(entry, peer, async () => {
        const facts = await peer.facts();
        for (const { kind, tokens } of tests)
          await peer.run({ kind, tokens: Math.min(tokens, WARM_UP[kind]), seconds });
        running.push({ entry, process: peer, facts, samples: tests.map((test) => ({ test, runs: [] })) });
      });
    }
    for (let round = 1; round <= repetitions; round++) {
      for (const [i, test] of tests.entries()) {
        for (const { entry, process: peer, samples } of [...running]) {
          await attempt(entry, peer, async () => {
            const sample = await peer.run(test);
            samples[i].runs.push(sample);
            const speed = ((1000 * sample.tokens) / sample.ms).toFixed(2);
            log(`round ${round}: ${entry.engine} ${entry.name}, ${testName(test)}: ${speed} tokens/s`);
          });
        }
      }
    }
  } finally {
    for (const one of running) Object.assign(one, { usage: await one.process.close() });
  }
  return { measured: running as (Running & PeerResult)[], failed };
}

type FlashLimits = Omit<Limits, 'type' | 'threads' | 'ram_bytes_per_second' | 'ram_probes_bytes_per_second'>;

function probeRam(threads: number): Promise<number> {
  return loadAddon().measureReadBandwidth({ threads, bytes: RAM_PROBE_BYTES });
}

/** What flash gives to reads of the file, or a file of the directory, that an entry is about to use. */
async function probeFlash({ engine, model }: PeerEntry): Promise<FlashLimits> {
  const path = engine === 'llama.cpp' ? join(CACHE, model) : join(CACHE, model, 'neurons.bin');
  const probe = (blockBytes: number, lanes: number, random: boolean) =>
    loadAddon().measureFlashBandwidth({ path, blockBytes, lanes, random, seconds: FLASH_PROBE_SECONDS });
  const sequential = await probe(512 * 1024, 8, false);
  const random = await probe(8 * 1024, 32, true);
  return {
    flash_sequential_bytes_per_second: sequential.bytesPerSecond,
    flash_random_bytes_per_second: random.bytesPerSecond,
    flash_how: random.how,
  };
}

function parseShare(text: string): number {
  const share = Number(text);
  if (text !== '' && share >= 0 && share < 1) return share;
  throw new InvalidArgumentError('Expected shares from 0 to below 1, such as 0,0.5,0.75.');
}

function parseSize(text: string): number {
  try {
    return parseBytes(text);
  } catch {
    throw new InvalidArgumentError('Expected sizes such as 3G,12G.');
  }
}

function parseEntry(text: string): string {
  if (ENTRIES.includes(text)) return text;
  throw new InvalidArgumentError(`Expected names among ${ENTRIES.join(', ')}.`);
}

await runProgram(buildProgram());
