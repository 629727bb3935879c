import { type Encoding, scaleBytes, weightBytes } from './encoding.js';

/** Flash is read in pages: the unit of direct I/O. */
export const PAGE_BYTES = 4096;

/** Share of bundles whose part 2 is read too: the gate fired (paper section 1.6: two-phase loading saves 20 %). */
const PHASE2_SHARE = 0.8;

const MAX_NEURONS_PER_UNIT = 64;

/** Where the parts of a neuron bundle lie; FORMAT.md section 4. All in bytes but `matrices` and `neurons_per_unit`. */
export interface BundleLayout {
  /** 3 (gate, up, down) or 2 (up, down). */
  matrices: 2 | 3;
  part1_bytes: number;
  part2_bytes: number;
  neurons_per_unit: number;
  unit_bytes: number;
  part1_stride: number;
  part2_offset: number;
  part2_stride: number;
}

/**
 * Chooses how bundles share pages: the fewest bytes read for a neuron (in two phases when the parts are split, in one when
 * they are joint) plus the bytes it takes on flash.
 *
 * Worked example: int4, hidden 4096: parts of 2816 and 4096 bytes. Split, one neuron a unit: reads 4096 + 0.8 x 4096,
 * keeps 8192. Joint, one a unit: reads 8192, keeps 8192. Split wins. With hidden 256 (176 + 256 bytes) nine joint bundles
 * share a page.
 */
export function chooseBundleLayout(encoding: Encoding, hiddenSize: number, matrices: 2 | 3): BundleLayout {
  const weights = weightBytes(encoding, hiddenSize);
  const part1 = weights + matrices * scaleBytes(encoding, hiddenSize);
  const part2 = (matrices - 1) * weights;
  let best: BundleLayout | undefined;
  let bestCost = Number.POSITIVE_INFINITY;
  for (let count = 1; count <= MAX_NEURONS_PER_UNIT; count++) {
    for (const split of [true, false]) {
      const layout = split ? splitLayout(matrices, part1, part2, count) : jointLayout(matrices, part1, part2, count);
      const cost = expectedReadBytes(layout) + layout.unit_bytes / count;
      if (cost < bestCost) {
        bestCost = cost;
        best = layout;
      }
    }
  }
  return best as BundleLayout;
}

/** Whether part 2 of a unit begins on a page of its own, so that the two phases never read the same page. */
export function isSplit(layout: BundleLayout): boolean {
  return layout.part2_offset % PAGE_BYTES === 0;
}

/** Mean bytes of whole pages read for one neuron, over the slots of a unit. */
export function expectedReadBytes(layout: BundleLayout): number {
  let pages = 0;
  for (let slot = 0; slot < layout.neurons_per_unit; slot++) {
    const start1 = slot * layout.part1_stride;
    const start2 = layout.part2_offset + slot * layout.part2_stride;
    if (isSplit(layout)) {
      pages += pagesTouched(start1, layout.part1_bytes) + PHASE2_SHARE * pagesTouched(start2, layout.part2_bytes);
    } else {
      pages += pagesTouched(start1, layout.part1_bytes + layout.part2_bytes);
    }
  }
  return (pages * PAGE_BYTES) / layout.neurons_per_unit;
}

/** Mean bytes of whole pages read for part 2 of one neuron alone, over the slots of a unit. */
export function rowsReadBytes(layout: BundleLayout): number {
  let pages = 0;
  for (let slot = 0; slot < layout.neurons_per_unit; slot++) {
    pages += pagesTouched(layout.part2_offset + slot * layout.part2_stride, layout.part2_bytes);
  }
  return (pages * PAGE_BYTES) / layout.neurons_per_unit;
}

/** Share of the bytes on flash that hold no weight. */
export function wasteShare(layout: BundleLayout): number {
  return 1 - (layout.neurons_per_unit * (layout.part1_bytes + layout.part2_bytes)) / layout.unit_bytes;
}

/** Bytes that `neurons` bundles of one expert take on flash. */
export function expertBytes(layout: BundleLayout, neurons: number): number {
  return Math.ceil(neurons / layout.neurons_per_unit) * layout.unit_bytes;
}

function splitLayout(matrices: 2 | 3, part1: number, part2: number, count: number): BundleLayout {
  const part2Offset = roundUpToPage(count * part1);
  return {
    matrices,
    part1_bytes: part1,
    part2_bytes: part2,
    neurons_per_unit: count,
    unit_bytes: part2Offset + roundUpToPage(count * part2),
    part1_stride: part1,
    part2_offset: part2Offset,
    part2_stride: part2,
  };
}

function jointLayout(matrices: 2 | 3, part1: number, part2: number, count: number): BundleLayout {
  return {
    matrices,
    part1_bytes: part1,
    part2_bytes: part2,
    neurons_per_unit: count,
    unit_bytes: roundUpToPage(count * (part1 + part2)),
    part1_stride: part1 + part2,
    part2_offset: part1,
    part2_stride: part1 + part2,
  };
}

function pagesTouched(start: number, bytes: number): number {
  return Math.ceil((start + bytes) / PAGE_BYTES) - Math.floor(start / PAGE_BYTES);
}

/** The next multiple of a page. */
export function roundUpToPage(bytes: number): number {
  return Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES;
}
