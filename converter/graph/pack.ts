import type { NativeAddon, PackedMatrix } from '../../src/engine/contract.js';
import { nativeLayout } from '../../src/engine/engine-request.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import { expertBytes, roundUpToPage } from '../../src/format/layout.js';
import { NEURONS_FILE, RESIDENT_FILE } from '../../src/format/manifest.js';
import { bankLayout, type Cluster, DOWN_TILE, type NpuMatrix } from '../../src/format/npu.js';
import type { NpuExtent, Plan } from '../steps/extents.js';
import { crc32Text, type Journal, type PieceRecord, type Progress, seedOf } from '../write/journal.js';
import type { OutputFile } from '../write/output.js';

/** What packing works with. */
export interface PackShop {
  addon: Pick<NativeAddon, 'packCluster' | 'crc32'>;
  /** Resident weights and neurons, as they were written. */
  files: Record<typeof RESIDENT_FILE | typeof NEURONS_FILE, OutputFile>;
  journal: Journal;
  /** Records so far; gets those to come. */
  progress: Progress;
  /** Two, each of `packBytes` at least: the cluster that is made, and bundles that were read. */
  targets: readonly Buffer[];
  threads: number;
  signal: AbortSignal;
}

/** Bytes of memory that packing needs twice: for a cluster with the rest of its page, and for the units of a tile. */
export function packBytes(plan: Plan, h: Hyperparameters): number {
  if (plan.npu.length === 0) return 0;
  const clusters = bankLayout(h).clusters.map(({ range }) => range.bytes);
  const units = Math.ceil(DOWN_TILE / plan.layout.neurons_per_unit) + 1;
  return Math.max(roundUpToPage(Math.max(...clusters)) + roundUpToPage(1), units * plan.layout.unit_bytes);
}

/**
 * Makes `npu/weights.bin` of the bundles on disk, with the very same numbers, cluster by cluster; each is recorded in the
 * journal once it is written. Continues behind the last record.
 */
export async function packWeights(plan: Plan, h: Hyperparameters, weights: OutputFile, shop: PackShop): Promise<void> {
  const bank = bankLayout(h);
  for (const extent of plan.npu) {
    const done = shop.progress.pieces.get(extent.name)?.done ?? 0;
    for (const cluster of bank.clusters) {
      if (cluster.range.offset < done) continue;
      shop.signal.throwIfAborted();
      await packCluster(plan, h, extent, cluster, weights, shop);
    }
  }
}

async function packCluster(
  plan: Plan,
  h: Hyperparameters,
  extent: NpuExtent,
  cluster: Cluster,
  weights: OutputFile,
  shop: PackShop,
): Promise<void> {
  const { range } = cluster;
  const end = range.offset + range.bytes;
  const target = shop.targets[0].subarray(0, (end === extent.bytes ? roundUpToPage(end) : end) - range.offset);
  target.fill(0);
  const { layout } = plan;
  const room = Math.floor(shop.targets[1].length / layout.unit_bytes);
  // Neurons that fit however they begin in a unit.
  const most = Math.floor(((room - 1) * layout.neurons_per_unit) / DOWN_TILE) * DOWN_TILE;
  for (let first = 0; first < cluster.paddedNeurons; first += most) {
    const paddedNeurons = Math.min(most, cluster.paddedNeurons - first);
    const neurons = Math.min(paddedNeurons, cluster.neurons - first);
    const start = cluster.firstNeuron + first;
    const unit = Math.floor(start / layout.neurons_per_unit);
    const units = Math.ceil((start + neurons) / layout.neurons_per_unit) - unit;
    const bytes = shop.targets[1].subarray(0, units * layout.unit_bytes);
    const expert = plan.neurons[extent.layer].offset + extent.expert * expertBytes(layout, h.neuron_count);
    await shop.files[NEURONS_FILE].read(bytes, expert + unit * layout.unit_bytes);
    await shop.addon.packCluster({
      units: bytes,
      layout: nativeLayout(layout),
      slot: start % layout.neurons_per_unit,
      neurons,
      paddedNeurons,
      first,
      target: target.subarray(0, range.bytes),
      parts: partsOf(cluster, h.hidden_size),
      threads: shop.threads,
    });
  }
  if (cluster.upBias) await copyUpBias(plan, extent, cluster, target, shop);
  const before = shop.progress.pieces.get(extent.name);
  const crc = await shop.addon.crc32(target.subarray(0, range.bytes), seedOf(before?.crc32));
  await weights.write(target, extent.offset + range.offset);
  await weights.sync();
  const record: PieceRecord = { extent: extent.name, done: end, crc32: crc32Text(crc) };
  await shop.journal.record(record);
  shop.progress.pieces.set(extent.name, record);
}

function partsOf({ range, gate, up, down, paddedNeurons }: Cluster, hiddenSize: number) {
  const place = ({ weights, scales }: NpuMatrix): PackedMatrix => {
    return { weights: weights.offset - range.offset, scales: scales.offset - range.offset };
  };
  const matrices = { ...(gate ? { gate: place(gate) } : {}), up: place(up), down: place(down) };
  return { ...matrices, neurons: paddedNeurons, hiddenSize };
}

/** The biases of a cluster's neurons are f32 in heat order already. */
async function copyUpBias(
  plan: Plan,
  extent: NpuExtent,
  { upBias, range, firstNeuron, neurons }: Cluster,
  target: Buffer,
  shop: PackShop,
): Promise<void> {
  const name = `layers.${extent.layer}.up_bias`;
  for (const place of plan.resident) {
    const tensor = place.kind === 'tensors' && place.tensors.find((found) => found.name === name);
    if (!tensor || !upBias) continue;
    const begin = upBias.offset - range.offset;
    const bytes = target.subarray(begin, begin + 4 * neurons);
    await shop.files[RESIDENT_FILE].read(bytes, place.offset + tensor.offset + 4 * firstNeuron);
  }
}
