import { lstat, open, stat } from 'node:fs/promises';
import path from 'node:path';
import { fileError, Pi2Error } from '../base/error.js';
import { expectedExtents, expectedTensors } from './contents.js';
import { rowBytes } from './encoding.js';
import { expertCount } from './hyperparameters.js';
import { expertBytes, PAGE_BYTES, roundUpToPage } from './layout.js';
import {
  type Extent,
  FORMAT_VERSION,
  MANIFEST_FILE,
  type Manifest,
  manifestSchema,
  NEURONS_FILE,
  PREDICTOR_FILE,
  PROFILE_FILE,
  RESIDENT_FILE,
  type TensorEntry,
} from './manifest.js';
import { checkHyperparameters, checkLayout, checkNpu, checkPredictor } from './manifest-checks.js';
import { bankLayout, type GraphShape, graphFile, NPU_FOLDER, NPU_WEIGHTS_FILE } from './npu.js';

/** Tensors begin at multiples of this inside their extent. */
export const TENSOR_ALIGNMENT = 64;

/** A manifest of the largest model the limits allow is far below this. */
const MANIFEST_BYTES_MAX = 32 * 1024 * 1024;

/** What a conversion calls its directory until it is whole. */
const PARTIAL = '.pi2.partial';

const CONVERT_AGAIN = 'convert the checkpoint again: powerinfer2 convert CHECKPOINT_DIR --force';

/** Tokenizer files that may be beside the weights; null when absent. */
export interface TokenizerPaths {
  tokenizer: string | null;
  config: string | null;
}

/** An opened model directory whose manifest was checked against the format and against the sizes of its files. */
export class ModelDirectory {
  readonly path: string;
  readonly manifest: Manifest;
  readonly tokenizerPaths: TokenizerPaths;
  readonly #extents: Map<string, Extent>;
  readonly #tensors: Map<string, TensorEntry>;

  constructor(directory: string, manifest: Manifest, tokenizerPaths: TokenizerPaths) {
    this.path = directory;
    this.manifest = manifest;
    this.tokenizerPaths = tokenizerPaths;
    this.#extents = new Map(manifest.extents.map((extent) => [extent.name, extent]));
    this.#tensors = new Map(manifest.tensors.map((tensor) => [tensor.name, tensor]));
  }

  get residentPath(): string {
    return path.join(this.path, RESIDENT_FILE);
  }

  get neuronsPath(): string {
    return path.join(this.path, NEURONS_FILE);
  }

  get predictorPath(): string {
    return path.join(this.path, PREDICTOR_FILE);
  }

  /** Weights of a dense unit; there only if the manifest has `npu`. */
  get npuWeightsPath(): string {
    return path.join(this.path, NPU_WEIGHTS_FILE);
  }

  /** One of the graphs of the manifest's `npu`. */
  graphPath(shape: GraphShape): string {
    return path.join(this.path, graphFile(shape));
  }

  /** The activation profile that the heat order is made of; null when the neurons are in the order of the checkpoint. */
  get profilePath(): string | null {
    return this.manifest.heat_order === 'identity' ? null : path.join(this.path, PROFILE_FILE);
  }

  /** The extent called `name`. The names of FORMAT.md section 3 are there: anything else is a bug of the caller. */
  extent(name: string): Extent {
    const extent = this.#extents.get(name);
    if (!extent) throw new Error(`no extent ${name}`);
    return extent;
  }

  /** The tensor called `name`, or undefined if a model of this kind has none. */
  tensor(name: string): TensorEntry | undefined {
    return this.#tensors.get(name);
  }

  /** Where a tensor begins in the file of its extent. */
  tensorOffset(tensor: TensorEntry): number {
    return this.extent(tensor.extent).offset + tensor.offset;
  }

  /** Where the bundles of an expert begin in `neurons.bin`. A dense FFN is expert 0. */
  expertOffset(layer: number, expert: number): number {
    const { layout, hyperparameters } = this.manifest;
    return this.extent(`layers.${layer}.neurons`).offset + expert * expertBytes(layout, hyperparameters.neuron_count);
  }
}

/**
 * Opens `NAME.pi2`: reads `model.json` and checks it against the format, against itself and against the sizes of the files.
 * No weight is read. Throws `Pi2Error`: E_FILE when there is nothing to open, E_MODEL_VERSION when it is newer than this
 * program, E_MODEL when it is not whole.
 */
export async function openModelDirectory(directory: string): Promise<ModelDirectory> {
  await requireDirectory(directory);
  const manifest = parseManifest(await readManifest(directory), path.join(directory, MANIFEST_FILE));
  await checkFileSizes(directory, manifest);
  const tokenizerPaths = {
    tokenizer: await regularFile(directory, 'tokenizer.json'),
    config: await regularFile(directory, 'tokenizer_config.json'),
  };
  return new ModelDirectory(directory, manifest, tokenizerPaths);
}

/** Parses and checks the text of a manifest; `where` names it in errors. Throws `Pi2Error` and nothing else. */
export function parseManifest(text: string, where: string): Manifest {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new Pi2Error('E_MODEL', `${where} is not JSON: ${(error as Error).message}`, CONVERT_AGAIN);
  }
  requireKnownVersion(json, where);
  const parsed = manifestSchema.safeParse(json);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    const key = issue.path.join('.') || 'the whole';
    throw new Pi2Error('E_MODEL', `${where}: ${key}: ${issue.message}`, CONVERT_AGAIN);
  }
  const problem = findProblem(parsed.data);
  if (problem) throw new Pi2Error('E_MODEL', `${where}: ${problem}`, CONVERT_AGAIN);
  return parsed.data;
}

async function requireDirectory(directory: string): Promise<void> {
  const name = directory.replace(/\/+$/, '');
  const isDirectory = await stat(directory).then(
    (found) => found.isDirectory(),
    (error: unknown) => error,
  );
  // Whoever asks for a model that is still being made hears of it, under either name.
  const isThere = typeof isDirectory === 'boolean';
  const isUnfinished = isThere ? name.endsWith(PARTIAL) : await isPresent(`${name}.partial`);
  if (isUnfinished) {
    throw new Pi2Error(
      'E_MODEL',
      `the conversion of ${name.replace(/\.partial$/, '')} is unfinished`,
      'run the same convert command again: it continues where it stopped',
    );
  }
  if (!isThere) throw fileError(isDirectory, 'open', directory);
  if (!isDirectory) {
    throw new Pi2Error('E_MODEL', `${directory} is not a model directory`, 'give the NAME.pi2 that convert made');
  }
}

function isPresent(file: string): Promise<boolean> {
  return stat(file).then(
    () => true,
    () => false,
  );
}

/** Reads `model.json`, which must be a file of the directory itself: links could lead outside of it. */
async function readManifest(directory: string): Promise<string> {
  const file = path.join(directory, MANIFEST_FILE);
  try {
    const found = await lstat(file);
    if (!found.isFile()) throw new Pi2Error('E_MODEL', `${file} is not a regular file`, CONVERT_AGAIN);
    if (found.size > MANIFEST_BYTES_MAX) {
      throw new Pi2Error('E_MODEL', `${file} has ${found.size} bytes, more than any manifest`, CONVERT_AGAIN);
    }
    const handle = await open(file, 'r');
    try {
      return await handle.readFile('utf8');
    } finally {
      await handle.close();
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') {
      throw new Pi2Error(
        'E_MODEL',
        `${directory} is not a model directory: it has no ${MANIFEST_FILE}`,
        'give the NAME.pi2 that convert made; a HuggingFace checkpoint has to be converted first',
      );
    }
    throw fileError(error, 'read', file);
  }
}

/** Refuses a newer format before its unknown keys are complained of. */
function requireKnownVersion(json: unknown, where: string): void {
  const version = (json as { format?: { version?: unknown } } | null)?.format?.version;
  if (typeof version === 'number' && version > FORMAT_VERSION) {
    throw new Pi2Error(
      'E_MODEL_VERSION',
      `${where} was made by a newer powerinfer2: format ${version}, this one reads ${FORMAT_VERSION}`,
      'update powerinfer2, or convert the checkpoint again with this version',
    );
  }
}

/** The first thing in the manifest that cannot be, in words; null if all adds up. */
function findProblem(manifest: Manifest): string | null {
  return (
    checkHyperparameters(manifest) ??
    checkLayout(manifest) ??
    checkPredictor(manifest) ??
    checkNpu(manifest) ??
    checkExtents(manifest) ??
    checkTensors(manifest)
  );
}

function checkExtents(manifest: Manifest): string | null {
  const expected = new Map(expectedExtents(manifest).map((extent) => [extent.name, extent.file]));
  const ends = { [RESIDENT_FILE]: 0, [NEURONS_FILE]: 0, [PREDICTOR_FILE]: 0, [NPU_WEIGHTS_FILE]: 0 };
  const seen = new Set<string>();
  for (const extent of manifest.extents) {
    if (!expected.has(extent.name)) return `unknown extent ${extent.name}`;
    if (seen.has(extent.name)) return `extent ${extent.name} is there twice`;
    seen.add(extent.name);
    if (extent.file !== expected.get(extent.name)) return `extent ${extent.name} is in ${extent.file}`;
    if (extent.offset % PAGE_BYTES !== 0) return `extent ${extent.name} begins at ${extent.offset}, not on a page`;
    if (extent.offset < ends[extent.file])
      return `extent ${extent.name} overlaps the one before it, or is out of order`;
    ends[extent.file] = extent.offset + extent.bytes;
    if (!Number.isSafeInteger(ends[extent.file])) return `extent ${extent.name} ends beyond any file`;
  }
  for (const name of expected.keys()) if (!seen.has(name)) return `extent ${name} is missing`;
  const { hyperparameters: h, layout } = manifest;
  const neuronBytes = expertCount(h) * expertBytes(layout, h.neuron_count);
  const orderBytes = 4 * expertCount(h) * h.neuron_count;
  const bankBytes = manifest.npu === undefined ? 0 : bankLayout(h).bytes;
  for (const extent of manifest.extents) {
    if (extent.file === NPU_WEIGHTS_FILE && extent.bytes !== bankBytes) {
      return `extent ${extent.name} has ${extent.bytes} bytes, its clusters take ${bankBytes}`;
    }
    if (extent.file === NEURONS_FILE && extent.bytes !== neuronBytes) {
      return `extent ${extent.name} has ${extent.bytes} bytes, its bundles take ${neuronBytes}`;
    }
    if (extent.name.endsWith('.heat_order') && extent.bytes !== orderBytes) {
      return `extent ${extent.name} has ${extent.bytes} bytes, its order takes ${orderBytes}`;
    }
  }
  return null;
}

function checkTensors(manifest: Manifest): string | null {
  const expected = new Map(expectedTensors(manifest).map((tensor) => [tensor.name, tensor]));
  const extents = new Map(manifest.extents.map((extent) => [extent.name, extent]));
  const ranges = new Map<string, TensorEntry[]>();
  const seen = new Set<string>();
  for (const tensor of manifest.tensors) {
    const { name } = tensor;
    const want = expected.get(name);
    if (!want) return `unknown tensor ${name}`;
    if (seen.has(name)) return `tensor ${name} is there twice`;
    seen.add(name);
    if (tensor.extent !== want.extent) return `tensor ${name} is in extent ${tensor.extent}, not ${want.extent}`;
    if (tensor.rows !== want.rows || tensor.columns !== want.columns) {
      return `tensor ${name} is ${tensor.rows} x ${tensor.columns}, the model needs ${want.rows} x ${want.columns}`;
    }
    if (!want.encodings.includes(tensor.encoding)) {
      return `tensor ${name} is stored as ${tensor.encoding}, expected ${want.encodings.join(' or ')}`;
    }
    const bytes =
      tensor.rows * (tensor.encoding === 'u32' ? 4 * tensor.columns : rowBytes(tensor.encoding, tensor.columns));
    if (tensor.bytes !== bytes) return `tensor ${name} has ${tensor.bytes} bytes, its shape takes ${bytes}`;
    if (tensor.offset % TENSOR_ALIGNMENT !== 0)
      return `tensor ${name} begins at ${tensor.offset}, not at a multiple of 64`;
    const extent = extents.get(tensor.extent) as Extent;
    if (tensor.offset > extent.bytes - bytes) return `tensor ${name} ends beyond its extent ${extent.name}`;
    ranges.set(extent.name, [...(ranges.get(extent.name) ?? []), tensor]);
  }
  for (const name of expected.keys()) if (!seen.has(name)) return `tensor ${name} is missing`;
  for (const tensors of ranges.values()) {
    tensors.sort((a, b) => a.offset - b.offset);
    const at = tensors.findIndex((tensor, i) => i > 0 && tensors[i - 1].offset + tensors[i - 1].bytes > tensor.offset);
    if (at > 0) return `tensors ${tensors[at - 1].name} and ${tensors[at].name} overlap`;
  }
  return null;
}

/** A file ends with the page of its last extent: neither cut off nor with something behind. */
async function checkFileSizes(directory: string, manifest: Manifest): Promise<void> {
  const sizes = new Map<string, number>();
  for (const { file, offset, bytes } of manifest.extents) sizes.set(file, roundUpToPage(offset + bytes));
  if (manifest.heat_order !== 'identity') sizes.set(PROFILE_FILE, manifest.heat_order.profile_bytes);
  for (const graph of manifest.npu?.graphs ?? []) sizes.set(graphFile(graph), graph.bytes);
  if (manifest.npu !== undefined) await requireOwnFolder(directory, NPU_FOLDER);
  for (const [name, expected] of sizes) {
    const file = path.join(directory, name);
    let found: Awaited<ReturnType<typeof lstat>>;
    try {
      found = await lstat(file);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw fileError(error, 'read', file);
      throw new Pi2Error('E_MODEL', `${directory} is not whole: ${name} is missing`, CONVERT_AGAIN);
    }
    if (!found.isFile()) throw new Pi2Error('E_MODEL', `${file} is not a regular file`, CONVERT_AGAIN);
    if (found.size !== expected) {
      const words = found.size < expected ? 'is cut off' : 'is too long';
      throw new Pi2Error('E_MODEL', `${file} ${words}: ${found.size} bytes, expected ${expected}`, CONVERT_AGAIN);
    }
  }
}

/** A folder of the directory itself: a link could lead outside of it. */
async function requireOwnFolder(directory: string, name: string): Promise<void> {
  const isFolder = await lstat(path.join(directory, name)).then(
    (found) => found.isDirectory(),
    () => false,
  );
  if (!isFolder) throw new Pi2Error('E_MODEL', `${directory} is not whole: it has no folder ${name}`, CONVERT_AGAIN);
}

async function regularFile(directory: string, name: string): Promise<string | null> {
  const file = path.join(directory, name);
  try {
    return (await lstat(file)).isFile() ? file : null;
  } catch {
    return null;
  }
}
