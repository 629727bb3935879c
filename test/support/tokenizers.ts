import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** A tokenizer as a checkpoint has it: the two parsed JSON files. */
export interface TokenizerFiles {
  tokenizer: Record<string, unknown>;
  config: Record<string, unknown>;
}

const SPECIAL_TOKENS = ['<pad>', '<s>', '</s>'].map((content, id) => ({
  id,
  content,
  special: true,
  normalized: false,
}));
const BOS_TEMPLATE = {
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [],
  special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
};

/**
 * Byte-level BPE as GPT-2, Llama 3 and Qwen have it: `<pad> <s> </s>` are 0, 1, 2, byte b is 3 + its place in the alphabet, then
 * a few merged tokens: ` t`, ` th`, ` the`, `he`. 263 tokens; BOS is put by the post-processor.
 */
export function byteLevelTokenizer(): TokenizerFiles {
  const alphabet: string[] = [];
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    alphabet.push(String.fromCharCode(printable ? byte : next++));
  }
  const merges = ['Ġ t', 'h e', 'Ġt he', 'Ġ a'];
  const spellings = [...alphabet, ...merges.map((merge) => merge.replace(' ', ''))];
  const vocab = Object.fromEntries(
    [...SPECIAL_TOKENS.map((token) => token.content), ...spellings].map((s, id) => [s, id]),
  );
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  return {
    tokenizer: {
      version: '1.0',
      added_tokens: SPECIAL_TOKENS,
      normalizer: null,
      pre_tokenizer: byteLevel,
      post_processor: BOS_TEMPLATE,
      decoder: byteLevel,
      model: { type: 'BPE', unk_token: null, vocab, merges },
    },
    config: { add_bos_token: true, bos_token: '<s>', eos_token: '</s>' },
  };
}

/**
 * BPE with byte fallback as Llama 2 and Mistral have it: spaces are `▁`, a leading one is put before a text, characters that are
 * not in the vocabulary are spelled `<0xNN>`. No post-processor: BOS is asked for by `add_bos_token`.
 */
export function fallbackTokenizer(): TokenizerFiles {
  const bytes = Array.from({ length: 256 }, (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`);
  const letters = [...'▁abcdefghijklmnopqrstuvwxyz.,'];
  const spellings = [...SPECIAL_TOKENS.map((token) => token.content), ...bytes, ...letters, '▁t', '▁th'];
  return {
    tokenizer: {
      version: '1.0',
      added_tokens: SPECIAL_TOKENS,
      normalizer: {
        type: 'Sequence',
        normalizers: [
          { type: 'Prepend', prepend: '▁' },
          { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
        ],
      },
      pre_tokenizer: null,
      post_processor: null,
      decoder: {
        type: 'Sequence',
        decoders: [
          { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
          { type: 'ByteFallback' },
          { type: 'Fuse' },
          { type: 'Strip', content: ' ', start: 1, stop: 0 },
        ],
      },
      model: {
        type: 'BPE',
        unk_token: '<pad>',
        byte_fallback: true,
        vocab: Object.fromEntries(spellings.map((spelling, id) => [spelling, id])),
        merges: ['▁ t', '▁t h'],
      },
    },
    config: { add_bos_token: true, bos_token: { content: '<s>' } },
  };
}

/** Writes both files into a directory and returns it. */
export function writeTokenizer(directory: string, { tokenizer, config }: TokenizerFiles): string {
  mkdirSync(directory, { recursive: true });
  writeFileSync(join(directory, 'tokenizer.json'), JSON.stringify(tokenizer));
  writeFileSync(join(directory, 'tokenizer_config.json'), JSON.stringify(config));
  return directory;
}
