// What is kept in memory: plans as properties over round sizes, firing rates out of a profile, limits as people write them.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import t, { type Test } from 'tap';
import { readModelProfile } from '../converter/activation/profile-file.js';
import { convert } from '../converter/convert.js';
import { type FiringRates, readFiringRates } from '../src/format/firing-rates.js';
import { readHeatOrder } from '../src/format/heat-order.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { CHUNK_NEURONS, KeepOrder } from '../src/plan/keep-order.js';
import { budgetBytes, parseMemoryLimit } from '../src/plan/memory-limit.js';
import {
  BATCH_SIZE_MOST,
  leastMemory,
  type MemoryPlan,
  type MemoryQuestion,
  planMemory,
  type StreamShape,
  shareOfNeurons,
} from '../src/plan/memory-plan.js';
import { makeCheckpoint } from './support/make-checkpoint.js';
import { MODEL_VOCABULARY } from './support/models.js';
import { byteLevelTokenizer, writeTokenizer } from './support/tokenizers.js';

const total = (counts: readonly number[]) => counts.reduce((sum, count) => sum + count, 0);

interface Sizes {
  bankCount: number;
  neuronCount: number;
  gateBytes: number;
  rowsBytes: number;
  tokenBytes: number;
}

/** Sizes like an engine's, but round ones: with a predictor neurons are kept whole, and the predictor takes something. */
function roundSizes({ bankCount, neuronCount, gateBytes, rowsBytes, tokenBytes }: Sizes, predicted: boolean) {
  return (batchSize: number, shape?: StreamShape) => {
    const fixed = batchSize * tokenBytes + (predicted ? 5000 : 0);
    if (shape === undefined) return fixed + bankCount * neuronCount * (gateBytes + rowsBytes);
    const staging = shape.prefetchBytes + Math.max(shape.stagingBytes, CHUNK_NEURONS * (gateBytes + rowsBytes));
    const slotBytes = rowsBytes + (predicted ? gateBytes : 0);
    const rows = total(shape.hotNeurons) + total(shape.coldSlots);
    return fixed + total(shape.residentGates) * gateBytes + rows * slotBytes + staging;
  };
}

function anyRates(bankCount: number, neuronCount: number): fc.Arbitrary<FiringRates> {
  const bank = fc
    .tuple(
      fc.double({ min: 0, max: 1, noNaN: true }),
      fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { minLength: neuronCount, maxLength: neuronCount }),
    )
    .map(([routed, shares]) => ({
      routed,
      rates: Float32Array.from(shares, (s) => s * routed)
        .sort()
        .reverse(),
    }));
  return fc.array(bank, { minLength: bankCount, maxLength: bankCount }).map((banks) => ({
    routed: Float64Array.from(banks, ({ routed }) => routed),
    rates: banks.map(({ rates }) => rates),
  }));
}

/** Questions without a budget. */
const anyQuestion = fc
  .record({
    bankCount: fc.integer({ min: 1, max: 9 }),
    neuronCount: fc.integer({ min: 1, max: 400 }),
    gateBytes: fc.integer({ min: 1, max: 3000 }),
    rowsBytes: fc.integer({ min: 1, max: 6000 }),
    tokenBytes: fc.integer({ min: 1, max: 3000 }),
    readBytes: fc.tuple(fc.integer({ min: 1, max: 9000 }), fc.integer({ min: 1, max: 9000 })),
    contextLength: fc.integer({ min: 1, max: 300 }),
    processBytes: fc.nat(1e6),
    mode: fc.constantFrom('auto' as const, 'resident' as const, 'stream' as const),
    keptShares: fc.option(fc.uniqueArray(fc.constantFrom(0, 0.1, 0.25, 0.5, 1), { minLength: 1 })),
  })
  .chain(({ readBytes: [wholeReadBytes, rowsReadBytes], keptShares, mode, contextLength, processBytes, ...sizes }) => {
    const { bankCount, neuronCount, gateBytes, rowsBytes } = sizes;
    return fc.option(anyRates(bankCount, neuronCount), { nil: undefined }).map(
      (firingRates): Omit<MemoryQuestion, 'budgetBytes'> => ({
        bankCount,
        neuronCount,
        contextLength,
        processBytes,
        mode,
        costs: { gateBytes, rowsBytes, wholeReadBytes, rowsReadBytes },
        ...(firingRates === undefined ? {} : { firingRates }),
        ...(keptShares === null
          ? {}
          : { keptShares: keptShares.sort((a, b) => a - b), canPrefetch: bankCount % 2 === 0 }),
        measure: roundSizes(sizes, keptShares !== null),
      }),
    );
  });

/** What must hold of any plan of a budget; what it keeps, as numbers that must not fall with more memory. */
function checkPlan(t: Test, q: MemoryQuestion, plan: MemoryPlan): number[] {
  const least = leastMemory(q);
  if (plan.kind === 'too_little') {
    t.equal(plan.leastBytes, least);
    t.ok(q.budgetBytes < least);
    return [-1, -1, -1];
  }
  t.ok(plan.bytes <= q.budgetBytes, 'within the budget');
  t.ok(plan.batchSize >= 1 && plan.batchSize <= Math.min(BATCH_SIZE_MOST, q.contextLength));
  if (plan.kind === 'resident') {
    t.equal(plan.bytes, q.processBytes + q.measure(plan.batchSize));
    return Array(3).fill(Number.POSITIVE_INFINITY);
  }
  t.ok(q.mode === 'stream' || q.budgetBytes < q.processBytes + q.measure(1), 'resident when it fits');
  const { residentGates, hotNeurons, coldSlots } = plan.shape;
  t.equal(plan.bytes, q.processBytes + q.measure(plan.batchSize, plan.shape));
  t.ok(q.canPrefetch || plan.shape.prefetchBytes === 0);
  t.ok(residentGates.every((gates) => gates % CHUNK_NEURONS === 0 || gates === q.neuronCount));
  const rows = hotNeurons.map((hot, bank) => hot + coldSlots[bank]);
  t.ok(rows.every((count, bank) => count <= (q.keptShares ? q.neuronCount : residentGates[bank])));
  if (q.keptShares === undefined) return [total(residentGates), total(rows), Math.min(...residentGates)];
  t.equal(total(residentGates), 0, 'whole neurons');
  // The largest share whose neurons fit at all, for good, in every bank.
  const reached = q.keptShares.filter((s) => hotNeurons.every((hot) => hot >= shareOfNeurons(s, q.neuronCount)));
  return [0, total(rows), Math.max(-1, ...reached)];
}

t.test('plans: never over budget, never worse with more, whole chunks of gates, no rows without gates', (t) => {
  const share = fc.double({ min: 0, max: 1.2, noNaN: true });
  const property = fc.property(anyQuestion, share, share, (q, shareA, shareB) => {
    const whole = q.processBytes + q.measure(BATCH_SIZE_MOST);
    const least = leastMemory({ ...q, budgetBytes: 0 });
    const most = 1.3 * Math.max(whole, least);
    const budgets = [shareA, shareB]
      .sort((a, b) => a - b)
      .map((s) => Math.floor(0.9 * least + s * (most - 0.9 * least)));
    const [less, more, smallest] = [...budgets, least].map((budget) => {
      const asked = { ...q, budgetBytes: budget };
      return checkPlan(t, asked, planMemory(asked));
    });
    t.ok(
      less.every((count, i) => count <= more[i]),
      `more memory, no less kept: ${less}, ${more}`,
    );
    t.ok(smallest[0] >= 0, 'the least does');
  });
  fc.assert(property, { numRuns: 400 });
  t.end();
});

t.test('what saves most is kept first', (t) => {
  const costs = { gateBytes: 100, rowsBytes: 200, wholeReadBytes: 400, rowsReadBytes: 400 };
  const rates = (...falling: number[]) => Float32Array.from(falling);
  const kept = (routed: number[], banks: Float32Array[], items: number, rowsOnly = false) => {
    const firingRates = { routed: Float64Array.from(routed), rates: banks };
    const neuronCount = banks[0].length;
    return new KeepOrder({ bankCount: banks.length, neuronCount, costs, firingRates }, rowsOnly).counts(items);
  };
  // Neurons that fire always: their rows save 2 a byte, gates of the others 4 - 4 x 0.02 and more.
  const quiet = new Float32Array(256).fill(0.02);
  t.strictSame(kept([1, 1], [quiet, quiet], 4).gates, [256, 256], 'gates before rows of neurons that rest');
  t.strictSame(kept([1, 1], [quiet, quiet], 1), { gates: [128, 0], rows: [0, 0] });
  t.strictSame(kept([1, 1], [quiet, quiet], 5).rows, [16, 0]);
  // An expert that is seldom used saves less with its gates than the other with its hot rows.
  const busy = rates(...Array(16).fill(0.9), ...Array(240).fill(0));
  t.strictSame(kept([0.95, 0.05], [busy, quiet.map(() => 0)], 3), { gates: [256, 0], rows: [16, 0] });
  // All fire always: gates save nothing without rows, so they come together, chunk by chunk.
  const loud = new Float32Array(256).fill(1);
  t.strictSame(kept([1], [loud], 9), { gates: [128], rows: [128] });
  t.strictSame(kept([1, 1], [busy, loud], 17, true), { gates: [0, 0], rows: [16, 256] }, 'whole neurons by rate alone');
  t.end();
});

t.test('memory for tokens at once: none of it with the least, all of it with plenty', (t) => {
  const sizes = { bankCount: 4, neuronCount: 1000, gateBytes: 100, rowsBytes: 200, tokenBytes: 500 };
  const question: MemoryQuestion = {
    ...sizes,
    costs: { gateBytes: 100, rowsBytes: 200, wholeReadBytes: 300, rowsReadBytes: 300 },
    contextLength: 512,
    processBytes: 0,
    mode: 'stream',
    budgetBytes: 0,
    measure: roundSizes(sizes, false),
  };
  const least = leastMemory(question);
  const batchSizes = [0, 10_000, 100_000, 1e6].map((more) => {
    const plan = planMemory({ ...question, budgetBytes: least + more });
    return plan.kind === 'streamed' ? plan.batchSize : 0;
  });
  t.strictSame(batchSizes[0], 1);
  t.strictSame(batchSizes[3], BATCH_SIZE_MOST);
  t.ok(
    batchSizes.every((size, i) => i === 0 || size >= batchSizes[i - 1]),
    `${batchSizes}`,
  );
  t.end();
});

t.test('the banks of the largest models are planned at once', (t) => {
  const bankCount = 256;
  const neuronCount = 14336;
  const rates = Array.from({ length: bankCount }, (_, bank) =>
    Float32Array.from({ length: neuronCount }, (_, i) => 0.25 * 0.999 ** i * (1 + bank / 1000)),
  );
  const sizes = { bankCount, neuronCount, gateBytes: 2816, rowsBytes: 4608, tokenBytes: 300_000 };
  const question: MemoryQuestion = {
    ...sizes,
    costs: { gateBytes: 2816, rowsBytes: 4608, wholeReadBytes: 8192, rowsReadBytes: 4096 },
    contextLength: 4096,
    processBytes: 0,
    mode: 'auto',
    budgetBytes: 12e9,
    measure: roundSizes(sizes, false),
    firingRates: { routed: new Float64Array(bankCount).fill(0.25), rates },
  };
  const before = process.memoryUsage().arrayBuffers;
  const start = performance.now();
  const plan = planMemory(question);
  const tookMs = performance.now() - start;
  t.equal(plan.kind, 'streamed');
  t.ok(tookMs < 3000, `${tookMs} ms for 3.7 million neurons`);
  t.ok(process.memoryUsage().arrayBuffers - before < 64e6);
  t.end();
});

t.test(
  'firing rates: those of the profile, falling, per token of the whole text; a wrong file is refused',
  async (t) => {
    const scratch = t.testdir();
    const tokenizerFrom = writeTokenizer(join(scratch, 'tokenizer'), byteLevelTokenizer());
    const shape = { family: 'turbosparsemixtral', hidden: 64, headDim: 32, neurons: 70, experts: 3 } as const;
    const checkpoint = makeCheckpoint(join(scratch, 'moe'), { vocab: MODEL_VOCABULARY, tokenizerFrom, ...shape });
    const text = join(scratch, 'text.txt');
    writeFileSync(text, 'The fox told the hen a story of an old mill by the river. '.repeat(30));
    const output = join(scratch, 'moe.pi2');
    const options = { checkpoint, output, quantization: 'q4', maxMemoryBytes: 2 ** 31, force: true } as const;
    await convert({ ...options, calibration: text }, () => {}, new AbortController().signal);
    const model = await openModelDirectory(output);
    const profile = await readModelProfile(model);
    const found = await readFiringRates(model);
    if (profile === null || found === null) return t.fail('the model has a profile');
    const { layers, experts, neurons } = profile.shape;
    const tokens = profile.batches[0];
    t.strictSame(
      [...found.routed],
      [...profile.routed].map((count) => count / tokens),
    );
    for (let layer = 0; layer < layers; layer++) {
      const order = (await readHeatOrder(model, layer)) as Uint32Array;
      for (let expert = 0; expert < experts; expert++) {
        const counts = profile.fired.subarray((layer * 4 * experts + expert) * neurons);
        const expected = Array.from({ length: neurons }, (_, j) =>
          Math.fround(counts[order[expert * neurons + j]] / tokens),
        );
        t.strictSame([...found.rates[layer * experts + expert]], expected, `layer ${layer}, expert ${expert}`);
      }
    }

    const damages: [(bytes: Buffer) => void, RegExp][] = [
      [(bytes) => bytes.fill(0, 0, 4), /is not an activation profile/],
      [(bytes) => bytes.writeUInt32LE(9, 8), /newer powerinfer2/],
      [(bytes) => bytes.writeUInt32LE(layers + 1, 12), /its header speaks of/],
      [(bytes) => bytes.writeUInt32LE(0xffffffff, 20), /its header speaks of NaN/],
      [(bytes) => bytes.writeBigUInt64LE(BigInt(tokens + 1), 32), /not the profile of this model/],
      [(bytes) => bytes.writeUInt32LE(tokens + 1, bytes.length - 4 - 4 * 4 * experts * neurons), /fired more often/],
      [(bytes) => (bytes[bytes.length - 40] ^= 1), /sha256 is not the one in the manifest/],
    ];
    for (const [damage, message] of damages) {
      const copy = join(scratch, 'damaged.pi2');
      cpSync(output, copy, { recursive: true });
      const bytes = readFileSync(join(output, 'profile.bin'));
      damage(bytes);
      writeFileSync(join(copy, 'profile.bin'), bytes);
      await t.rejects(readFiringRates(await openModelDirectory(copy)), { code: 'E_MODEL', message });
    }
    await convert(options, () => {}, new AbortController().signal);
    t.equal(await readFiringRates(await openModelDirectory(output)), null, 'the order of the checkpoint has no rates');
  },
);

t.test('limits of memory, as people write them', (t) => {
  t.strictSame(parseMemoryLimit('3G'), { kind: 'bytes', bytes: 3 * 2 ** 30 });
  t.strictSame(parseMemoryLimit('50%'), { kind: 'share', percent: 50 });
  t.strictSame(parseMemoryLimit('min'), { kind: 'min' });
  for (const wrong of ['', '0', '0%', '101%', 'max', '3X', '-1G', '%']) {
    t.throws(() => parseMemoryLimit(wrong), { code: 'E_USAGE' }, wrong);
  }
  t.equal(
    budgetBytes({ kind: 'share', percent: 50 }, 7),
    Math.floor(budgetBytes({ kind: 'share', percent: 100 }, 7) / 2),
  );
  t.ok(budgetBytes(undefined, 7) > 7);
  t.end();
});
