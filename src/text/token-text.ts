import { Pi2Error } from '../base/error.js';

/** A step of `tokenizer.json`'s decoder, as far as it is looked into here. */
interface DecoderStep {
  type: string;
  decoders?: DecoderStep[];
  replacement?: string;
  pattern?: { String?: string; Regex?: string };
  content?: string;
  start?: number;
  stop?: number;
}

/** Turns the spelling of one token into the bytes it stands for. Bytes of several tokens may make one character. */
export type TokenBytes = (spelling: string) => Uint8Array;

type TextStep = (text: string) => string | Uint8Array;

const utf8 = new TextEncoder();

/**
 * Reads `decoder` of a `tokenizer.json` as a function on single tokens, which is what streaming needs: the library decodes
 * whole lists to text, where a character cut in two is already lost. Continuations are decoded, so nothing that happens only at
 * the start of a text (the leading space of sentencepiece) happens here. Throws `Pi2Error` E_TOKENIZER for unknown decoders.
 */
export function tokenBytes(decoder: unknown): TokenBytes {
  const steps = flatten(decoder as DecoderStep | null).map((step, i, all) => textStep(step, isFusedBefore(all, i)));
  return (spelling) => {
    let text = spelling;
    for (const step of steps) {
      const next = step(text);
      if (typeof next !== 'string') return next;
      text = next;
    }
    return utf8.encode(text);
  };
}

function flatten(decoder: DecoderStep | null): DecoderStep[] {
  if (decoder === null) return [{ type: 'None' }];
  return decoder.type === 'Sequence' ? (decoder.decoders ?? []).flatMap(flatten) : [decoder];
}

function isFusedBefore(steps: DecoderStep[], index: number): boolean {
  return steps.slice(0, index).some((step) => step.type === 'Fuse');
}

function textStep(step: DecoderStep, fused: boolean): TextStep {
  switch (step.type) {
    case 'None':
      // Without a decoder tokens are words, joined by spaces.
      return (text) => ` ${text}`;
    case 'ByteLevel':
      return byteLevelBytes;
    case 'ByteFallback':
      return (text) =>
        /^<0x[0-9A-Fa-f]{2}>$/.test(text) ? Uint8Array.of(Number.parseInt(text.slice(3, 5), 16)) : text;
    case 'Metaspace':
      return (text) => text.replaceAll(step.replacement ?? '\u2581', ' ');
    case 'Replace': {
      const { pattern, content } = step;
      const found = pattern?.Regex === undefined ? (pattern?.String ?? '') : new RegExp(pattern.Regex, 'gu');
      return (text) => (found === '' ? text : text.replaceAll(found, () => content ?? ''));
    }
    case 'Fuse':
      return (text) => text;
    case 'Strip': {
      // Behind Fuse it trims the whole text: the start of a continuation is not the start of the text.
      if (fused) return (text) => text;
      return (text) => trim(text, step.content ?? '', step.start ?? 0, step.stop ?? 0);
    }
    default:
      throw new Pi2Error(
        'E_TOKENIZER',
        `tokenizer.json: decoder ${step.type} is not supported`,
        'supported are ByteLevel, ByteFallback, Metaspace, Replace, Fuse and Strip; --tokens works without a tokenizer',
      );
  }
}

/** Takes up to `start` leading and `stop` trailing characters away that are `character`. */
function trim(text: string, character: string, start: number, stop: number): string {
  let first = 0;
  while (first < Math.min(start, text.length) && text[first] === character) first++;
  let end = text.length;
  while (end > first && text.length - end < stop && text[end - 1] === character) end--;
  return text.slice(first, end);
}

/** A token of a byte-level BPE is spelled with one character for each byte. Others (added tokens) are plain text. */
function byteLevelBytes(spelling: string): Uint8Array {
  const bytes: number[] = [];
  for (const character of spelling) {
    const byte = BYTE_OF_CHARACTER.get(character);
    if (byte === undefined) return utf8.encode(spelling);
    bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

/** GPT-2's alphabet of bytes: printable Latin-1 stands for itself, the other 68 bytes for the characters from U+0100 on. */
const BYTE_OF_CHARACTER: ReadonlyMap<string, number> = (() => {
  const isPrintable = (byte: number) =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
  const alphabet = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) alphabet.set(String.fromCharCode(isPrintable(byte) ? byte : next++), byte);
  return alphabet;
})();
