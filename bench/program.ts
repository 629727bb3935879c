import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type Command, CommanderError, InvalidArgumentError, Option } from 'commander';
import { EXIT, fileError, Pi2Error } from '../src/base/error.js';
import { RESULTS } from './models.js';

/** Runs a benchmark program with the arguments of this process; what goes wrong is said and becomes the exit status. */
export async function runProgram(program: Command): Promise<void> {
  try {
    await program.helpOption('-h, --help', 'print this help').exitOverride().parseAsync();
  } catch (error) {
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 ? EXIT.ok : EXIT.usage;
    } else if (error instanceof Pi2Error) {
      log(`error: ${error.message}${error.hint ? `\n  ${error.hint}` : ''}`);
      process.exitCode = error.exitStatus;
    } else {
      throw error;
    }
  }
}

/** `--save`, with a name that is no path: a result is a folder beside the others. */
export function saveOption(): Option {
  return new Option('--save <name>', 'keep the raw result as bench/results/NAME/raw.jsonl').argParser(
    (text: string) => {
      if (!/^[\w][\w.-]*$/.test(text)) throw new InvalidArgumentError('Expected letters, digits, dots and dashes.');
      return text;
    },
  );
}

/** Keeps the raw rows of a result. Throws `Pi2Error` when they cannot be written. */
export async function saveResult(name: string, text: string): Promise<void> {
  const directory = join(RESULTS, name);
  try {
    await mkdir(directory, { recursive: true });
    await writeFile(join(directory, 'raw.jsonl'), text);
  } catch (error) {
    throw fileError(error, 'save the result in', directory);
  }
}

/** Progress goes to stderr: stdout has the result. */
export function log(line: string): void {
  process.stderr.write(`${line}\n`);
}
