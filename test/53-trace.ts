// `--trace`: a timeline of tokens that is valid, nests, lies within its token, and changes no bit of what is computed.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { convert } from '../converter/convert.js';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest } from '../src/engine/contract.js';
import { Engine, type EngineOptions } from '../src/engine/engine.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { decodeTrace, FLASH_TRACK, JAVASCRIPT_TRACK, type TraceEvent } from '../src/trace/records.js';
import { buildProgram, jsonLines, runCli } from './support/cli.js';
import { randomPredictor } from './support/predictor.js';
import { REPOSITORY } from './support/shared.js';

buildProgram();
const scratch = t.testdir({});
const path = join(scratch, 'demo.pi2');
const checkpoint = join(REPOSITORY, 'demo', 'stories-drelu');
const request = { checkpoint, output: path, quantization: 'q4' as const, maxMemoryBytes: 2 ** 30, force: false };
await convert(request, () => {}, new AbortController().signal);
const model = await openModelDirectory(path);
const addon = loadAddon();
const LAYERS = model.manifest.hyperparameters.layer_count;
/** Thread 0, which calls the others. */
const CALLER_TRACK = 1;
/** Clocks are read one after the other when the file is opened. */
const SLACK_US = 200;

/** The events of a file, which must be a trace as viewers want it. */
function readTrace(file: string): { events: TraceEvent[]; dropped: number } {
  const { traceEvents, otherData } = JSON.parse(readFileSync(file, 'utf8'));
  return { events: traceEvents, dropped: otherData.dropped_events };
}

/** Spans of a track either lie in one another or apart. */
function checkNesting(t: Test, events: readonly TraceEvent[]): void {
  const tracks = new Map<string, { begin: number; end: number; name: string }[]>();
  for (const { ph, pid, tid, ts = 0, dur = 0, name } of events) {
    if (ph !== 'X') continue;
    const key = `${pid}/${tid}`;
    if (!tracks.has(key)) tracks.set(key, []);
    tracks.get(key)?.push({ begin: ts, end: ts + dur, name });
  }
  for (const [key, spans] of tracks) {
    spans.sort((a, b) => a.begin - b.begin || b.end - a.end);
    const open: typeof spans = [];
    const crossing = spans.filter((span) => {
      // Numbers have a rounding of their own, far below the clock's.
      while (open.length > 0 && (open.at(-1)?.end as number) <= span.begin + 1e-3) open.pop();
      const outer = open.at(-1);
      open.push(span);
      return outer !== undefined && span.end > outer.end + 1e-3;
    });
    t.strictSame(crossing.slice(0, 3), [], `spans of track ${key} nest`);
  }
}

/** What every trace of a run must be. */
function checkTrace(t: Test, events: readonly TraceEvent[], tokens: number): Set<string> {
  checkNesting(t, events);
  const stages = [...addon.traceStages(), 'prompt', 'token', 'sampling', 'process_name', 'thread_name'];
  t.strictSame(
    [...new Set(events.map(({ name }) => name))].filter((name) => !stages.includes(name)),
    [],
  );
  const named = (name: string) => events.filter((event) => event.name === name);
  const outer = events.filter(({ name }) => name === 'prompt' || name === 'token');
  t.equal(outer.length, tokens);
  const outside = events.filter(
    ({ ph, ts = 0, dur = 0, tid }) =>
      ph === 'X' &&
      tid !== JAVASCRIPT_TRACK &&
      !outer.some(
        (token) => ts >= (token.ts ?? 0) - SLACK_US && ts + dur <= (token.ts ?? 0) + (token.dur ?? 0) + SLACK_US,
      ),
  );
  t.strictSame(outside.slice(0, 3), [], 'what threads do lies within a token');
  // Other threads name what they do for a step or a layer, outside of its stages, by it too: norms of several tokens.
  const ofCaller = (name: string) => named(name).filter(({ tid }) => tid === CALLER_TRACK);
  const layers = ofCaller('layer');
  t.equal(layers.length, LAYERS * ofCaller('step').length);
  t.strictSame([...new Set(layers.map(({ args }) => args?.layer))], [...Array(LAYERS).keys()]);
  return new Set(events.map(({ name }) => name));
}

t.test('run: the same text with and without, in memory and from flash', async (t) => {
  const args = ['run', '-m', path, '-p', 'Once upon a time', '-n', '12', '--seed', '3', '-t', '2', '--json'];
  const ids = (stdout: string) => jsonLines(stdout).map(({ id }) => id);
  const plain = await runCli(...args);
  let others = 0;
  for (const memory of ['1G', 'min']) {
    const file = join(scratch, `${memory}.json`);
    const traced = await runCli(...args, '--memory', memory, '--trace', file);
    t.equal(traced.status, 0);
    t.strictSame(ids(traced.stdout), ids(plain.stdout));
    const { events, dropped } = readTrace(file);
    t.equal(dropped, 0);
    const names = checkTrace(t, events, 12);
    const always = ['prompt', 'token', 'sampling', 'step', 'embed', 'layer', 'attention', 'ffn', 'find', 'sum', 'head'];
    const streamed = ['plan', 'round', 'gate', 'row', 'read', 'missing neurons', 'flash bytes'];
    for (const name of always) t.ok(names.has(name), name);
    for (const name of streamed) t.equal(names.has(name), memory === 'min', name);
    others += events.filter(({ tid, ph }) => tid === 2 && ph === 'X').length;
    if (memory === 'min') checkReads(t, events, jsonLines(traced.stdout).at(-1).flash_read_bytes_per_token);
  }
  // In memory this model is so quick that a busy machine may never give the second thread a turn.
  t.ok(others > 0, 'the second thread does something');
});

function checkReads(t: Test, events: readonly TraceEvent[], bytesPerToken: number): void {
  const of = (ph: string) => events.filter((event) => event.name === 'read' && event.ph === ph);
  const ends = new Map(of('e').map((event) => [event.id, event]));
  t.equal(ends.size, of('b').length);
  for (const { id, ts = 0, tid } of of('b')) {
    if (!((ends.get(id)?.ts ?? 0) >= ts && tid === FLASH_TRACK)) t.fail(`read ${id} ends before it begins`);
  }
  const total = (found: readonly TraceEvent[]) => found.reduce((sum, { args }) => sum + (args?.bytes as number), 0);
  const counted = events.filter(({ name }) => name === 'flash bytes');
  t.equal(total(of('b')), total(counted), 'reads and their counter agree');
  const steps = events.filter(({ name, tid }) => name === 'step' && tid === CALLER_TRACK).length;
  t.ok(Math.abs(total(counted) / steps / bytesPerToken - 1) < 0.2, 'and so does the report');
}

t.test('bench: each row is a process of its own, its warm-up left out', async (t) => {
  const file = join(scratch, 'bench.json');
  const sizes = ['-p', '8', '-n', '3', '-r', '2', '-t', '1,2', '-o', 'jsonl'];
  const { status, stdout } = await runCli('bench', '-m', path, ...sizes, '--trace', file);
  t.equal(status, 0);
  t.equal(jsonLines(stdout).length, 4);
  const { events } = readTrace(file);
  checkNesting(t, events);
  const processes = events.filter(({ name }) => name === 'process_name').map(({ args }) => args?.name);
  t.strictSame(processes, ['stories-drelu pp8', 'stories-drelu tg3', 'stories-drelu pp8', 'stories-drelu tg3']);
  const tokens = events.filter(({ name }) => name === 'token').map(({ pid }) => pid);
  t.strictSame(tokens, [2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4]);
});

t.test('a file that cannot be written is said before anything is computed', async (t) => {
  const nowhere = join(scratch, 'none', 'trace.json');
  const found = await runCli('run', '-m', path, '-p', 'x', '-n', '1', '--trace', nowhere);
  t.match(found, { status: 5, stdout: '', stderr: /cannot write .*no such file or directory\nhint: / });
  t.notOk(existsSync(nowhere));
});

/** Opens the demo, traced or not; `change` has a say in the request. */
async function open(t: Test, options: Partial<EngineOptions>, change: (request: EngineRequest) => EngineRequest) {
  const openEngine = (request: EngineRequest) => addon.openEngine(change(request));
  const engine = await Engine.open(model, { context: 64, threads: 3, ...options }, { ...addon, openEngine });
  t.teardown(() => engine.close());
  return engine;
}

/** Logits of a prompt and some tokens behind it. */
async function logitsOf(engine: Engine): Promise<Float32Array> {
  const logits = new Float32Array(12 * engine.vocabSize);
  const tokens = Int32Array.from({ length: 8 }, (_, i) => 30 * i + 7);
  await engine.step(tokens, 0, logits, { all: true });
  for (let i = 8; i < 12; i++) {
    await engine.step(Int32Array.of(11 * i), i, logits.subarray(i * engine.vocabSize));
  }
  return logits;
}

t.test('not a bit of a result changes, and its memory is counted', async (t) => {
  const ways: [string, Partial<EngineOptions>][] = [
    ['resident', {}],
    ['streamed', { memory: { kind: 'min' } }],
    ['without pipeline', { memory: { kind: 'min' }, ablate: ['pipeline'] }],
    ['mapped', { engine: 'mmap' }],
  ];
  for (const [name, options] of ways) {
    const plain = await open(t, options, (request) => request);
    // The same plan: only the trace is added.
    let planned: EngineRequest | undefined;
    const traced = await open(t, { ...options, traceRecords: 4096 }, (request) => {
      planned = { ...request, batchSize: plain.batchSize };
      return planned;
    });
    t.strictSame(await logitsOf(traced), await logitsOf(plain), name);
    const bytes = (traceRecords: number) =>
      addon.memoryNeeded({ ...(planned as EngineRequest), traceRecords }).scratchBytes;
    t.equal(bytes(4096) - bytes(0), 3 * (4096 * 32 + 64), 'rings are part of the budget');
  }
});

t.test('predictors have spans of their own', async (t) => {
  const stages = addon.traceStages();
  let predictor: EngineRequest['predictor'];
  const plain = await open(t, {}, (request) => request);
  await plain.step(Int32Array.of(1), 0, new Float32Array(plain.vocabSize));
  t.strictSame(plain.takeTrace(), [], 'nothing is traced unless it is asked for');
  await Engine.open(
    model,
    { context: 64, threads: 1 },
    {
      ...addon,
      openEngine: async (request) => {
        predictor = await randomPredictor(addon, request, join(scratch, 'predictor.bin'));
        return addon.openEngine(request);
      },
    },
  ).then((engine) => engine.close());
  const withPredictor = (request: EngineRequest) => ({ ...request, predictor }) as EngineRequest;
  const engine = await open(t, { traceRecords: 4096 }, withPredictor);
  await engine.step(Int32Array.of(1), 0, new Float32Array(engine.vocabSize));
  const events = engine.takeTrace().flatMap((trace) => decodeTrace(trace, stages, 1, 0n, 0));
  checkNesting(t, events);
  t.ok(events.filter(({ name }) => name === 'predict').length >= LAYERS);
});

t.test('a ring that is too small keeps the newest, and says how many it lost', async (t) => {
  const stages = addon.traceStages();
  for (const memory of [undefined, { kind: 'min' as const }]) {
    const options = { threads: 2, traceRecords: 16, ...(memory ? { memory } : {}) };
    const engine = await open(t, options, (request) => request);
    await logitsOf(engine);
    const traces = engine.takeTrace();
    t.equal(traces.length, 5, 'one for each step');
    for (const trace of traces) {
      t.ok(trace.dropped > 0);
      t.ok(trace.records.byteLength <= 2 * 16 * 32);
      const events = decodeTrace(trace, stages, 1, 0n, 0);
      checkNesting(t, events);
      t.equal(events.filter(({ name }) => name === 'step').length, 1, 'what ends last is there');
      t.equal(events.filter(({ name }) => name === 'head').length > 0, true);
    }
    t.strictSame(engine.takeTrace(), []);
  }
});
