// How many clusters of each bank are a dense unit's: from ratios, from memory, and from measured times.
import fc from 'fast-check';
import t from 'tap';
import { clusterNeurons } from '../src/format/npu.js';
import {
  clusterCount,
  clusterEnd,
  clusterEnds,
  clustersOfRatio,
  clustersWithin,
  fastestClusters,
  firingShares,
} from '../src/plan/hot-ratio.js';

const anyNeurons = fc.integer({ min: 1, max: 40_000 });

t.test('clusters cover a bank: at most 8, whole chunks of the CPU’s kernels but the last', (t) => {
  fc.assert(
    fc.property(anyNeurons, (neurons) => {
      const ends = clusterEnds(clusterCount(neurons), neurons);
      t.ok(ends.length <= 8 && ends.at(-1) === neurons);
      t.ok(ends.slice(0, -1).every((end, i) => end % 128 === 0 && end === (i + 1) * clusterNeurons(neurons)));
    }),
  );
  t.strictSame(clusterEnds(8, 14336), [1792, 3584, 5376, 7168, 8960, 10752, 12544, 14336]);
  t.strictSame(clusterEnds(6, 700), [128, 256, 384, 512, 640, 700]);
  t.end();
});

t.test('a ratio is the nearest whole number of clusters; memory holds those whose neurons are all there', (t) => {
  t.strictSame(
    [0, 0.05, 0.07, 0.25, 0.5, 0.99, 1].map((ratio) => clustersOfRatio(ratio, 14336)),
    [0, 0, 1, 2, 4, 8, 8],
  );
  fc.assert(
    fc.property(anyNeurons, fc.double({ min: 0, max: 1, noNaN: true }), fc.nat(40_000), (neurons, ratio, kept) => {
      const off = (clusters: number) => Math.abs(clusterEnd(clusters, neurons) / neurons - ratio);
      const chosen = off(clustersOfRatio(ratio, neurons));
      for (let clusters = 0; clusters <= clusterCount(neurons); clusters++) t.ok(chosen <= off(clusters));
      const there = Math.min(kept, neurons);
      const within = clustersWithin(there, neurons);
      t.ok(clusterEnd(within, neurons) <= there);
      t.ok(within === clusterCount(neurons) || clusterEnd(within + 1, neurons) > there);
    }),
  );
  t.end();
});

t.test('times: a unit gets what is estimated fastest, and nothing unless it gains', (t) => {
  const neurons = 8 * 128;
  const cpu = { lookNs: 1, fireNs: 2 };
  const always = new Float64Array(neurons).fill(1);
  const unit = (perCluster: number) => Array.from({ length: 8 }, (_, i) => perCluster * (i + 1));
  const choose = (perCluster: number, beside = cpu, shares: Float64Array = always, takesTurns = false) =>
    fastestClusters({ unit: unit(perCluster), alone: cpu, beside, takesTurns }, shares);
  t.equal(choose(1), 8, 'a unit that costs nothing gets all');
  t.equal(choose(3 * 128), 4, 'as fast as the CPU, beside it: half each');
  t.equal(choose(3 * 128, { lookNs: 2, fireNs: 4 }), 5, 'on half of its cores, the CPU keeps a third');
  t.equal(choose(6 * 128, { lookNs: 2, fireNs: 4 }), 0, 'both on half of the cores: nothing is gained');
  t.equal(choose(3 * 128, cpu, always, true), 0, 'in turns neither');
  t.equal(choose(128, cpu, always, true), 8, 'in turns a faster unit takes all');
  t.equal(choose(1e9), 0);
  t.equal(fastestClusters({ unit: [], alone: cpu, beside: cpu, takesTurns: false }, always), 0, 'no unit for so many');
  // Only the first eighth fires; the others cost a look each.
  const hot = Float64Array.from({ length: neurons }, (_, i) => (i < 128 ? 1 : 0));
  t.equal(choose(300, { lookNs: 1, fireNs: 20 }, hot), 2);
  fc.assert(
    fc.property(
      fc.array(fc.double({ min: 1, max: 1e6, noNaN: true }), { minLength: 8, maxLength: 8 }),
      fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { minLength: neurons, maxLength: neurons }),
      fc.boolean(),
      (times, rates, takesTurns) => {
        const shares = Float64Array.from(rates).sort().reverse();
        const clusters = fastestClusters({ unit: times, alone: cpu, beside: cpu, takesTurns }, shares);
        const ns = (count: number) => {
          const rest = shares.subarray(128 * count).reduce((sum, share) => sum + 1 + 2 * share, 0);
          const ofUnit = count === 0 ? 0 : times[count - 1];
          return takesTurns ? ofUnit + rest : Math.max(ofUnit, rest);
        };
        for (let count = 0; count <= 8; count++) t.ok(ns(clusters) <= ns(count) / 0.95 + 1e-6);
      },
    ),
    { numRuns: 20 },
  );
  t.end();
});

t.test('shares: as the profile counted them, by chance in a mixture, assumed without one', (t) => {
  const rates = { routed: Float64Array.of(1, 1), rates: [Float32Array.of(0.5, 0.25), Float32Array.of(0.5, 0.25)] };
  const near = (shares: Float64Array, expected: number[]) =>
    t.ok(
      shares.every((share, i) => Math.abs(share - expected[i]) < 1e-6),
      `${shares}`,
    );
  const counted = [Float64Array.of(0.5, 0.25), Float64Array.of(0.6, 0.3), Float64Array.of(0.7, 0.35)];
  const known = firingShares(2, false, { ...rates, batchShares: [...counted, Float64Array.of(0.8, 0.4)] });
  near(known[1], [0.6, 0.3]);
  near(known[3], [0.8, 0.4]);
  near(known[4], [1, 1]);
  const mixed = firingShares(2, false, { ...rates, routed: Float64Array.of(0.5, 1), batchShares: counted });
  near(mixed[0], [0.75, 0.375]);
  near(mixed[1], [(1 + 0.75) / 2, (0.75 + 0.4375) / 2]);
  near(firingShares(2, false, null)[0], [0.1, 0.1]);
  near(firingShares(2, false, null)[1], [0.19, 0.19]);
  near(firingShares(2, true, rates)[0], [1, 1]);
  t.end();
});
