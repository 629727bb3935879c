import { readFile, stat } from 'node:fs/promises';
import { Tokenizer } from '@huggingface/tokenizers';
import { fileError, Pi2Error } from '../base/error.js';
import type { TokenizerPaths } from '../format/model-directory.js';
import { type TokenBytes, tokenBytes } from './token-text.js';

/** The largest vocabularies take some 35 MB. */
const TOKENIZER_BYTES_MAX = 256 * 1024 * 1024;

/** What is used of the library, whose own declarations do not resolve under Node's module rules. */
interface Library {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: (number | undefined)[] };
  id_to_token(id: number): string | undefined;
  token_to_id(token: string): number | undefined;
  get_added_tokens_decoder(): Map<number, { id: number; special: boolean }>;
}

const NO_BYTES = new Uint8Array(0);

/** Text to token ids and back, by the `tokenizer.json` of the checkpoint. */
export class TextTokenizer {
  /** The token put before every text, or null if the tokenizer puts none. */
  readonly bosTokenId: number | null;
  readonly #library: Library;
  readonly #tokenBytes: TokenBytes;
  readonly #specialIds: ReadonlySet<number>;
  /** Whether `bosTokenId` is put by us because the tokenizer's configuration asks for it and its post-processor does not. */
  readonly #addsBos: boolean;

  /** `tokenizer` and `config` are the parsed JSON files. Throws `Pi2Error` E_TOKENIZER when they cannot be used. */
  constructor(tokenizer: unknown, config: unknown) {
    try {
      const { decoder } = tokenizer as { decoder?: unknown };
      // Keys that the library insists on and that some files leave out.
      const defaults = { added_tokens: [], normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };
      this.#library = new Tokenizer({ ...defaults, ...(tokenizer as object) }, config as object);
      this.#tokenBytes = tokenBytes(decoder ?? null);
      const added = [...this.#library.get_added_tokens_decoder().values()];
      this.#specialIds = new Set(added.filter((token) => token.special).map((token) => token.id));
      const leading = this.#leadingToken();
      const asked = leading === null ? this.#configuredBos(config as TokenizerConfig) : null;
      this.bosTokenId = leading ?? asked;
      this.#addsBos = asked !== null;
    } catch (error) {
      if (error instanceof Pi2Error) throw error;
      throw unusable(`tokenizer.json: ${(error as Error).message}`, error);
    }
  }

  /** Opens the tokenizer of a model directory. */
  static async open(paths: TokenizerPaths): Promise<TextTokenizer> {
    if (paths.tokenizer === null) {
      throw new Pi2Error(
        'E_TOKENIZER',
        'the model directory has no tokenizer.json',
        'give token ids with --tokens, or convert again from a checkpoint that has it',
      );
    }
    const config = paths.config === null ? {} : await readJson(paths.config);
    return new TextTokenizer(await readJson(paths.tokenizer), config);
  }

  /** Ids of a text as the model expects it: with the special tokens that the tokenizer puts around it. */
  encode(text: string): number[] {
    const ids = this.#ids(text, true);
    return this.#addsBos ? [this.bosTokenId as number, ...ids] : ids;
  }

  /** Ids of a text alone. */
  encodePlain(text: string): number[] {
    return this.#ids(text, false);
  }

  /** UTF-8 bytes of a token inside a text; none for special tokens and for ids that the tokenizer has no token for. */
  bytes(id: number): Uint8Array {
    const spelling = this.#library.id_to_token(id);
    if (spelling === undefined || this.#specialIds.has(id)) return NO_BYTES;
    return this.#tokenBytes(spelling);
  }

  #ids(text: string, special: boolean): number[] {
    const { ids } = this.#library.encode(text, { add_special_tokens: special });
    if (ids.includes(undefined)) {
      throw new Pi2Error('E_TEXT', 'the text has words that the tokenizer does not know, and it has no unknown token');
    }
    return ids as number[];
  }

  /** What the post-processor puts before a text, found out with a short one. */
  #leadingToken(): number | null {
    const plain = this.#ids('a', false);
    const full = this.#ids('a', true);
    const startsPlain = plain.every((id, i) => full[i] === id);
    return full.length > plain.length && !startsPlain ? full[0] : null;
  }

  #configuredBos(config: TokenizerConfig): number | null {
    if (config.add_bos_token !== true || !config.bos_token) return null;
    const spelling = typeof config.bos_token === 'string' ? config.bos_token : config.bos_token.content;
    return this.#library.token_to_id(spelling) ?? null;
  }
}

interface TokenizerConfig {
  add_bos_token?: boolean;
  bos_token?: string | { content: string } | null;
}

async function readJson(file: string): Promise<unknown> {
  let text: string;
  try {
    const { size } = await stat(file);
    if (size > TOKENIZER_BYTES_MAX) throw unusable(`${file} has ${size} bytes, more than any tokenizer`);
    text = await readFile(file, 'utf8');
  } catch (error) {
    throw fileError(error, 'read', file);
  }
  try {
    const json: unknown = JSON.parse(text);
    if (typeof json !== 'object' || json === null) throw new Error('it is not an object');
    return json;
  } catch (error) {
    throw unusable(`${file}: ${(error as Error).message}`, error);
  }
}

function unusable(what: string, cause?: unknown): Pi2Error {
  return new Pi2Error(
    'E_TOKENIZER',
    `cannot use the tokenizer: ${what}`,
    'copy the file from the checkpoint again; --tokens works without a tokenizer',
    { cause },
  );
}
