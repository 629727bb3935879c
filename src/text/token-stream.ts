import type { TextTokenizer } from './tokenizer.js';

/**
 * Turns a stream of tokens into text. A character whose bytes are spread over several tokens comes out with the last of them;
 * at most three bytes wait. Bytes that are no UTF-8 become U+FFFD. The texts put together are the text of all the bytes.
 */
export class TokenStream {
  readonly #tokenizer: Pick<TextTokenizer, 'bytes'>;
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  #waiting: Uint8Array = new Uint8Array(0);

  constructor(tokenizer: Pick<TextTokenizer, 'bytes'>) {
    this.#tokenizer = tokenizer;
  }

  /** Whether a character has begun and not ended. */
  get isWaiting(): boolean {
    return this.#waiting.length > 0;
  }

  /** The text that is complete with this token. */
  push(id: number): string {
    const bytes = Buffer.concat([this.#waiting, this.#tokenizer.bytes(id)]);
    const complete = bytes.length - unfinishedLength(bytes);
    this.#waiting = bytes.subarray(complete);
    return this.#decoder.decode(bytes.subarray(0, complete));
  }

  /** What is left when no more tokens come: U+FFFD for a character that never ended. */
  flush(): string {
    const text = this.#decoder.decode(this.#waiting);
    this.#waiting = new Uint8Array(0);
    return text;
  }
}

/** Length of a trailing character that lacks bytes: a lead byte followed by too few continuation bytes. */
function unfinishedLength(bytes: Uint8Array): number {
  for (let length = 1; length <= Math.min(3, bytes.length); length++) {
    const byte = bytes[bytes.length - length];
    if (byte >= 0xc0) return length < characterLength(byte) ? length : 0;
    if (byte < 0x80) return 0;
  }
  return 0;
}

function characterLength(lead: number): number {
  if (lead >= 0xf0) return 4;
  return lead >= 0xe0 ? 3 : 2;
}
