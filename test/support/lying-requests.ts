/*
 * A process of its own, because what it provokes must not be able to end the tests: opens engines with requests whose fields
 * are changed at random. Each must be refused with a code of the contract, or open an engine that computes. The last request
 * tried is in the log file when the process crashed.
 *
 * Arguments: a JSON file with a valid request (ropeFrequencies as an array), the log file, how many requests to try.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import fc from 'fast-check';
import { loadAddon } from '../../src/engine/addon.js';
import type { EngineRequest } from '../../src/engine/contract.js';
import { oneRun } from './one-run.js';

const CODES = ['NATIVE_ARGUMENT', 'NATIVE_IO', 'NATIVE_CHECKSUM', 'NATIVE_MEMORY', 'NATIVE_CPU'];
const STEP_TOKENS = 20;

type Tree = Record<string, unknown> | unknown[];

/** A change of one place: which child to enter at each level, and what to do to what is there. */
interface Lie {
  turns: number[];
  change: { set: unknown } | { times: number } | { plus: number } | { remove: true } | { repeat: number };
}

const [requestFile, logFile, runs] = process.argv.slice(2);
const valid = JSON.parse(readFileSync(requestFile, 'utf8'));
const addon = loadAddon();

const numbers = [0, 1, 2, 0.5, -1, 2 ** 20, 2 ** 26, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 53 - 1, 2 ** 53, 2 ** 63, 2 ** 64];
const others = [Number.NaN, Number.POSITIVE_INFINITY, null, undefined, true, '', 'q4', 'relu', 'head', {}, []];
const change: fc.Arbitrary<Lie['change']> = fc.oneof(
  fc.constantFrom(...numbers, ...others).map((set) => ({ set })),
  fc.nat({ max: 5000 }).map((set) => ({ set })),
  fc.constantFrom(0.5, 2, 3, 16, 4096, 2 ** 32).map((times) => ({ times })),
  fc.constantFrom(-4096, -64, -1, 1, 4, 64, 4096).map((plus) => ({ plus })),
  fc.constant({ remove: true as const }),
  fc.constantFrom(2, 3000).map((repeat) => ({ repeat })),
);
const lie: fc.Arbitrary<Lie> = fc.record({ turns: fc.array(fc.nat(), { minLength: 3, maxLength: 3 }), change });

/** Follows the turns down to a leaf, or to an array when the last turn says so, and changes it. */
function tell(tree: Tree, { turns, change }: Lie): void {
  const keys = Object.keys(tree);
  if (keys.length === 0) return;
  const key = keys[turns[0] % keys.length] as keyof Tree;
  const value = tree[key] as unknown;
  const isTree = typeof value === 'object' && value !== null;
  if (isTree && turns.length > 1 && !('repeat' in change && turns[1] % 2 === 0)) {
    tell(value as Tree, { turns: turns.slice(1), change });
    return;
  }
  const set = (changed: unknown) => Object.assign(tree, { [key]: changed });
  if ('set' in change) set(change.set);
  else if ('times' in change) set(Number(value) * change.times);
  else if ('plus' in change) set(Number(value) + change.plus);
  else if ('remove' in change) Array.isArray(tree) ? tree.splice(Number(key), 1) : delete tree[key];
  else if (Array.isArray(value)) set(Array.from({ length: change.repeat }, () => value).flat());
}

const { extents, layout }: EngineRequest = valid;
const vast = extents.map((extent) => (extent.file === 'neurons' ? { ...extent, bytes: 2 ** 50 } : extent));
/** Requests that overflow a product of sizes, or ask for more memory than any machine has. */
const worst: Partial<EngineRequest>[] = [
  { extents: Array.from({ length: 2048 }, () => ({ ...extents[0], bytes: 2 ** 53 - 1 })) },
  { extents: vast },
  { extents: vast, layout: { ...layout, unitBytes: 2 ** 40 } },
  { extents: vast, layout: { ...layout, unitBytes: 2 ** 31 } },
  { layout: { ...layout, neuronsPerUnit: 2 ** 40, unitBytes: 2 ** 40, part1Stride: 2 ** 24 } },
  { layout: { ...layout, neuronsPerUnit: 2 ** 31, unitBytes: 2 ** 31, part1Stride: 2 ** 31 } },
  { neuronCount: 2 ** 24, expertCount: 2 ** 14, layerCount: 2 ** 12 },
  { contextLength: 2 ** 26, headCount: 2 ** 11, kvHeadCount: 2 ** 11, headDim: 2 ** 11 },
];

/** Opens, computes and closes; returns the code it was refused with, or `opened`. Anything else is thrown. */
async function attempt(request: EngineRequest): Promise<string> {
  const frequencies = request.ropeFrequencies as unknown;
  if (Array.isArray(frequencies)) request.ropeFrequencies = Float32Array.from(frequencies);
  let engine: Awaited<ReturnType<typeof addon.openEngine>>;
  try {
    engine = await addon.openEngine(request);
  } catch (error) {
    const { code } = error as { code: string };
    if (!CODES.includes(code)) throw error;
    return code;
  }
  const count = Math.min(STEP_TOKENS, request.contextLength);
  const tokens = Int32Array.from({ length: count }, (_, i) => i % request.vocabSize);
  const logits = new Float32Array(count * request.vocabSize);
  await engine.step({ ...oneRun(tokens, 0), logits, all: true });
  await engine.close();
  return 'opened';
}

const outcomes: Record<string, number> = {};
async function count(request: EngineRequest, story: unknown): Promise<void> {
  writeFileSync(logFile, JSON.stringify(story));
  const outcome = await attempt(request);
  outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
}

for (const lies of worst) {
  await count({ ...structuredClone(valid), ...lies }, Object.keys(lies));
  if (outcomes.opened) throw new Error(`opened with ${Object.keys(lies)}`);
}
const property = fc.asyncProperty(fc.array(lie, { minLength: 1, maxLength: 3 }), async (lies) => {
  const request = structuredClone(valid);
  for (const one of lies) tell(request, one);
  await count(request, lies);
});
await fc.assert(property, { numRuns: Number(runs), seed: 1, endOnFailure: true });
process.stdout.write(JSON.stringify(outcomes));
