// The trace of a model replayed: references against plain models and brute force, the engine's cache against the running engine.
import { join } from 'node:path';
import fc from 'fast-check';
import t from 'tap';
import { comparePolicies, placesByRate } from '../bench/cache-compare.js';
import { beladyHits, countNeeds, hottest, lruHits, type Places, windowHits } from '../bench/cache-policies.js';
import { listNeeds, type NeedList, type NeuronTrace, recordTrace } from '../bench/cache-trace.js';
import { loadAddon } from '../src/engine/addon.js';
import type { EngineRequest, StreamRequest } from '../src/engine/contract.js';
import { Engine } from '../src/engine/engine.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { makeModel } from './support/models.js';
import { oneRun } from './support/one-run.js';

const addon = loadAddon();
const scratch = t.testdir();

/** A trace in which each routed expert's neurons fire at random, low numbers more often. */
function randomTrace(most: {
  tokens: number;
  layers: number;
  experts: number;
  neurons: number;
}): fc.Arbitrary<NeuronTrace> {
  const shape = fc.record({
    tokens: fc.integer({ min: Math.ceil(most.tokens / 4), max: most.tokens }),
    layerCount: fc.integer({ min: 1, max: most.layers }),
    expertCount: fc.integer({ min: 1, max: most.experts }),
    neuronCount: fc.integer({ min: Math.ceil(most.neurons / 4), max: most.neurons }),
  });
  return shape.chain(({ tokens, layerCount, expertCount, neuronCount }) => {
    const banks = tokens * layerCount * expertCount;
    const draws = fc.array(fc.nat(99), { minLength: banks * neuronCount, maxLength: banks * neuronCount });
    return fc.record({ draws, isUsed: fc.array(fc.boolean(), { minLength: banks, maxLength: banks }) }).map((drawn) => {
      const bankBytes = Math.ceil(neuronCount / 8);
      const fired = new Uint8Array(banks * bankBytes);
      const routed = new Uint8Array(tokens * layerCount * Math.ceil(expertCount / 8));
      for (let bank = 0; bank < banks; bank++) {
        if (expertCount > 1 && !drawn.isUsed[bank]) continue;
        const expert = bank % expertCount;
        routed[Math.floor(bank / expertCount) * Math.ceil(expertCount / 8) + (expert >> 3)] |= 1 << (expert % 8);
        for (let n = 0; n < neuronCount; n++) {
          const fires = drawn.draws[bank * neuronCount + n] < 60 / (1 + n / 3);
          if (fires) fired[bank * bankBytes + (n >> 3)] |= 1 << (n % 8);
        }
      }
      return { tokens, layerCount, expertCount, neuronCount, fired, routed };
    });
  });
}

/** The needs of a trace as [token, unit], bit by bit. */
function plainNeeds({ tokens, layerCount, expertCount, neuronCount, fired }: NeuronTrace): [number, number][] {
  const bankCount = layerCount * expertCount;
  const needs: [number, number][] = [];
  for (let token = 0; token < tokens; token++) {
    for (let unit = 0; unit < bankCount * neuronCount; unit++) {
      const bank = Math.floor(unit / neuronCount);
      const n = unit % neuronCount;
      const byte = fired[(token * bankCount + bank) * Math.ceil(neuronCount / 8) + (n >> 3)];
      if ((byte >> (n % 8)) & 1) needs.push([token, unit]);
    }
  }
  return needs;
}

/** LRU as a list for each pool, the most recent last. */
function plainLru(needs: NeedList, trace: NeuronTrace, places: Places, countFrom: number): number {
  const pools = new Map<number, number[]>();
  let hits = 0;
  for (const [token, unit] of plainNeeds(trace)) {
    const bank = Math.floor(unit / needs.neuronCount);
    const [pool, capacity] = typeof places === 'number' ? [0, places] : [bank, places[bank]];
    const kept = pools.get(pool) ?? [];
    if (kept.includes(unit) && token >= countFrom) hits++;
    pools.set(pool, capacity === 0 ? [] : [...kept.filter((other) => other !== unit), unit].slice(-capacity));
  }
  return hits;
}

/** The most that any choice of what to keep finds: every set that can be kept, after every need. */
function mostHits(trace: NeuronTrace, capacity: number, countFrom: number): number {
  let reached = new Map<string, number>([['', 0]]);
  for (const [token, unit] of plainNeeds(trace)) {
    const next = new Map<string, number>();
    const reach = (kept: number[], hits: number) => {
      const key = [...kept].sort((a, b) => a - b).join();
      next.set(key, Math.max(hits, next.get(key) ?? 0));
    };
    for (const [key, hits] of reached) {
      const kept = key === '' ? [] : key.split(',').map(Number);
      if (kept.includes(unit)) {
        reach(kept, hits + (token >= countFrom ? 1 : 0));
        continue;
      }
      reach(kept, hits);
      if (capacity === 0) continue;
      if (kept.length < capacity) reach([...kept, unit], hits);
      for (const victim of kept) reach([...kept.filter((other) => other !== victim), unit], hits);
    }
    reached = next;
  }
  return Math.max(...reached.values());
}

t.test('a trace as numbers is the trace, in order', (t) => {
  const property = fc.property(randomTrace({ tokens: 6, layers: 2, experts: 3, neurons: 20 }), (trace) => {
    const needs = listNeeds(trace);
    const listed: [number, number][] = [];
    for (let token = 0; token < needs.tokens; token++) {
      for (let i = needs.starts[token]; i < needs.starts[token + 1]; i++) listed.push([token, needs.units[i]]);
    }
    t.strictSame(listed, plainNeeds(trace));
  });
  fc.assert(property, { numRuns: 60 });
  t.end();
});

t.test('LRU is a list that forgets its oldest; a fixed set is found and takes no place', (t) => {
  const trace = randomTrace({ tokens: 25, layers: 2, experts: 2, neurons: 12 });
  const property = fc.property(
    trace,
    fc.nat(30),
    fc.array(fc.nat(8), { minLength: 4, maxLength: 4 }),
    (trace, one, each) => {
      const needs = listNeeds(trace);
      const countFrom = Math.floor(trace.tokens / 3);
      t.equal(lruHits(needs, one, countFrom), plainLru(needs, trace, one, countFrom));
      t.equal(lruHits(needs, each, countFrom), plainLru(needs, trace, each, countFrom));
      const rates = Float32Array.from({ length: needs.bankCount * needs.neuronCount }, (_, unit) => (unit * 7) % 5);
      const fixed = hottest(rates, one);
      const expected = plainNeeds(trace).filter(([token, unit]) => token >= countFrom && fixed[unit] === 1).length;
      t.equal(lruHits(needs, 0, countFrom, fixed), expected);
      t.equal(lruHits(needs, rates.length, 0), needs.units.length - new Set(needs.units).size, 'only first uses miss');
    },
  );
  fc.assert(property, { numRuns: 60 });
  t.end();
});

t.test(
  'Belady finds as much as the best of all choices, and no less with one pool than with any places by bank',
  (t) => {
    const tiny = randomTrace({ tokens: 5, layers: 1, experts: 2, neurons: 4 });
    const best = fc.property(tiny, fc.nat(4), (trace, capacity) => {
      const countFrom = 0;
      t.equal(beladyHits(listNeeds(trace), capacity, countFrom), mostHits(trace, capacity, countFrom));
    });
    fc.assert(best, { numRuns: 80 });
    const larger = randomTrace({ tokens: 40, layers: 2, experts: 2, neurons: 16 });
    const bound = fc.property(larger, fc.array(fc.nat(10), { minLength: 4, maxLength: 4 }), (trace, places) => {
      const needs = listNeeds(trace);
      const each = places.slice(0, needs.bankCount);
      const capacity = each.reduce((sum, count) => sum + count, 0);
      t.ok(beladyHits(needs, each, 0) >= lruHits(needs, each, 0));
      t.ok(beladyHits(needs, capacity, 0) >= beladyHits(needs, each, 0));
    });
    fc.assert(bound, { numRuns: 60 });
    t.end();
  },
);

t.test('the window is the longest that never takes more than the capacity', (t) => {
  const property = fc.property(
    randomTrace({ tokens: 20, layers: 2, experts: 1, neurons: 12 }),
    fc.nat(24),
    (trace, capacity) => {
      const needs = listNeeds(trace);
      const plain = plainNeeds(trace);
      const inWindow = (end: number, length: number) =>
        new Set(plain.filter(([token]) => token < end && token >= end - length).map(([, unit]) => unit));
      const fits = (length: number) =>
        Array.from({ length: trace.tokens }, (_, token) => inWindow(token + 1, length).size).every(
          (size) => size <= capacity,
        );
      const { hits, windowTokens } = windowHits(needs, capacity, 0);
      t.ok(fits(windowTokens));
      t.ok(windowTokens === trace.tokens || !fits(windowTokens + 1));
      t.equal(hits, plain.filter(([token, unit]) => inWindow(token, windowTokens).has(unit)).length);
    },
  );
  fc.assert(property, { numRuns: 40 });
  t.end();
});

t.test(
  'replay: every need is a hit or a miss, hot neurons always hit, no policy beats Belady with the same places',
  async (t) => {
    const trace = randomTrace({ tokens: 60, layers: 2, experts: 2, neurons: 40 });
    const share = fc.double({ min: 0, max: 1, noNaN: true });
    const property = fc.asyncProperty(
      trace,
      share,
      share,
      fc.boolean(),
      async (trace, hotShare, coldShare, hasRates) => {
        const needs = listNeeds(trace);
        const { bankCount, neuronCount } = needs;
        const hot = Math.floor(hotShare * neuronCount);
        const cold = Math.floor(coldShare * (neuronCount - hot));
        const fill = (count: number) => new Array<number>(bankCount).fill(count);
        const firingRates = Float32Array.from(
          { length: bankCount * neuronCount },
          (_, i) => 1 / (1 + (i % neuronCount)),
        );
        const request = { ...trace, hotNeurons: fill(hot), coldSlots: fill(cold), ...(hasRates && { firingRates }) };
        for (const countFrom of [0, Math.floor(trace.tokens / 2), trace.tokens]) {
          const found = await addon.replayCache({ ...request, countFrom });
          const units = needs.units.subarray(needs.starts[countFrom]);
          t.equal(found.hotHits + found.coldHits + found.misses, units.length);
          t.equal(found.hotHits, units.filter((unit) => unit % neuronCount < hot).length);
          const fixed = Uint8Array.from({ length: bankCount * neuronCount }, (_, i) => (i % neuronCount < hot ? 1 : 0));
          const cool = { ...trace, fired: trace.fired.slice() };
          for (let i = 0; i < trace.tokens * bankCount; i++) {
            for (let n = 0; n < hot; n++) cool.fired[i * Math.ceil(neuronCount / 8) + (n >> 3)] &= ~(1 << (n % 8));
          }
          const isWhole = cold === neuronCount - hot;
          if (hasRates) {
            // Slots begin with the likeliest neurons, so that even Belady's empty ones may find less.
            if (isWhole) t.equal(found.misses, 0);
          } else {
            t.ok(found.coldHits <= beladyHits(listNeeds(cool), fill(cold), countFrom));
            const all = lruHits(needs, fill(cold), countFrom, fixed);
            if (isWhole) t.equal(found.coldHits + found.hotHits, all);
          }
          t.strictSame(await addon.replayCache({ ...request, countFrom }), found, 'the same again');
        }
      },
    );
    await fc.assert(property, { numRuns: 40 });
  },
);

/** The logits after each token, computed one by one, as bytes. */
async function decode(engine: Pick<Engine, 'step'>, window: readonly number[], vocab: number): Promise<Buffer> {
  const rows = new Float32Array(window.length * vocab);
  for (const [position, id] of window.entries()) {
    await engine.step(Int32Array.of(id), position, rows.subarray(position * vocab, (position + 1) * vocab));
  }
  return Buffer.from(rows.buffer);
}

t.test('replay counts what the engine counts, on the same tokens with the same places', async (t) => {
  // Where up is not rectified a neuron is needed if and only if it fires.
  const models = [
    ['sparse', { family: 'sparsellama', hidden: 96, neurons: 300 }],
    ['opt', { family: 'opt', hidden: 96, neurons: 190 }],
  ] as const;
  for (const [name, options] of models) {
    const model = await openModelDirectory(await makeModel(join(scratch, name), { ...options, seed: 5 }, 'q8'));
    let request: EngineRequest | undefined;
    const openEngine = (asked: EngineRequest) => {
      request = asked;
      return addon.openEngine(asked);
    };
    const engine = await Engine.open(model, { context: 128, threads: 2 }, { ...addon, openEngine });
    const window = Array.from({ length: 100 }, (_, i) => (i * 37 + 5) % engine.vocabSize);
    const trace = await recordTrace(model, engine, [window]);
    const expected = await decode(engine, window, engine.vocabSize);
    await engine.close();
    const resident = request as EngineRequest;
    const { neuronCount, vocabSize } = resident;
    const banks = resident.expertOffsets.length;
    t.ok(countNeeds(listNeeds(trace), 0) > 50 * banks, 'the model is not silent');
    const firingRates = Float32Array.from(
      { length: banks * neuronCount },
      (_, i) => 1 - (i % neuronCount) / neuronCount,
    );
    for (const hasRates of [false, true]) {
      for (const [hot, cold] of [
        [0, 0],
        [0, Math.floor(neuronCount / 3)],
        [Math.floor(neuronCount / 10), Math.floor(neuronCount / 4)],
        [0, neuronCount],
      ]) {
        const fill = (count: number) => new Array<number>(banks).fill(count);
        const kept = { hotNeurons: fill(hot), coldSlots: fill(cold), ...(hasRates && { firingRates }) };
        const flash = { mode: 'direct', backend: 'threads', lanes: 2 } as const;
        const stream: StreamRequest = { residentGates: fill(neuronCount), ...kept, stagingBytes: 1 << 18, ...flash };
        const streamed = await addon.openEngine({ ...resident, stream });
        const step = (tokens: Int32Array, position: number, logits: Float32Array) =>
          streamed.step({ ...oneRun(tokens, position), logits, all: false });
        t.ok((await decode({ step }, window, vocabSize)).equals(expected), 'and computes what the resident one does');
        const { hotHits, coldHits, misses } = streamed.counters().stream ?? {};
        await streamed.close();
        const replayed = await addon.replayCache({ ...trace, ...kept, countFrom: 0 });
        t.strictSame(replayed, { hotHits, coldHits, misses }, `${name}, ${hot} hot, ${cold} cold, rates: ${hasRates}`);
      }
    }
  }
});

t.test('the comparison: LRU is 0, Belady is 1, nothing is above it', async (t) => {
  const [trace] = fc.sample(randomTrace({ tokens: 90, layers: 2, experts: 2, neurons: 40 }), { numRuns: 1, seed: 3 });
  const { layerCount, expertCount, neuronCount } = trace;
  const rates = Float32Array.from(
    { length: layerCount * expertCount * neuronCount },
    (_, i) => 1 / (1 + (i % neuronCount)),
  );
  const results = await comparePolicies(addon, trace, { ofTokens: rates, ofBank: rates }, [0.25, 0.5], 20);
  const best = results.filter(({ policy }) => policy === 'Belady, one pool');
  t.strictSame(
    best.map(({ gapClosed }) => gapClosed),
    [1, 1],
  );
  for (const { keptShare, foundShare, policy } of results) {
    const bound = best.find((row) => row.keptShare === keptShare)?.foundShare ?? 0;
    t.ok(foundShare <= bound, policy);
  }
  t.strictSame(placesByRate(Float32Array.of(0.9, 0.1, 0.5, 0.4), 3, 2), [1, 2]);
});

t.test('lies about a trace are refused', async (t) => {
  const [trace] = fc.sample(randomTrace({ tokens: 5, layers: 1, experts: 1, neurons: 20 }), { numRuns: 1, seed: 1 });
  const request = { ...trace, hotNeurons: [0], coldSlots: [1], countFrom: 0 };
  await addon.replayCache(request);
  for (const lie of [
    { tokens: trace.tokens + 1 },
    { neuronCount: 4000 },
    { neuronCount: 0 },
    { layerCount: 2 },
    { layerCount: 2 ** 40, expertCount: 2 ** 40 },
    { hotNeurons: [21] },
    { coldSlots: [-1] },
    { coldSlots: [] },
    { firingRates: Float32Array.of(0.5) },
    { firingRates: new Float32Array(trace.neuronCount).fill(Number.NaN) },
    { routed: new Uint8Array(0) },
  ]) {
    await t.rejects(addon.replayCache({ ...request, ...lie }), { code: 'NATIVE_ARGUMENT' }, JSON.stringify(lie));
  }
  // Bits past the last neuron are nobody's.
  const wild = { ...request, fired: new Uint8Array(request.fired.length).fill(255) };
  const { hotHits, coldHits, misses } = await addon.replayCache(wild);
  t.equal(hotHits + coldHits + misses, trace.tokens * trace.neuronCount);
});
