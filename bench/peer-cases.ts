/** What is measured beside what: shapes, caps, and the engines and models that take turns under each cap. */
import { existsSync } from 'node:fs';
import { mkdir, readFile, rm, symlink } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { Pi2Error } from '../src/base/error.js';
import type { Setting } from './activation-settings.js';
import { generateGguf, type MatrixType, shapeBytes } from './gguf-model.js';
import { CACHE, PACKAGE_ROOT, prepareSynthetic } from './models.js';
import type { LlamaRequest } from './peer-llama.js';
import type { OurRequest } from './peer-ours.js';
import { SHAPES, type Shape } from './shapes.js';

/** A way to run a shape under a cap: one line a test of the table. */
export interface PeerEntry {
  engine: 'llama.cpp' | 'powerinfer2';
  /** What tells it from the other lines: `Q4_0`, `dReLU predicted`. */
  name: string;
  model: string;
  /** The program of its process, and what it is given. */
  program: string;
  request: LlamaRequest | OurRequest;
  /** How its reads reach flash: near one another (mapped files) or neuron by neuron. */
  reads: 'sequential' | 'random';
}

/** What a cap is made of. */
export interface PeerCap {
  /** Of the bytes of the FFNs, the share that does not fit; null for a cap given in bytes. */
  offload: number | null;
  /** Memory and page cache of one process; null is no cap. */
  bytes: number | null;
}

/** Sizes that all entries of a run share. */
export interface PeerSizes {
  threads: number;
  promptTokens: number;
  generatedTokens: number;
  /** Allows shapes of tens of gigabytes. */
  isLargeAllowed: boolean;
}

/**
 * Beside the weights: process, KV cache and scratch. 0.7 GiB for models of 7B and above, less for a model that 0.7 GiB
 * would hold whole.
 */
const RESERVE_BYTES = Math.floor(0.7 * 2 ** 30);
const SMALL_RESERVE_BYTES = 143 * 2 ** 20;
const SMALL_HIDDEN_SIZE = 4096;
/** Between our budget and the cap: buffers of the kernel, and page cache of the program itself. */
const MARGIN_BYTES = 64 * 2 ** 20;
const SEED = 1;
const LLAMA_BATCH = 512;
/** llama.cpp repacks this at load into memory that cannot be given back, and is fastest with it. */
const RESIDENT_TYPE: MatrixType = 'q4_0';
/** Of near the same size, and used where the file is mapped, by all backends but those with AMX. */
const MAPPED_TYPE: MatrixType = 'iq4_xs';
/** The fastest backend without AMX for processors that have it. */
const BACKEND_WITHOUT_AMX = 'icelake';

/**
 * The cap for a share of the FFN's bytes that does not fit: everything else, the rest of the FFN, and a reserve. All in
 * bytes of the shape as llama.cpp stores it in Q4_0, for every engine.
 */
export function capFor(shape: Shape, offload: number): PeerCap {
  if (offload === 0) return { offload, bytes: null };
  const { total, ffn } = shapeBytes(shape, RESIDENT_TYPE);
  const reserve = shape.hiddenSize < SMALL_HIDDEN_SIZE ? SMALL_RESERVE_BYTES : RESERVE_BYTES;
  return { offload, bytes: Math.floor(total - offload * ffn + reserve) };
}

/** The shapes that can be compared: those that llama.cpp can run, which have a dReLU twin for ours. */
export function peerShapes(): string[] {
  const names = SHAPES.map(({ name }) => name);
  return names.filter((name) => names.includes(`${name}-drelu`));
}

/** The entries under a cap, ready to start; models that are missing are made in the cache. llama.cpp comes first. */
export async function prepareEntries(
  shapeName: string,
  cap: PeerCap,
  sizes: PeerSizes,
  only: readonly string[],
  log: (line: string) => void,
): Promise<PeerEntry[]> {
  const wanted = (name: string) => only.length === 0 || only.includes(name);
  const shape = shapeNamed(shapeName);
  const context = Math.max(sizes.promptTokens, sizes.generatedTokens) + 8;
  const entries: PeerEntry[] = [];
  if (wanted('llama')) entries.push(await llamaEntry(shape, cap, sizes, context, log));
  const ours = async (twin: Shape, name: string, exact: boolean, setting?: Setting): Promise<PeerEntry> => {
    const { isLargeAllowed } = sizes;
    const model = { shape: twin, setting, quantization: 'q4', withCheckpoint: false, isLargeAllowed } as const;
    const { path } = await prepareSynthetic(model, log);
    const memoryBytes = cap.bytes === null ? null : cap.bytes - MARGIN_BYTES;
    const request: OurRequest = { model: path, context, threads: sizes.threads, memoryBytes, exact };
    const program = join(PACKAGE_ROOT, 'dist', 'bench', 'peer-ours.js');
    return { engine: 'powerinfer2', name, model: basename(path), program, request, reads: 'random' };
  };
  const sparse = shapeNamed(`${shapeName}-drelu`);
  if (wanted('predicted')) entries.push(await ours(sparse, 'dReLU as published, predicted', false, 'published'));
  if (wanted('exact')) entries.push(await ours(sparse, 'dReLU as published, exact', true, 'published'));
  if (wanted('measured')) entries.push(await ours(sparse, 'dReLU as measured, predicted', false, 'measured'));
  // With nothing to skip, neurons on flash are a matter of bandwidth alone: compared where all is in memory.
  if (wanted('dense') && cap.bytes === null) entries.push(await ours(shape, 'SiLU, dense', true));
  return entries;
}

async function llamaEntry(
  shape: Shape,
  cap: PeerCap,
  sizes: PeerSizes,
  context: number,
  log: (line: string) => void,
): Promise<PeerEntry> {
  requireLlama();
  const type = cap.bytes === null ? RESIDENT_TYPE : MAPPED_TYPE;
  const model = join(CACHE, `synthetic-${shape.name}-${type}.gguf`);
  await mkdir(CACHE, { recursive: true });
  log(`synthetic model ${model}`);
  await generateGguf(shape, type, SEED, model);
  const { total, unused } = shapeBytes(shape, type);
  const needsOtherBackend = cap.bytes !== null && /\bamx_int8\b/.test(await readFile('/proc/cpuinfo', 'latin1'));
  const request: LlamaRequest = {
    model,
    context,
    batch: LLAMA_BATCH,
    threads: sizes.threads,
    weightBytesPerToken: total - unused,
    vocabSize: shape.vocabSize,
    backends: needsOtherBackend ? await backendFolder(BACKEND_WITHOUT_AMX) : null,
  };
  const program = join(PACKAGE_ROOT, 'dist', 'bench', 'peer-llama.js');
  const name = type.toUpperCase();
  return { engine: 'llama.cpp', name, model: basename(model), program, request, reads: 'sequential' };
}

/** A folder with one of node-llama-cpp's CPU backends alone. */
async function backendFolder(name: string): Promise<string> {
  const file = `libggml-cpu-${name}.so`;
  const platform = `linux-${process.arch}`;
  const folder = join(CACHE, `backend-${name}`);
  await rm(folder, { recursive: true, force: true });
  await mkdir(folder, { recursive: true });
  await symlink(join(LLAMA_MODULES, '@node-llama-cpp', platform, 'bins', platform, file), join(folder, file));
  return folder;
}

const LLAMA_MODULES = join(PACKAGE_ROOT, 'bench', 'llama', 'node_modules');

function requireLlama(): void {
  if (existsSync(join(LLAMA_MODULES, 'node-llama-cpp'))) return;
  const hint =
    'once: npm install --no-save --prefix bench/llama (700 MB); or leave it out with --only predicted,exact,dense';
  throw new Pi2Error('E_FILE', 'llama.cpp is not installed: bench/llama/node_modules has no node-llama-cpp', hint);
}

function shapeNamed(name: string): Shape {
  const found = SHAPES.find((shape) => shape.name === name);
  if (found === undefined) throw new Pi2Error('E_USAGE', `there is no shape ${name}`);
  return found;
}
