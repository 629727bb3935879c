/** The child program that measures our engine: `peer-ours.js JSON`, the JSON being an `OurRequest`. */
import { Engine } from '../src/engine/engine.js';
import { type Random, seededRandom } from '../src/engine/random.js';
import { SAMPLING_DEFAULTS, sampleToken } from '../src/engine/sampler.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { streamReport } from '../src/report/stream-report.js';
import { type PeerCounts, type PeerEngine, serveEngine } from './peer-worker.js';

/** What our engine is opened with. */
export interface OurRequest {
  model: string;
  /** Positions of the KV cache. */
  context: number;
  threads: number;
  /** Budget of the whole process; null takes what the machine can give. */
  memoryBytes: number | null;
  exact: boolean;
}

const SEED = 1;

async function open(request: OurRequest): Promise<PeerEngine> {
  const model = await openModelDirectory(request.model);
  const { context, threads, exact, memoryBytes } = request;
  const memory = memoryBytes === null ? undefined : ({ kind: 'bytes', bytes: memoryBytes } as const);
  const engine = await Engine.open(model, { context, threads, exact, memory });
  const random: Random = seededRandom(SEED);
  const logits = new Float32Array(engine.vocabSize);
  const randomToken = () => Math.floor(random() * engine.vocabSize);
  let before = engine.counters();
  const counts = (tokens: number): PeerCounts => {
    const after = engine.counters();
    const { miss_share } = streamReport(before, after, 0, engine.threads);
    const weightBytes = (after.weightBytesRead - before.weightBytesRead) / tokens;
    return { weightBytes, hitShare: miss_share === null ? null : 1 - miss_share };
  };
  const predicted = engine.operatingPoint === null ? 'exact' : 'predicted';
  return {
    facts: { threads: engine.threads, how: `${engine.counters().stream?.storage ?? 'resident'}, ${predicted}` },
    async prefill(tokens) {
      before = engine.counters();
      for (let position = 0; position < tokens; position += engine.batchSize) {
        const batch = Int32Array.from({ length: Math.min(engine.batchSize, tokens - position) }, randomToken);
        // As `run` computes prompts.
        await engine.step(batch, position, logits, { exact: true, prompt: true });
      }
      return counts(tokens);
    },
    // What a model skips depends on its tokens: each is drawn from its own logits, not from a hat. Choosing is not timed.
    async decode(position) {
      if (position === 0) before = engine.counters();
      const token = position === 0 ? randomToken() : sampleToken(logits, SAMPLING_DEFAULTS, [], random);
      const start = performance.now();
      await engine.step(Int32Array.of(token), position, logits);
      return { ms: performance.now() - start };
    },
    decodeCounts: counts,
  };
}

await serveEngine(() => open(JSON.parse(process.argv[2])));
