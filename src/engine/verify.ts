import { createHash } from 'node:crypto';
import { type FileHandle, open } from 'node:fs/promises';
import { fileError, Pi2Error } from '../base/error.js';
import { readHeatOrder } from '../format/heat-order.js';
import { expertCount } from '../format/hyperparameters.js';
import { type BundleLayout, roundUpToPage } from '../format/layout.js';
import {
  type Extent,
  NEURONS_FILE,
  PREDICTOR_FILE,
  PROFILE_FILE,
  RESIDENT_FILE,
  type TensorEntry,
} from '../format/manifest.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { graphFile, NPU_WEIGHTS_FILE } from '../format/npu.js';
import type { NativeAddon } from './contract.js';
import { nativeLayout } from './engine-request.js';

/** Read at once, unless one unit is larger. */
const PIECE_BYTES = 4 * 1024 * 1024;
const HASH_BYTES = 256 * 1024;
/** Bundles named for each extent; a wrong disk has millions. */
const BUNDLES_NAMED_MAX = 20;

/** What is wrong with one extent, or with the gap behind it. */
export interface WrongExtent {
  extent: string;
  file: string;
  problems: string[];
}

export interface VerifyOptions {
  threads: number;
  /** Called between pieces with the bytes checked so far; may throw to end early. */
  progress: (bytes: number) => void;
}

/**
 * Checks every byte of a model directory: the CRC-32 of each extent, of each neuron bundle, and that everything between and
 * behind them is zero. Memory is bounded whatever the model's size. Resolves with what is wrong, in the order of the manifest.
 */
export async function verifyModel(
  model: ModelDirectory,
  addon: Pick<NativeAddon, 'crc32' | 'bundleChecksums'>,
  options: VerifyOptions,
): Promise<WrongExtent[]> {
  const paths: [Extent['file'], string][] = [
    [RESIDENT_FILE, model.residentPath],
    [NEURONS_FILE, model.neuronsPath],
  ];
  if (model.manifest.npu) paths.push([NPU_WEIGHTS_FILE, model.npuWeightsPath]);
  if (model.manifest.predictor) paths.push([PREDICTOR_FILE, model.predictorPath]);
  const files = new Map<Extent['file'], OpenFile>();
  try {
    for (const [file, path] of paths) files.set(file, { path, handle: await openFile(path) });
    return await new Verifier(model, addon, options, files).run();
  } finally {
    for (const { handle } of files.values()) await handle.close();
  }
}

interface OpenFile {
  path: string;
  handle: FileHandle;
}

class Verifier {
  readonly #wrong: WrongExtent[] = [];
  #checkedBytes = 0;

  constructor(
    private readonly model: ModelDirectory,
    private readonly addon: Pick<NativeAddon, 'crc32' | 'bundleChecksums'>,
    private readonly options: VerifyOptions,
    private readonly files: ReadonlyMap<Extent['file'], OpenFile>,
  ) {}

  async run(): Promise<WrongExtent[]> {
    const { extents } = this.model.manifest;
    for (const file of this.files.keys()) {
      const ordered = extents.filter((extent) => extent.file === file);
      for (const [i, extent] of ordered.entries()) {
        const end = extent.offset + extent.bytes;
        const problems = file === NEURONS_FILE ? await this.#neuronsExtent(extent) : await this.#extent(extent);
        if (i === 0 && !(await this.#isZero(file, 0, extent.offset))) problems.push('bytes before it are not zero');
        const next = ordered[i + 1]?.offset ?? roundUpToPage(end);
        if (!(await this.#isZero(file, end, next))) problems.push('padding behind it is not zero');
        if (problems.length > 0) this.#wrong.push({ extent: extent.name, file, problems });
      }
    }
    await this.#profile();
    await this.#graphs();
    return this.#wrong;
  }

  /** That each heat order names every neuron once, and that the profile they are made of is the one that was. */
  async #profile(): Promise<void> {
    const { heat_order, hyperparameters } = this.model.manifest;
    const { profilePath } = this.model;
    if (heat_order === 'identity' || profilePath === null) return;
    for (let layer = 0; layer < hyperparameters.layer_count; layer++) {
      const extent = `layers.${layer}.heat_order`;
      // One with a wrong checksum is in the list already.
      if (this.#wrong.some((wrong) => wrong.extent === extent)) continue;
      await readHeatOrder(this.model, layer).catch((error: Error) => {
        this.#wrong.push({ extent, file: RESIDENT_FILE, problems: [error.message] });
      });
    }
    await this.#digest('profile', PROFILE_FILE, profilePath, heat_order.profile_sha256);
  }

  /** That each graph for a dense unit is the one that was made. */
  async #graphs(): Promise<void> {
    for (const graph of this.model.manifest.npu?.graphs ?? []) {
      await this.#digest('graph', graphFile(graph), this.model.graphPath(graph), graph.sha256);
    }
  }

  async #digest(extent: string, name: string, path: string, sha256: string): Promise<void> {
    const hash = createHash('sha256');
    const file = await openFile(path);
    try {
      const buffer = Buffer.alloc(HASH_BYTES);
      for (;;) {
        const { bytesRead } = await file.read(buffer, 0, buffer.length, null);
        if (bytesRead === 0) break;
        hash.update(buffer.subarray(0, bytesRead));
      }
    } catch (error) {
      throw fileError(error, 'read', path);
    } finally {
      await file.close();
    }
    const found = hash.digest('hex');
    if (found === sha256) return;
    this.#wrong.push({ extent, file: name, problems: [`sha256 is ${found}, the manifest says ${sha256}`] });
  }

  /** A plain extent of `resident.bin` or `predictor.bin`. */
  async #extent(extent: Extent): Promise<string[]> {
    const buffer = Buffer.alloc(Math.min(PIECE_BYTES, extent.bytes));
    let crc = 0;
    for (let done = 0; done < extent.bytes; done += buffer.length) {
      const piece = buffer.subarray(0, Math.min(buffer.length, extent.bytes - done));
      await this.#read(extent.file, piece, extent.offset + done);
      crc = await this.addon.crc32(piece, crc);
      this.#advance(piece.length);
    }
    return checksumProblems(extent, crc);
  }

  /** A layer's bundles: the extent's checksum, each bundle's two, and zero in all bytes that belong to none. */
  async #neuronsExtent(extent: Extent): Promise<string[]> {
    const { hyperparameters: h, layout } = this.model.manifest;
    const unitsPerExpert = Math.ceil(h.neuron_count / layout.neurons_per_unit);
    const unitsAtOnce = Math.max(1, Math.floor(PIECE_BYTES / layout.unit_bytes));
    const buffer = Buffer.alloc(Math.min(unitsAtOnce, unitsPerExpert) * layout.unit_bytes);
    const checksums = this.model.tensor(extent.name.replace(/neurons$/, 'checksums')) as TensorEntry;
    const bundles = new BundleProblems(h.experts !== null);
    let crc = 0;
    let offset = extent.offset;
    for (let expert = 0; expert < expertCount(h); expert++) {
      for (let unit = 0; unit < unitsPerExpert; unit += unitsAtOnce) {
        const units = Math.min(unitsAtOnce, unitsPerExpert - unit);
        const piece = buffer.subarray(0, units * layout.unit_bytes);
        const firstNeuron = unit * layout.neurons_per_unit;
        const count = Math.min(units * layout.neurons_per_unit, h.neuron_count - firstNeuron);
        await this.#read(extent.file, piece, offset);
        crc = await this.addon.crc32(piece, crc);
        const expected = await this.#checksums(checksums, expert * h.neuron_count + firstNeuron, count);
        const request = { units: piece, neurons: count, layout: nativeLayout(layout), threads: this.options.threads };
        const found = await this.addon.bundleChecksums(request);
        for (let i = 0; i < 2 * count; i++) {
          if (found[i] !== expected.readUInt32LE(4 * i)) bundles.wrongPart(expert, firstNeuron + (i >> 1), (i % 2) + 1);
        }
        for (const at of dirtyUnits(piece, layout, count)) bundles.dirtyUnit(expert, unit + at);
        offset += piece.length;
        this.#advance(piece.length);
      }
    }
    return [...checksumProblems(extent, crc), ...bundles.words()];
  }

  async #checksums(tensor: TensorEntry, firstRow: number, rows: number): Promise<Buffer> {
    const bytes = Buffer.alloc(rows * 8);
    await this.#read(RESIDENT_FILE, bytes, this.model.tensorOffset(tensor) + firstRow * 8);
    return bytes;
  }

  async #isZero(file: Extent['file'], start: number, end: number): Promise<boolean> {
    const buffer = Buffer.alloc(Math.min(PIECE_BYTES, end - start));
    for (let at = start; at < end; at += buffer.length) {
      const piece = buffer.subarray(0, Math.min(buffer.length, end - at));
      await this.#read(file, piece, at);
      if (!isZero(piece)) return false;
    }
    return true;
  }

  async #read(file: Extent['file'], target: Buffer, position: number): Promise<void> {
    const { handle, path } = this.files.get(file) as OpenFile;
    for (let done = 0; done < target.length; ) {
      const { bytesRead } = await handle
        .read(target, done, target.length - done, position + done)
        .catch((error: unknown) => Promise.reject(fileError(error, 'read', path)));
      if (bytesRead === 0) throw new Pi2Error('E_IO', `${path} ended at byte ${position + done} while it was read`);
      done += bytesRead;
    }
  }

  #advance(bytes: number): void {
    this.#checkedBytes += bytes;
    this.options.progress(this.#checkedBytes);
  }
}

/** Collects what is wrong in the bundles of a layer: names the first, counts the rest. */
class BundleProblems {
  readonly #named: string[] = [];
  #count = 0;

  constructor(private readonly namesExperts: boolean) {}

  wrongPart(expert: number, neuron: number, part: number): void {
    this.#add(`${this.#expert(expert)}neuron ${neuron}, part ${part}: wrong checksum`);
  }

  dirtyUnit(expert: number, unit: number): void {
    this.#add(`${this.#expert(expert)}unit ${unit}: padding is not zero`);
  }

  words(): string[] {
    const more = this.#count - this.#named.length;
    return more > 0 ? [...this.#named, `and ${more} more`] : this.#named;
  }

  #expert(expert: number): string {
    return this.namesExperts ? `expert ${expert}, ` : '';
  }

  #add(words: string): void {
    this.#count++;
    if (this.#named.length < BUNDLES_NAMED_MAX) this.#named.push(words);
  }
}

/** Units of `piece` with a byte that is in no bundle and not zero. `neurons` bundles are there, from slot 0 of unit 0 on. */
function* dirtyUnits(piece: Buffer, layout: BundleLayout, neurons: number): Generator<number> {
  const { neurons_per_unit, unit_bytes, part1_bytes, part2_bytes, part1_stride, part2_offset, part2_stride } = layout;
  for (let unit = 0; unit * unit_bytes < piece.length; unit++) {
    const bytes = piece.subarray(unit * unit_bytes, (unit + 1) * unit_bytes);
    const count = Math.min(neurons_per_unit, neurons - unit * neurons_per_unit);
    // Joint parts fill the unit from its start; split ones each fill their half from its start.
    const end1 = (count - 1) * part1_stride + part1_bytes;
    const end2 = part2_offset + (count - 1) * part2_stride + part2_bytes;
    const isJoint = part2_offset < end1;
    const clean = (isJoint || isZero(bytes.subarray(end1, part2_offset))) && isZero(bytes.subarray(end2));
    if (!clean) yield unit;
  }
}

function isZero(bytes: Buffer): boolean {
  for (let i = 0; i < bytes.length; i++) if (bytes[i] !== 0) return false;
  return true;
}

function checksumProblems(extent: Extent, crc: number): string[] {
  const found = (crc >>> 0).toString(16).padStart(8, '0');
  return found === extent.crc32 ? [] : [`checksum is ${found}, the manifest says ${extent.crc32}`];
}

async function openFile(file: string): Promise<FileHandle> {
  try {
    return await open(file, 'r');
  } catch (error) {
    throw fileError(error, 'read', file);
  }
}
