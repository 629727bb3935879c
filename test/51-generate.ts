import fc from 'fast-check';
import t from 'tap';
import type { EngineCounters } from '../src/engine/counters.js';
import { chooseContext, Engine, nativeError, type StepEngine, type StepOptions } from '../src/engine/engine.js';
import { cutWindows, evaluateSequence, measurePerplexity, negativeLogLikelihood } from '../src/engine/evaluate.js';
import { type GenerateOptions, Generation, requirePrompt } from '../src/engine/generate.js';
import { seededRandom } from '../src/engine/random.js';
import { ropeFrequencies } from '../src/engine/rope.js';
import {
  chooseCandidates,
  largestIds,
  likeliest,
  penalizeRepeats,
  SAMPLING_DEFAULTS,
  sampleToken,
} from '../src/engine/sampler.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { formatRunReport, runReport } from '../src/report/run-report.js';
import { summarize } from '../src/report/statistics.js';
import { makeModel } from './support/models.js';

const GREEDY = { ...SAMPLING_DEFAULTS, temperature: 0 };
const ALL = { topK: 0, topP: 1, minP: 0 };
/** Token 1 has probability 1/2, then 3, 0, 2. */
const HALVES = Float32Array.from([0.15, 0.5, 0.1, 0.25].map(Math.log));

t.test('top-k, top-p and min-p, by hand', (t) => {
  const candidates = (options: Partial<typeof ALL>) => [...chooseCandidates(HALVES, { ...ALL, ...options })];
  t.strictSame(candidates({}), [0, 1, 2, 3]);
  t.strictSame(candidates({ topK: 2 }), [1, 3]);
  t.strictSame(candidates({ topK: 99, topP: 0.99 }), [1, 3, 0, 2]);
  t.strictSame(candidates({ topP: 0.7 }), [1, 3], '1/2 + 1/4 reach 0.7');
  t.strictSame(candidates({ topP: 0.8 }), [1, 3, 0], 'the one that crosses is kept');
  t.strictSame(candidates({ topP: 0 }), [1], 'one is always kept');
  t.strictSame(candidates({ topK: 2, topP: 0.7 }), [1, 3], 'top-p counts shares of what top-k kept: 2/3 + 1/3');
  t.strictSame(candidates({ topK: 2, topP: 0.66 }), [1]);
  t.strictSame(candidates({ minP: 0.4 }), [1, 3], 'at least 0.2');
  t.strictSame(candidates({ minP: 1 }), [1]);
  t.strictSame(candidates({ minP: 0.1, topP: 0.7 }), [1, 3], 'the shorter wins');
  t.end();
});

t.test('candidates are those of the definition, with everything sorted', (t) => {
  const logit = fc.oneof(fc.integer({ min: -8, max: 8 }), fc.double({ min: -20, max: 20, noNaN: true }));
  const logits = fc.array(logit, { minLength: 1, maxLength: 600 }).map((values) => Float32Array.from(values));
  const share = fc.double({ min: 0, max: 1, noNaN: true });
  const property = fc.property(logits, fc.integer({ min: 0, max: 700 }), share, share, (logits, topK, topP, minP) => {
    const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b);
    t.strictSame([...largestIds(logits, Math.min(topK, logits.length))], order.slice(0, topK));
    const found = [...chooseCandidates(logits, { topK, topP, minP })];
    const kept = topK > 0 ? order.slice(0, topK) : order;
    const weights = kept.map((id) => Math.exp(logits[id] - logits[order[0]]));
    const sum = weights.reduce((a, b) => a + b, 0);
    const slack = 1e-9;
    // A prefix of the sorted candidates, unless nothing is cut; no token fewer and no token more than the cuts allow, up to
    // rounding.
    if (topP < 1 || minP > 0 || kept.length < logits.length) t.strictSame(found, kept.slice(0, found.length));
    const before = weights.slice(0, found.length - 1).reduce((a, b) => a + b, 0);
    if (topP < 1) t.ok(before <= (topP + slack) * sum || found.length === 1);
    if (found.length < kept.length) {
      const reached = before + weights[found.length - 1] >= (topP - slack) * sum;
      t.ok((topP < 1 && reached) || weights[found.length] <= minP + slack);
    }
  });
  fc.assert(property, { numRuns: 300 });
  t.end();
});

t.test('the repeat penalty makes each recent token less likely, once', (t) => {
  const logits = Float32Array.of(2, -1, 3);
  penalizeRepeats(logits, 2, [0, 1, 0]);
  t.strictSame([...logits], [1, -2, 3]);
  const pick = (repeatLastN: number) =>
    sampleToken(Float32Array.of(1, 1.5, 2), { ...GREEDY, repeatPenalty: 3, repeatLastN }, [2, 1, 0], () => 0);
  t.equal(pick(0), 2, 'off');
  t.equal(pick(1), 2, 'token 0 alone is recent');
  t.equal(pick(2), 2);
  t.equal(pick(3), 2, 'all are: the order is as before');
  t.equal(
    sampleToken(Float32Array.of(1, 1.5, 2), { ...GREEDY, repeatPenalty: 3, repeatLastN: -1 }, [2], () => 0),
    1,
  );
  t.end();
});

t.test('greedy takes the largest, the lowest id of equals; a seed does not matter', (t) => {
  t.equal(likeliest(Float32Array.of(1, 3, 3)), 1);
  t.equal(
    sampleToken(Float32Array.of(1, 3, 3), { ...GREEDY, temperature: -1 }, [], () => 0.99),
    1,
  );
  t.end();
});

t.test('draws follow the probabilities, sharpened by temperature', (t) => {
  const random = seededRandom(5);
  const counts = (temperature: number) => {
    const found = [0, 0, 0, 0];
    for (let i = 0; i < 20_000; i++) {
      found[sampleToken(HALVES.slice(), { ...SAMPLING_DEFAULTS, ...ALL, temperature }, [], random)]++;
    }
    return found.map((count) => count / 20_000);
  };
  const near = (found: number[], expected: number[]) =>
    t.ok(
      found.every((share, i) => Math.abs(share - expected[i]) < 0.015),
      `${found} near ${expected}`,
    );
  near(counts(1), [0.15, 0.5, 0.1, 0.25]);
  const squares = [0.0225, 0.25, 0.01, 0.0625];
  near(
    counts(0.5),
    squares.map((square) => square / 0.345),
  );
  t.end();
});

t.test('logits that are no numbers are an error, never a token', (t) => {
  for (const bad of [[Number.NaN, 1], [1, Number.NaN], [Number.POSITIVE_INFINITY, 1], [Number.NEGATIVE_INFINITY]]) {
    for (const options of [GREEDY, SAMPLING_DEFAULTS, { ...SAMPLING_DEFAULTS, ...ALL }]) {
      t.throws(() => sampleToken(Float32Array.from(bad), options, [], Math.random), { code: 'E_MODEL' });
    }
  }
  const one = Float32Array.of(Number.NEGATIVE_INFINITY, 0, Number.NEGATIVE_INFINITY);
  t.equal(
    sampleToken(one, { ...SAMPLING_DEFAULTS, ...ALL }, [], () => 0.9999),
    1,
    'impossible tokens are never drawn',
  );
  t.end();
});

t.test('random numbers: the same for a seed, uniform, different for another', (t) => {
  const draw = (seed: number, count: number) => {
    const random = seededRandom(seed);
    return Array.from({ length: count }, random);
  };
  t.strictSame(draw(7, 5), draw(7, 5));
  t.not(draw(7, 1)[0], draw(8, 1)[0]);
  for (const seed of [0, 1, 0xfffffffe]) {
    const bins = new Array(16).fill(0);
    for (const number of draw(seed, 16_000)) bins[Math.floor(number * 16)]++;
    const chiSquare = bins.reduce((sum, count) => sum + (count - 1000) ** 2 / 1000, 0);
    t.ok(chiSquare < 45, `15 degrees of freedom: ${chiSquare}`);
  }
  t.end();
});

/** A model that follows token n by n + 1 (modulo its vocabulary) and checks that its cache is filled in order. */
class CountingEngine implements StepEngine {
  readonly batchSize = 7;
  readonly steps: number[][] = [];
  /** Which of the steps were to be exact. */
  readonly exact: boolean[] = [];
  #filled = 0;

  constructor(
    readonly contextLength: number,
    readonly vocabSize = 10,
  ) {}

  async step(
    tokens: Int32Array,
    position: number,
    logits: Float32Array,
    { all, exact }: StepOptions = {},
  ): Promise<void> {
    if (position !== 0 && position !== this.#filled) throw new Error(`position ${position}, filled ${this.#filled}`);
    this.#filled = position + tokens.length;
    if (this.#filled > this.contextLength) throw new Error('beyond the context');
    this.steps.push([...tokens]);
    this.exact.push(exact === true);
    const rows = all ? [...tokens] : [tokens[tokens.length - 1]];
    logits.fill(0);
    rows.forEach((token, row) => {
      logits[row * this.vocabSize + ((token + 1) % this.vocabSize)] = 5;
    });
  }
}

async function generate(engine: StepEngine, options: Partial<GenerateOptions>) {
  const defaults = { prompt: [1], maxTokens: -1, sampling: GREEDY, random: () => 0, endTokens: [] };
  const generation = new Generation(engine, { ...defaults, ...options });
  const tokens: number[] = [];
  for await (const token of generation.tokens()) tokens.push(token);
  return { tokens, timings: generation.timings, stopReason: generation.stopReason };
}

t.test('generation ends with an end token, enough tokens, a full context or an abort', async (t) => {
  const ended = await generate(new CountingEngine(100), { endTokens: [7, 5] });
  t.strictSame(ended.tokens, [2, 3, 4], 'the end token is not part of the text');
  t.equal(ended.stopReason, 'end_token');
  const enough = await generate(new CountingEngine(100), { maxTokens: 3 });
  t.strictSame([enough.tokens, enough.stopReason], [[2, 3, 4], 'length']);
  const none = await generate(new CountingEngine(100), { maxTokens: 0 });
  t.strictSame([none.tokens, none.stopReason], [[], 'length']);
  const full = await generate(new CountingEngine(6), { prompt: [1, 2] });
  t.strictSame([full.tokens, full.stopReason], [[3, 4, 5, 6], 'context'], 'prompt and text fill the context');
  const controller = new AbortController();
  const generation = new Generation(new CountingEngine(100), {
    prompt: [1],
    maxTokens: -1,
    sampling: GREEDY,
    random: () => 0,
    endTokens: [],
    signal: controller.signal,
  });
  let count = 0;
  for await (const _ of generation.tokens()) if (++count === 4) controller.abort();
  t.strictSame([count, generation.stopReason], [4, 'interrupted']);
  const before = await generate(new CountingEngine(100), { signal: AbortSignal.abort() });
  t.strictSame([before.tokens, before.stopReason], [[], 'interrupted']);
});

t.test('a prompt is computed in batches, a token at a time after it; each is timed', async (t) => {
  const engine = new CountingEngine(1000);
  const prompt = Array.from({ length: 15 }, (_, i) => i % 10);
  const { timings } = await generate(engine, { prompt, maxTokens: 3 });
  t.strictSame(
    engine.steps.map((step) => step.length),
    [7, 7, 1, 1, 1],
  );
  t.strictSame(engine.exact, [true, true, true, false, false], 'no prediction in prefill');
  t.strictSame(engine.steps.slice(0, 3).flat(), prompt);
  t.match(timings, { promptTokens: prompt.length, generatedTokens: 3 });
  t.equal(timings.latenciesMs.length, 2);
  t.ok(timings.firstTokenMs >= timings.promptMs && timings.promptMs > 0);
});

t.test('prompts that cannot be are refused in words', (t) => {
  const model = { contextLength: 4, vocabSize: 10 };
  t.doesNotThrow(() => requirePrompt([0, 9, 1], model));
  t.throws(() => requirePrompt([], model), { code: 'E_EMPTY_PROMPT' });
  t.throws(() => requirePrompt([1, 10], model), { code: 'E_USAGE', message: /token 10 \(number 2/ });
  t.throws(() => requirePrompt([1, 2, 3, 4], model), { code: 'E_CONTEXT_FULL', message: /4 tokens, the context 4/ });
  t.end();
});

t.test('windows: the worked example, and every token predicted once', (t) => {
  const windows = (bos: number | null) => [...cutWindows([1, 2, 3, 4, 5], 3, bos)];
  t.strictSame(windows(0), [
    { inputs: [0, 1], targets: [1, 2] },
    { inputs: [0, 3], targets: [3, 4] },
    { inputs: [0], targets: [5] },
  ]);
  t.strictSame(windows(null), [
    { inputs: [1, 2], targets: [2, 3] },
    { inputs: [4], targets: [5] },
  ]);
  const tokens = fc.array(fc.integer({ min: 1, max: 9 }), { maxLength: 50 });
  fc.assert(
    fc.property(tokens, fc.integer({ min: 2, max: 9 }), (tokens, context) => {
      const cut = [...cutWindows(tokens, context, 0)];
      t.strictSame(
        cut.flatMap((window) => window.targets),
        tokens,
      );
      t.ok(cut.every(({ inputs, targets }) => inputs.length === targets.length && inputs.length < context));
    }),
  );
  t.end();
});

t.test('perplexity: of a uniform model its vocabulary, of the counting model what its logits say', async (t) => {
  t.equal(negativeLogLikelihood(new Float32Array(8), 3), Math.log(8));
  t.equal(negativeLogLikelihood(Float32Array.of(1000, 0), 0), 0, 'no overflow');
  t.throws(() => negativeLogLikelihood(Float32Array.of(Number.NaN, 1), 1), { code: 'E_MODEL' });
  const engine = new CountingEngine(20, 4);
  const soFar: number[] = [];
  const windows = cutWindows([1, 2, 3, 0, 1], 4, 0);
  const result = await measurePerplexity(engine, windows, ({ tokens }) => soFar.push(tokens));
  const nll = Math.log(Math.exp(5) + 3) - 5;
  // All follow their predecessor but the first of the second window: 0 behind BOS 0.
  t.equal(result.tokens, 5);
  t.ok(Math.abs(result.nll_per_token - (nll * 4 + nll + 5) / 5) < 1e-6);
  t.ok(Math.abs(result.ppl - Math.exp(result.nll_per_token)) < 1e-9);
  t.strictSame(soFar, [3, 5]);
});

t.test('a sequence is evaluated in pieces of bounded memory', async (t) => {
  const engine = new CountingEngine(1000, 1 << 20);
  const found: number[] = [];
  await evaluateSequence(engine, [5, 6, 7, 8, 9, 10], (rows, first) => {
    t.ok(rows.byteLength <= 2 ** 24);
    for (let row = 0; row << 20 < rows.length; row++)
      found[first + row] = likeliest(rows.subarray(row << 20, (row + 1) << 20));
  });
  t.strictSame(found, [6, 7, 8, 9, 10, 11]);
  t.ok(engine.steps.length > 1);
});

t.test('rotary frequencies, plain and scaled', (t) => {
  const rope = (head_dim: number, theta: number, scaling: Parameters<typeof ropeFrequencies>[0]['position']) => [
    ...ropeFrequencies({ head_dim, position: { ...scaling, theta } as never }),
  ];
  const plain = { kind: 'rope', theta: 0, scaling: null } as const;
  t.strictSame(rope(4, 10_000, plain), [1, Math.fround(0.01)]);
  t.strictSame(rope(4, 10_000, { ...plain, scaling: { kind: 'linear', factor: 4 } }), [0.25, Math.fround(0.0025)]);
  t.strictSame(rope(4, 1, { kind: 'learned' }), []);
  // Wavelengths 2 pi, 2 pi 100, 2 pi 10^4 and 2 pi 10^6 with borders at 8192 / 4 and 8192 / 1 positions.
  const llama3 = {
    kind: 'llama3',
    factor: 8,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_context_length: 8192,
  } as const;
  const scaled = rope(8, 1e8, { ...plain, scaling: llama3 });
  t.strictSame([scaled[0], scaled[1], scaled[2], scaled[3]], [1, 0.01, 1.25e-5, 1.25e-7].map(Math.fround));
  // Between the borders: wavelength 4096 is a third of the way from 8192 / 1 to 8192 / 4 in 1 / wavelength.
  const theta = (4096 / (2 * Math.PI)) ** 2;
  const blended = rope(4, theta, { ...plain, scaling: llama3 })[1];
  const frequency = (2 * Math.PI) / 4096;
  t.ok(Math.abs(blended / frequency - ((2 / 3) * (1 / 8) + 1 / 3)) < 1e-6);
  t.end();
});

t.test('the engine: options, memory and greedy text as its logits say', async (t) => {
  const scratch = t.testdir();
  const model = await openModelDirectory(await makeModel(scratch, { family: 'llama', context: 300 }));
  t.equal(chooseContext(model, 0), 300);
  t.equal(chooseContext(model, 999), 999, 'rotary positions go on');
  const learned = await openModelDirectory(await makeModel(scratch, { family: 'opt', context: 40 }));
  t.throws(() => chooseContext(learned, 41), { code: 'E_USAGE', message: /41 is more than the 40 positions/ });
  const foreign = process.arch === 'arm64' ? 'avx2' : 'neon';
  const options = { context: 0, threads: 1, kernelSet: foreign } as const;
  await t.rejects(Engine.open(model, options), { code: 'E_CPU', hint: /scalar/ });

  const engine = await Engine.open(model, { context: 64, threads: 2 });
  t.match(engine, { contextLength: 64, threads: 2, vocabSize: 263 });
  const prompt = [1, 50, 60, 70];
  const { tokens } = await generate(engine, { prompt, maxTokens: 20 });
  const text = [...prompt, ...tokens];
  const greedy: number[] = [];
  await evaluateSequence(engine, text, (rows, first) => {
    for (let row = 0; row * 263 < rows.length; row++)
      greedy[first + row] = likeliest(rows.subarray(row * 263, (row + 1) * 263));
  });
  t.strictSame(greedy.slice(prompt.length - 1, -1), tokens);
  await engine.close();
  await t.rejects(engine.step(Int32Array.of(1), 0, new Float32Array(263)));
});

t.test('errors of the addon in words', (t) => {
  const codes = {
    NATIVE_IO: 'E_IO',
    NATIVE_MEMORY: 'E_MEMORY',
    NATIVE_CPU: 'E_CPU',
    NATIVE_UNIT: 'E_NPU',
    NATIVE_CHECKSUM: 'E_CHECKSUM',
  };
  for (const [code, expected] of Object.entries(codes)) {
    const error = nativeError(Object.assign(new Error('why'), { code }), 'open m.pi2');
    t.match(error, { code: expected, message: /cannot open m\.pi2.*why/ });
  }
  const unforeseen = new Error('x');
  t.equal(nativeError(unforeseen, 'open'), unforeseen);
  t.end();
});

t.test('percentiles by nearest rank', (t) => {
  const hundred = Array.from({ length: 100 }, (_, i) => 100 - i);
  t.strictSame(summarize(hundred), { mean: 50.5, p50: 50, p90: 90, p99: 99 });
  t.strictSame(summarize([3]), { mean: 3, p50: 3, p90: 3, p99: 3 });
  t.strictSame(summarize([]), { mean: null, p50: null, p90: null, p99: null });
  t.end();
});

t.test('the report: stable names, units last, nothing made up', async (t) => {
  const model = await openModelDirectory(await makeModel(t.testdir(), { family: 'bamboo' }, 'q4'));
  const counters = (tokens: number, weightBytesRead: number): EngineCounters => ({
    tokens,
    weightBytesRead,
    kvBytesRead: 0,
    neuronsFired: 10,
    neuronsSeen: 40,
    weightBytes: 1000,
    kvBytes: 2000,
    unitBytes: 0,
    scratchBytes: 3000,
    majorFaults: 5 * tokens,
    stream: {
      hotHits: 2 * tokens,
      coldHits: tokens,
      misses: tokens,
      reads: 3 * tokens,
      askedBytes: 100 * tokens,
      readBytes: 200 * tokens,
      usedBytes: 50 * tokens,
      sparedBytes: 10 * tokens,
      gateStallNs: 1e6 * tokens,
      rowStallNs: 3e6 * tokens,
      prefetched: 0,
      prefetchUsed: 0,
      twoPhases: true,
      storage: 'direct, io_uring',
    },
    predictor: {
      ns: 1e6 * tokens,
      weightBytesRead: 0,
      scored: 40 * tokens,
      chosen: 5 * tokens,
      skippedOnFlash: tokens,
    },
  });
  const engine = {
    contextLength: 128,
    threads: 2,
    kernelSet: 'avx2',
    cpuFeatures: ['avx2', 'fma'],
    loadMs: 12.5,
    budgetBytes: 5000,
    storage: 'direct, io_uring',
    gatesResidentShare: 0.5,
    regions: { gatesBytes: 1000, hotBytes: 0, coldBytes: 2048, rowsShare: 0.25 },
    operatingPoint: null,
    name: 'pi2',
    ablated: [],
    batchSize: 16,
    unit: null,
  } as const;
  const timings = { promptTokens: 20, promptMs: 40, generatedTokens: 3, firstTokenMs: 41, latenciesMs: [10, 30] };
  const facts = {
    manifest: model.manifest,
    engine,
    timings,
    stopReason: 'length',
    seed: 7,
    pageCacheBytes: 4096,
    roof: { memory: 1e6, flash: 1e5 },
  } as const;
  const report = runReport({ ...facts, countersAfterPrompt: counters(20, 500), counters: counters(22, 900) });
  t.match(report, {
    type: 'report',
    model: 'bamboo-q4',
    family: 'bamboo',
    quantization: 'q4',
    prompt_tokens_per_second: 500,
    decode_tokens_per_second: 50,
    time_to_first_token_ms: 41,
    token_latency_ms_mean: 20,
    token_latency_ms_p50: 10,
    token_latency_ms_p99: 30,
    weight_bytes_per_token: 200,
    neurons_fired_share: 0.25,
    load_mode: 'direct',
    storage: 'direct, io_uring',
    memory_budget_bytes: 5000,
    gates_resident_share: 0.5,
    rows_resident_share: 0.25,
    cold_bytes: 2048,
    page_cache_bytes: 4096,
    batch_size: 16,
    kept_share: null,
    neurons_computed_share: null,
    major_faults_per_token: 5,
    hot_hit_share: 0.5,
    cold_hit_share: 0.25,
    miss_share: 0.25,
    flash_asked_bytes_per_token: 100,
    flash_read_bytes_per_token: 200,
    flash_reads_per_token: 3,
    flash_used_bytes_per_token: 50,
    flash_spared_bytes_per_token: 10,
    gate_stall_ms_per_token: 1,
    row_stall_ms_per_token: 3,
    stall_ms_per_token: 4,
    stall_share: 0.1,
    kv_bytes_per_token: 0,
    memory_bytes_per_second: 10_000,
    memory_bandwidth_bytes_per_second: 1e6,
    memory_bandwidth_share: 0.01,
    flash_bytes_per_second: 10_000,
    flash_bandwidth_bytes_per_second: 1e5,
    flash_bandwidth_share: 0.1,
    seed: 7,
    version: /^\d+\.\d+\.\d+$/,
    commit: /^([0-9a-f]{40}|unknown)$/,
  });
  t.ok(report.peak_memory_bytes > 10e6);
  t.match(formatRunReport(report), /decode +3 tokens, 50\.00 tokens\/s\n/);
  t.match(
    formatRunReport(report),
    /roofline +0\.00 of 0\.00 GB\/s memory \(1 %\), 0\.00 of 0\.00 GB\/s flash \(10 %\)/,
  );
  t.match(formatRunReport(report), /neurons found +hot 50\.0 %, cold 25\.0 %, on flash 25\.0 %/);
  t.match(formatRunReport(report), /neurons kept +gates 1000 B \(50\.0 %\), hot 0 B, cold 2\.00 KiB \(25\.0 %\)/);
  const point = { kept_share: 0.25, perplexity: 10.1 };
  const predicted = runReport({
    ...facts,
    manifest: { ...model.manifest, predictor: { quality: { exact_perplexity: 10 } } as never },
    engine: { ...engine, operatingPoint: point as never },
    countersAfterPrompt: counters(20, 500),
    counters: counters(22, 900),
  });
  t.match(predicted, {
    kept_share: 0.25,
    perplexity_ratio: 1.01,
    neurons_computed_per_token: 5,
    neurons_skipped_per_token: 1,
    neurons_computed_share: 0.125,
    predictor_ms_per_token: 1,
    predictor_share: 0.025,
  });
  t.match(
    formatRunReport(predicted),
    /neurons predicted +12\.5 % computed, 1\.0 a token left on flash; perplexity x1\.01/,
  );
  const whole = { ...engine, storage: 'resident', gatesResidentShare: 1, regions: null };
  const { stream: _, ...residentCounters } = counters(22, 900);
  const resident = runReport({
    ...facts,
    engine: whole,
    countersAfterPrompt: residentCounters,
    counters: residentCounters,
  });
  t.match(resident, { load_mode: 'resident', hot_hit_share: null, stall_share: null, flash_reads_per_token: null });
  t.notMatch(formatRunReport(resident), /flash/);
  const nothing = { promptTokens: 20, promptMs: 0, generatedTokens: 0, firstTokenMs: 0, latenciesMs: [] };
  const empty = runReport({
    ...facts,
    timings: nothing,
    stopReason: 'interrupted',
    countersAfterPrompt: counters(0, 0),
    counters: { ...counters(0, 0), neuronsSeen: 0 },
  });
  for (const [key, value] of Object.entries(empty)) t.ok(value === null || !Number.isNaN(value), key);
  t.match(formatRunReport(empty), /first token +-\n/);
});
