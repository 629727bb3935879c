import { Command } from 'commander';
import { Pi2Error } from '../base/error.js';
import { chooseContext } from '../engine/engine.js';
import { cutWindows, measurePerplexity } from '../engine/evaluate.js';
import { requireTokens } from '../engine/generate.js';
import { openModelDirectory } from '../format/model-directory.js';
import { readTextFile } from '../text/text-file.js';
import { TextTokenizer } from '../text/tokenizer.js';
import { openEngine } from './open-engine.js';
import {
  addEngineChoice,
  addEngineOptions,
  addExactOption,
  addModelOption,
  addUnitOptions,
  type EngineFlags,
  engineOptions,
} from './options.js';
import { log, Progress, throwIfInterrupted, withInterrupt, writeJson, writeOut } from './output.js';

interface PerplexityFlags extends EngineFlags {
  model: string;
  file: string;
  json?: boolean;
}

/** llama.cpp's default; a model with a shorter context takes its own. */
const CONTEXT_DEFAULT = 512;
/** A window must have something to predict from and something to predict. */
const CONTEXT_LEAST = 2;

/** `perplexity`: how well a model predicts a text. */
export function perplexityCommand(): Command {
  const command = new Command('perplexity').description('measure how well a model predicts a text');
  addModelOption(command).requiredOption('-f, --file <file>', 'a UTF-8 text file');
  addEngineOptions(command, `tokens in a window; 0 is ${CONTEXT_DEFAULT} or the model’s own if that is shorter`);
  addExactOption(command);
  addUnitOptions(addEngineChoice(command));
  command.option('--json', 'the result as one JSON object on stdout').addHelpText(
    'after',
    `
The text is tokenized once. Windows of CTX - 1 tokens follow one another without overlap, each behind
the BOS token; every token of every window is predicted, the last, shorter window included. Tokenizers
that put no BOS before a text have windows of CTX tokens whose first is not predicted.

Examples:
  powerinfer2 perplexity -m bamboo.pi2 -f text.txt
  powerinfer2 perplexity -m bamboo.pi2 -f text.txt -c 256 --json`,
  );
  return command.action(perplexity);
}

async function perplexity(flags: PerplexityFlags): Promise<void> {
  const text = await readTextFile(flags.file);
  const model = await openModelDirectory(flags.model);
  const { context_length, vocab_size } = model.manifest.hyperparameters;
  const contextLength = chooseContext(model, flags.ctxSize || Math.min(CONTEXT_DEFAULT, context_length));
  if (contextLength < CONTEXT_LEAST) {
    throw new Pi2Error(
      'E_USAGE',
      `a context of ${contextLength} has nothing to predict`,
      `give -c ${CONTEXT_LEAST} or more`,
    );
  }
  const tokenizer = await TextTokenizer.open(model.tokenizerPaths);
  const tokens = tokenizer.encodePlain(text);
  const bos = tokenizer.bosTokenId;
  if (tokens.length < (bos === null ? 2 : 1)) {
    throw new Pi2Error('E_TEXT', `${flags.file} is too short: there is nothing to predict`, 'give a longer text');
  }
  requireTokens(tokens, vocab_size);
  const windowTokens = contextLength - (bos === null ? 0 : 1);
  const windowCount = Math.ceil(tokens.length / windowTokens);
  const firsts = bos === null ? 'the tokenizer has no BOS: the first token of each is not predicted' : `BOS is ${bos}`;
  log(`${tokens.length} tokens, ${windowCount} windows of ${windowTokens}; ${firsts}`);
  const result = await withInterrupt(async (signal) => {
    const engine = await openEngine(model, { ...engineOptions(flags), context: contextLength });
    const progress = new Progress();
    try {
      return await measurePerplexity(engine, cutWindows(tokens, contextLength, bos), (soFar) => {
        throwIfInterrupted(signal);
        progress.show(`${soFar.tokens} of ${tokens.length} tokens, ppl ${soFar.ppl.toFixed(4)}`);
      });
    } finally {
      progress.end();
      await engine.close();
    }
  });
  if (flags.json) {
    const facts = {
      windows: windowCount,
      context_length: contextLength,
      bos_token_id: bos,
      text_tokens: tokens.length,
    };
    await writeJson({ type: 'perplexity', ...result, ...facts });
  } else {
    const { ppl, nll_per_token } = result;
    await writeOut(`ppl ${ppl.toFixed(4)}, nll per token ${nll_per_token.toFixed(6)}, ${result.tokens} tokens\n`);
  }
}
