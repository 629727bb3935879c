/**
 * The child program that measures llama.cpp: `peer-llama.js JSON`, the JSON being a `LlamaRequest`. It decodes as llama-bench
 * does: batches of random tokens, logits of the last one, no token chosen. node-llama-cpp brings the prebuilt library; its
 * public calls choose a token each time and cost up to a tenth of a small model's speed, so the calls below them are used.
 */
import { readFileSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { type Random, seededRandom } from '../src/engine/random.js';
import { PACKAGE_ROOT } from './models.js';
import { type PeerEngine, serveEngine } from './peer-worker.js';

/** What llama.cpp is opened with. */
export interface LlamaRequest {
  /** A GGUF file. */
  model: string;
  context: number;
  /** Most tokens of a prompt that are computed together. */
  batch: number;
  threads: number;
  /** Bytes of weights that a token reads. */
  weightBytesPerToken: number;
  vocabSize: number;
  /** A folder with the only CPU backend to choose from; null leaves the choice to llama.cpp. */
  backends: string | null;
}

/** What is used of node-llama-cpp 3.22.1. */
interface NodeLlama {
  getLlama(options: object): Promise<{ loadModel(options: object): Promise<LlamaModel> }>;
}
interface LlamaModel {
  createContext(options: object): Promise<{ _ctx: AddonContext; getSequence(): { _sequenceId: number } }>;
}
/** Its thin layer over `llama_decode` and `llama_memory_seq_rm`. */
interface AddonContext {
  initBatch(tokens: number): void;
  addToBatch(sequence: number, position: number, tokens: Uint32Array, logitIndexes: Uint32Array): Uint32Array;
  decodeBatch(): Promise<void>;
  removeTokenCellsFromSequence(sequence: number, start: number, end: number): boolean;
}

const MODULES = join(PACKAGE_ROOT, 'bench', 'llama', 'node_modules');
const SEED = 1;

async function open(request: LlamaRequest): Promise<PeerEngine> {
  const { context: contextSize, batch: batchSize, threads, backends } = request;
  // The first folder of backends that is loaded wins; getLlama loads its own afterwards, and only if there is none.
  if (backends !== null) createRequire(import.meta.url)(addonFile()).loadBackends(backends);
  const { getLlama }: NodeLlama = await import(pathToFileURL(join(MODULES, 'node-llama-cpp', 'dist', 'index.js')).href);
  const llama = await getLlama({
    gpu: false,
    build: 'never',
    skipDownload: true,
    maxThreads: threads,
    logLevel: 'error',
  });
  // Safety checks of the wrapper would refuse a file larger than memory, which mapping allows.
  const unchecked = { ignoreMemorySafetyChecks: true, useMmap: true, useMlock: false };
  const model = await llama.loadModel({ modelPath: request.model, gpuLayers: 0, ...unchecked });
  const sizes = { contextSize, batchSize, sequences: 1, threads: { ideal: threads, min: threads } };
  const context = await model.createContext({ ...sizes, ...unchecked, failedCreationRemedy: false });
  const random: Random = seededRandom(SEED);
  const native = context._ctx;
  const { _sequenceId: sequence } = context.getSequence();
  const decode = (position: number, tokens: number, last: boolean) => {
    native.initBatch(tokens);
    const ids = Uint32Array.from({ length: tokens }, () => Math.floor(random() * request.vocabSize));
    native.addToBatch(sequence, position, ids, last ? Uint32Array.of(tokens - 1) : Uint32Array.of());
    return native.decodeBatch();
  };
  const counts = { weightBytes: request.weightBytesPerToken, hitShare: null };
  return {
    facts: { threads, how: `${backendName()}, ${memoryKind(request.model)}` },
    async prefill(tokens) {
      native.removeTokenCellsFromSequence(sequence, -1, -1);
      for (let position = 0; position < tokens; position += batchSize) {
        const count = Math.min(batchSize, tokens - position);
        await decode(position, count, position + count === tokens);
      }
      // Weights are read once a batch, from memory or from caches of the processor: no count of it means anything.
      return { weightBytes: null, hitShare: null };
    },
    async decode(position) {
      if (position === 0) native.removeTokenCellsFromSequence(sequence, -1, -1);
      const start = performance.now();
      await decode(position, 1, true);
      return { ms: performance.now() - start };
    },
    decodeCounts: () => counts,
  };
}

/** The file of the prebuilt addon: getLlama finds the same one, and Node loads it once. */
function addonFile(): string {
  const folder = join(MODULES, '@node-llama-cpp', `linux-${process.arch}`, 'bins', `linux-${process.arch}`);
  return join(folder, 'llama-addon.node');
}

/** The CPU backend that this process has loaded: `sapphirerapids`. */
function backendName(): string {
  return /\/libggml-cpu-(\w[\w.]*)\.so$/m.exec(readFileSync('/proc/self/maps', 'latin1'))?.[1] ?? 'unknown backend';
}

/** Whether weights are used where the file is mapped, or were copied (repacked) into memory while loading. */
function memoryKind(file: string): string {
  const anonymousKiB = Number(/^RssAnon:\s+(\d+) kB$/m.exec(readFileSync('/proc/self/status', 'latin1'))?.[1]);
  return anonymousKiB * 1024 > statSync(file).size / 2 ? 'copied' : 'mapped';
}

await serveEngine(() => open(JSON.parse(process.argv[2])));
