import { constants } from 'node:fs';
import { type FileHandle, open, readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { fileError, Pi2Error } from '../../src/base/error.js';
import { quoted, readFully } from './safetensors.js';

export const CONFIG_FILE = 'config.json';
export const GENERATION_FILE = 'generation_config.json';
export const INDEX_FILE = 'model.safetensors.index.json';
const SINGLE_FILE = 'model.safetensors';

/** Files that go with the model unread, in this order. */
const TEXT_FILES = [
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  GENERATION_FILE,
  'chat_template.jinja',
];

/** Longest JSON file that is parsed; the index of the largest known models has a few megabytes. */
const JSON_BYTES_MOST = 100_000_000;
/** Most shards a checkpoint may have; each is an open file. */
const SHARDS_MOST = 900;

const PICKLE = /\.(bin|pt|pth|ckpt)$/;
const NOT_WEIGHTS = /^(training_args|optimizer|scheduler|rng_state.*)\.(bin|pt|pth)$/;

/** Which files of a checkpoint's directory hold what. Names are plain names inside the directory. */
export interface CheckpointFiles {
  /** The index, if the weights are in shards. */
  index: string | null;
  weights: string[];
  /** From the index: the shard that each tensor must be in. */
  shardOf: Map<string, string> | null;
  texts: string[];
}

/** Finds the files of a checkpoint. Throws in words when the directory is something else. */
export async function findFiles(directory: string): Promise<CheckpointFiles> {
  const names = await listDirectory(directory);
  if (!names.has(CONFIG_FILE) && names.has('model.json') && names.has('neurons.bin')) {
    throw notCheckpoint(`${directory} is a converted model already`, 'give the HuggingFace directory it came from');
  }
  const texts = TEXT_FILES.filter((name) => names.has(name));
  const all = [...names].sort();
  const safetensors = all.filter((name) => name.endsWith('.safetensors'));
  const single = names.has(SINGLE_FILE) ? SINGLE_FILE : safetensors.length === 1 ? safetensors[0] : undefined;
  const sharded = !names.has(SINGLE_FILE) && names.has(INDEX_FILE);
  if (single === undefined && !sharded) throw noWeights(directory, all, safetensors);
  if (!names.has(CONFIG_FILE)) {
    throw notCheckpoint(`${directory} has no ${CONFIG_FILE}`, 'a HuggingFace checkpoint has it beside the weights');
  }
  if (sharded) {
    const shardOf = await readIndex(directory, names);
    return { index: INDEX_FILE, weights: [...new Set(shardOf.values())].sort(), shardOf, texts };
  }
  return { index: null, weights: [single as string], shardOf: null, texts };
}

/** Opens a regular file of the directory for reading; symbolic links are followed, as HuggingFace's cache is made of them. */
export async function openFile(directory: string, name: string): Promise<FileHandle> {
  const path = join(directory, name);
  let handle: FileHandle | undefined;
  try {
    // A named pipe would block an ordinary open for ever.
    handle = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
    if (!(await handle.stat()).isFile()) {
      throw notCheckpoint(`${path} is not a regular file`, 'give a checkpoint as it was downloaded');
    }
    return handle;
  } catch (error) {
    await handle?.close();
    throw fileError(error, 'open', path);
  }
}

/** Reads and parses a JSON file that must hold an object. Throws `E_CHECKPOINT`. */
export async function readJsonObject(directory: string, name: string): Promise<{ value: object; bytes: number }> {
  const path = join(directory, name);
  const handle = await openFile(directory, name);
  let content: Buffer;
  try {
    const { size } = await handle.stat();
    if (size > JSON_BYTES_MOST) {
      throw notCheckpoint(
        `${path} has ${size} bytes; at most ${JSON_BYTES_MOST} are read`,
        'it is not what it is called',
      );
    }
    content = Buffer.alloc(size);
    await readFully(handle, content, 0, path);
  } catch (error) {
    throw fileError(error, 'read', path);
  } finally {
    await handle.close();
  }
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(content));
  } catch (error) {
    throw notCheckpoint(`${path} is not valid JSON (${quoted((error as Error).message)})`, 'download it again');
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw notCheckpoint(`${path} is not a JSON object`, 'download it again');
  }
  return { value, bytes: content.length };
}

async function listDirectory(directory: string): Promise<Set<string>> {
  try {
    if (!(await stat(directory)).isDirectory()) {
      const gguf = directory.endsWith('.gguf') ? ' (GGUF, already quantized)' : '';
      throw notCheckpoint(
        `${directory} is a file${gguf}, not a checkpoint directory`,
        'give the HuggingFace directory with config.json and *.safetensors',
      );
    }
    return new Set(await readdir(directory));
  } catch (error) {
    throw fileError(error, 'read', directory);
  }
}

/** Reads the index: which shard holds which tensor. Shard names must be names of files in this directory, not paths. */
async function readIndex(directory: string, names: ReadonlySet<string>): Promise<Map<string, string>> {
  const path = join(directory, INDEX_FILE);
  const { value } = await readJsonObject(directory, INDEX_FILE);
  const map: unknown = (value as { weight_map?: unknown }).weight_map;
  if (typeof map !== 'object' || map === null || Array.isArray(map) || Object.keys(map).length === 0) {
    throw notCheckpoint(`${path} has no "weight_map" that says which file holds which tensor`, 'download it again');
  }
  const shardOf = new Map<string, string>();
  for (const [tensor, shard] of Object.entries(map)) {
    if (typeof shard !== 'string' || !isPlainName(shard)) {
      throw notCheckpoint(
        `${path} says that tensor ${quoted(tensor)} is in ${quoted(shard)}, which is not the plain name of a .safetensors file`,
        'shards must be in the checkpoint directory itself',
      );
    }
    if (!names.has(shard)) {
      throw notCheckpoint(`${path} names ${quoted(shard)}, which is not there`, 'download the missing file');
    }
    shardOf.set(tensor, shard);
  }
  const shards = new Set(shardOf.values()).size;
  if (shards > SHARDS_MOST) {
    throw notCheckpoint(`${path} names ${shards} files; at most ${SHARDS_MOST} are opened`, 'merge the shards');
  }
  return shardOf;
}

function isPlainName(name: string): boolean {
  return name.endsWith('.safetensors') && !/[/\\\0]/.test(name);
}

function noWeights(directory: string, all: string[], safetensors: string[]): Pi2Error {
  if (safetensors.length > 1) {
    return notCheckpoint(
      `${directory} has ${safetensors.length} safetensors files (${safetensors.slice(0, 3).map(quoted).join(', ')}…) but no ${INDEX_FILE}`,
      'download the index, or keep only the file that holds the whole model',
    );
  }
  const pickles = all.filter((name) => PICKLE.test(name) && !NOT_WEIGHTS.test(name));
  if (pickles.length > 0) {
    return new Pi2Error(
      'E_PICKLE',
      `${directory} has its weights only as pickle (${pickles.slice(0, 3).map(quoted).join(', ')}), which can run any code when loaded: not opened`,
      'if you trust it, convert it to safetensors first: python3 -c "from transformers import AutoModelForCausalLM as M; ' +
        "M.from_pretrained('CHECKPOINT_DIR', torch_dtype='auto').save_pretrained('NEW_DIR', safe_serialization=True)\", " +
        'then copy the tokenizer files to NEW_DIR',
    );
  }
  if (all.some((name) => name.endsWith('.gguf'))) {
    return notCheckpoint(
      `${directory} has only GGUF files, already quantized`,
      'give the original HuggingFace checkpoint',
    );
  }
  return notCheckpoint(
    `${directory} has no *.safetensors`,
    'give a HuggingFace directory with config.json and *.safetensors',
  );
}

function notCheckpoint(message: string, hint: string): Pi2Error {
  return new Pi2Error('E_CHECKPOINT', message, hint);
}
