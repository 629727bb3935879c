import { join } from 'node:path';
import { convert } from '../../converter/convert.js';
import type { QuantizationName } from '../../src/format/manifest.js';
import { type CheckpointOptions, makeCheckpoint } from './make-checkpoint.js';
import { byteLevelTokenizer, writeTokenizer } from './tokenizers.js';

/** Tokens of the tokenizer that `makeModel` gives its models. */
export const MODEL_VOCABULARY = 263;

/**
 * Makes a checkpoint with random weights and a byte-level tokenizer in `directory`, and converts it there, with `npu` (q4) for
 * a dense unit too. Resolves with the path of the model directory.
 */
export async function makeModel(
  directory: string,
  options: CheckpointOptions,
  quantization: QuantizationName = 'f16',
  npu = false,
): Promise<string> {
  const tokenizerFrom = writeTokenizer(join(directory, 'tokenizer'), byteLevelTokenizer());
  const name = `${options.family}-${quantization}`;
  const checkpoint = makeCheckpoint(join(directory, name), { vocab: MODEL_VOCABULARY, tokenizerFrom, ...options });
  const output = join(directory, `${name}.pi2`);
  const request = { checkpoint, output, quantization, maxMemoryBytes: 2 ** 31, force: true, npu };
  await convert(request, () => {}, new AbortController().signal);
  return output;
}
