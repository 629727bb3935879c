import { open, rename, rm, stat } from 'node:fs/promises';
import { Command } from 'commander';
import { fileError, Pi2Error } from '../base/error.js';
import { chooseContext } from '../engine/engine.js';
import { evaluateSequence } from '../engine/evaluate.js';
import { requireTokens } from '../engine/generate.js';
import { openModelDirectory } from '../format/model-directory.js';
import { openEngine } from './open-engine.js';
import {
  addEngineChoice,
  addEngineOptions,
  addExactOption,
  addModelOption,
  addUnitOptions,
  type EngineFlags,
  engineOptions,
  parseTokens,
} from './options.js';
import { log, Progress, throwIfInterrupted, withInterrupt } from './output.js';

interface EvalFlags extends EngineFlags {
  model: string;
  tokens: number[];
  logits: string;
}

/** `eval`: the logits of every position. */
export function evalCommand(): Command {
  const command = new Command('eval').description('write the logits of every position of a token sequence');
  addModelOption(command)
    .requiredOption('--tokens <ids>', 'the tokens: 1,2,3', parseTokens)
    .requiredOption('--logits <file>', 'where to write: float32, little-endian, positions x vocabulary');
  addExactOption(addEngineOptions(command));
  addUnitOptions(addEngineChoice(command));
  command.addHelpText(
    'after',
    `
Examples:
  powerinfer2 eval -m bamboo.pi2 --tokens 1,420,439 --logits logits.f32`,
  );
  return command.action(evaluate);
}

async function evaluate(flags: EvalFlags): Promise<void> {
  const model = await openModelDirectory(flags.model);
  const { tokens } = flags;
  requireTokens(tokens, model.manifest.hyperparameters.vocab_size);
  const contextLength = chooseContext(model, flags.ctxSize);
  if (tokens.length > contextLength) {
    throw new Pi2Error(
      'E_CONTEXT_FULL',
      `${tokens.length} tokens do not fit the context of ${contextLength}`,
      'give fewer tokens, or a larger context with -c',
    );
  }
  await withInterrupt(async (signal) => {
    // No more of the cache is opened than the tokens need.
    const engine = await openEngine(model, { ...engineOptions(flags), context: tokens.length });
    const progress = new Progress();
    try {
      await writeWhole(flags.logits, async (write) => {
        await evaluateSequence(engine, tokens, async (rows, first) => {
          throwIfInterrupted(signal);
          await write(littleEndian(rows));
          progress.show(`position ${first} of ${tokens.length}`);
        });
      });
    } finally {
      progress.end();
      await engine.close();
    }
  });
  log(`${tokens.length} x ${model.manifest.hyperparameters.vocab_size} logits in ${flags.logits}`);
}

/** Writes a file under another name and renames it when it is whole: nothing half-written is ever called `file`. */
async function writeWhole(
  file: string,
  work: (write: (bytes: Uint8Array) => Promise<void>) => Promise<void>,
): Promise<void> {
  const partial = `${file}.${process.pid}.partial`;
  try {
    const existing = await stat(file).catch(() => null);
    if (existing && !existing.isFile())
      throw new Pi2Error('E_FILE', `${file} is there and is not a file`, 'give another name');
    const handle = await open(partial, 'wx');
    try {
      await work(async (bytes) => {
        await handle.writeFile(bytes);
      });
      await handle.sync();
    } catch (error) {
      await rm(partial, { force: true });
      throw error;
    } finally {
      await handle.close();
    }
    await rename(partial, file);
  } catch (error) {
    throw fileError(error, 'write', file);
  }
}

/** The bytes of float32 numbers; every machine this runs on is little-endian. */
function littleEndian(numbers: Float32Array): Uint8Array {
  return new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength);
}
