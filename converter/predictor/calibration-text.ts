import { createHash } from 'node:crypto';
import type { ModelDirectory } from '../../src/format/model-directory.js';
import { TextTokenizer } from '../../src/text/tokenizer.js';

/** Tokens that thresholds are judged on: this share of the text, but not fewer, if there are twice as many, and not more. */
const HELD_OUT_SHARE = 0.1;
const HELD_OUT_TOKENS_LEAST = 8192;
const HELD_OUT_TOKENS_MOST = 16384;

/** The calibration text in two: what predictors learn from, and what they never see before they are judged. */
export interface CalibrationText {
  training: string;
  heldOut: string;
  heldOutSha256: string;
}

/** Cuts off the end of a text, at a line break if one is near. */
export async function holdOut(model: ModelDirectory, text: string): Promise<CalibrationText> {
  const tokenizer = await TextTokenizer.open(model.tokenizerPaths);
  const tokens = tokenizer.encodePlain(text).length;
  const wanted = Math.min(HELD_OUT_TOKENS_MOST, Math.max(HELD_OUT_TOKENS_LEAST, HELD_OUT_SHARE * tokens), tokens / 2);
  const at = Math.floor(text.length * (1 - wanted / Math.max(1, tokens)));
  const line = text.lastIndexOf('\n', at - 1) + 1;
  // A character of two halves is not cut.
  const whole = /[\uDC00-\uDFFF]/.test(text[at] ?? '') ? at + 1 : at;
  const cut = line > 0.9 * at ? line : whole;
  const heldOut = text.slice(cut);
  return {
    training: text.slice(0, cut),
    heldOut,
    heldOutSha256: createHash('sha256').update(heldOut, 'utf8').digest('hex'),
  };
}
