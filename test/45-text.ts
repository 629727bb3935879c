import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import t from 'tap';
import { readTextFile } from '../src/text/text-file.js';
import { TokenStream } from '../src/text/token-stream.js';
import { tokenBytes } from '../src/text/token-text.js';
import { TextTokenizer } from '../src/text/tokenizer.js';
import { byteLevelTokenizer, fallbackTokenizer, type TokenizerFiles, writeTokenizer } from './support/tokenizers.js';

const make = ({ tokenizer, config }: TokenizerFiles) => new TextTokenizer(tokenizer, config);

/** The text of tokens that come one by one. */
function stream(tokenizer: Pick<TextTokenizer, 'bytes'>, ids: readonly number[]): string {
  const decoder = new TokenStream(tokenizer);
  return ids.map((id) => decoder.push(id)).join('') + decoder.flush();
}

t.test('streamed text is the text of all bytes, however they are cut', (t) => {
  const pieces = fc.array(fc.uint8Array({ maxLength: 5 }), { maxLength: 20 });
  const check = (tokens: Uint8Array[]) => {
    const whole = new TextDecoder('utf-8', { ignoreBOM: true }).decode(Buffer.concat(tokens));
    t.equal(stream({ bytes: (id) => tokens[id] }, [...tokens.keys()]), whole);
  };
  fc.assert(fc.property(pieces, check));
  // Characters of all lengths, byte by byte.
  const text = fc.string({ unit: 'binary', maxLength: 12 });
  fc.assert(fc.property(text, (string) => check([...Buffer.from(string)].map((byte) => Uint8Array.of(byte)))));
  t.end();
});

t.test('a character comes out with its last byte, not before', (t) => {
  const bytes = [...Buffer.from('é🙂!')];
  const decoder = new TokenStream({ bytes: (id) => Uint8Array.of(bytes[id]) });
  t.strictSame(
    bytes.map((_, id) => [decoder.push(id), decoder.isWaiting]),
    [
      ['', true],
      ['é', false],
      ['', true],
      ['', true],
      ['', true],
      ['🙂', false],
      ['!', false],
    ],
  );
  t.equal(decoder.flush(), '');
  decoder.push(2);
  t.equal(decoder.flush(), '\ufffd', 'what never ends is shown at the end');
  t.equal(decoder.isWaiting, false);
  t.end();
});

t.test('at most three bytes wait, whatever comes', (t) => {
  const check = (bytes: Uint8Array) => {
    const decoder = new TokenStream({ bytes: (id) => bytes.subarray(id, id + 1) });
    let waiting = 0;
    for (let id = 0; id < bytes.length; id++) {
      waiting = decoder.push(id) === '' ? waiting + 1 : decoder.isWaiting ? 1 : 0;
      if (waiting > 3) return false;
    }
    return true;
  };
  fc.assert(fc.property(fc.uint8Array({ maxLength: 40 }), check));
  t.end();
});

t.test('byte-level tokens: text there and back', (t) => {
  const tokenizer = make(byteLevelTokenizer());
  const text = fc.string({ unit: 'grapheme', maxLength: 30 });
  fc.assert(fc.property(text, (string) => stream(tokenizer, tokenizer.encodePlain(string)) === string));
  t.strictSame(tokenizer.encodePlain(' the'), [261]);
  t.strictSame(tokenizer.encode(' the'), [1, 261]);
  t.equal(tokenizer.bosTokenId, 1);
  t.equal(stream(tokenizer, [1, 261, 2, 99_999]), ' the', 'special and unknown tokens have no text');
  t.end();
});

t.test('tokens with byte fallback: spaces, bytes and BOS asked for by the configuration', (t) => {
  const tokenizer = make(fallbackTokenizer());
  t.equal(tokenizer.bosTokenId, 1);
  const ids = tokenizer.encode('the 🙂 é.');
  t.equal(ids[0], 1);
  t.equal(stream(tokenizer, ids), ' the 🙂 é.', 'a continuation keeps the space of its first word');
  t.equal(tokenizer.encodePlain('a')[0] === 1, false);
  const config = { ...fallbackTokenizer().config, add_bos_token: false };
  const without = make({ ...fallbackTokenizer(), config });
  t.equal(without.bosTokenId, null);
  t.strictSame(without.encode('the'), without.encodePlain('the'));
  t.end();
});

t.test('a BOS that the post-processor puts is not put twice', (t) => {
  const files = byteLevelTokenizer();
  t.strictSame(make(files).encode('a').length, 2);
  const { post_processor: _, ...tokenizer } = files.tokenizer;
  t.strictSame(make({ ...files, tokenizer }).encode('a'), make(files).encode('a'), 'left out: add_bos_token puts it');
  const config = { add_bos_token: false, bos_token: '<s>' };
  t.strictSame(make({ tokenizer, config }).bosTokenId, null);
  t.end();
});

t.test('an end token behind a text is not taken for BOS', (t) => {
  const files = byteLevelTokenizer();
  const single = [{ Sequence: { id: 'A', type_id: 0 } }, { SpecialToken: { id: '</s>', type_id: 0 } }];
  const post_processor = { type: 'TemplateProcessing', single, pair: [], special_tokens: {} };
  t.equal(new TextTokenizer({ ...files.tokenizer, post_processor }, {}).bosTokenId, null);
  t.end();
});

t.test('decoders of tokenizer.json, token by token', (t) => {
  const text = (decoder: unknown, spelling: string) => Buffer.from(tokenBytes(decoder)(spelling)).toString('utf8');
  t.equal(text(null, 'word'), ' word', 'no decoder: words joined by spaces');
  t.equal(text({ type: 'Metaspace', replacement: '_' }, '_a_b'), ' a b');
  t.equal(text({ type: 'Metaspace' }, '▁a'), ' a');
  t.equal(text({ type: 'ByteLevel' }, 'Ġé'), ' \ufffd', 'é stands for byte E9');
  t.equal(text({ type: 'ByteLevel' }, '日本'), '日本', 'an added token is plain text');
  t.equal(text({ type: 'Replace', pattern: { Regex: '_+' }, content: '$&' }, 'a__b'), 'a$&b');
  t.equal(text({ type: 'Sequence', decoders: [{ type: 'Strip', content: '-', start: 1, stop: 2 }] }, '--a---'), '-a-');
  t.equal(text({ type: 'ByteFallback' }, '<0x41>'), 'A');
  t.equal(text({ type: 'ByteFallback' }, '<0xZZ>'), '<0xZZ>');
  t.throws(() => tokenBytes({ type: 'CTC' }), { code: 'E_TOKENIZER', message: /CTC/ });
  t.end();
});

t.test('a tokenizer that is missing, broken or not one is refused in words', async (t) => {
  const good = writeTokenizer(t.testdir(), byteLevelTokenizer());
  const paths = { tokenizer: join(good, 'tokenizer.json'), config: join(good, 'tokenizer_config.json') };
  t.equal((await TextTokenizer.open(paths)).bosTokenId, 1);
  t.equal((await TextTokenizer.open({ ...paths, config: null })).bosTokenId, 1);
  await t.rejects(TextTokenizer.open({ tokenizer: null, config: null }), { code: 'E_TOKENIZER', hint: /--tokens/ });
  const broken = join(good, 'broken.json');
  for (const content of ['', '{', 'null', '[]', '{}', '{"model":{"type":"Magic"}}', '{"model":null}']) {
    writeFileSync(broken, content);
    await t.rejects(TextTokenizer.open({ ...paths, tokenizer: broken }), { code: 'E_TOKENIZER' }, content);
  }
  const files = byteLevelTokenizer();
  const wordLevel = { type: 'WordLevel', vocab: { a: 0 } };
  const words = new TextTokenizer({ ...files.tokenizer, added_tokens: [], post_processor: null, model: wordLevel }, {});
  t.throws(() => words.encode('b'), { code: 'E_TEXT' });
});

t.test('text files: UTF-8 or an error that says where', async (t) => {
  const directory = t.testdir({ empty: '', sub: {} });
  const file = join(directory, 'text');
  // A character across the border of two pieces that are read.
  const text = `${'x'.repeat(64 * 1024 - 1)}é${'y'.repeat(70_000)}🙂\ufeff`;
  writeFileSync(file, text);
  t.equal(await readTextFile(file), text);
  t.equal(await readTextFile(join(directory, 'empty')), '');
  writeFileSync(file, Buffer.concat([Buffer.alloc(70_000, 'a'), Buffer.of(0xff)]));
  await t.rejects(readTextFile(file), { code: 'E_TEXT', message: /between byte 65536 and 70001/ });
  writeFileSync(file, Buffer.of(0x61, 0xe2, 0x82));
  await t.rejects(readTextFile(file), { code: 'E_TEXT', message: /at its end/ });
  await t.rejects(readTextFile(join(directory, 'none')), { code: 'E_FILE' });
  await t.rejects(readTextFile(join(directory, 'sub')), { code: 'E_FILE' });
});
