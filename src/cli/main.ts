import { Command, CommanderError } from 'commander';
import { EXIT, Pi2Error } from '../base/error.js';
import { readBuild } from '../report/build.js';
import { benchCommand } from './bench.js';
import { convertCommand } from './convert.js';
import { evalCommand } from './eval.js';
import { inspectCommand } from './inspect.js';
import { ExitWith, OutputClosed } from './output.js';
import { perplexityCommand } from './perplexity.js';
import { profileCommand } from './profile.js';
import { runCommand } from './run.js';
import { verifyCommand } from './verify.js';

const EXIT_HELP = `
Exit status:
  ${EXIT.ok}    all is well
  ${EXIT.failed}    a check failed (verify), or an unforeseen error
  ${EXIT.usage}    the command line is wrong, the prompt is empty or too long
  ${EXIT.badInput}    the checkpoint, tokenizer or text cannot be used
  ${EXIT.badModel}    the model directory is damaged, incomplete or of a newer format
  ${EXIT.machine}    the machine refused: no such file, disk full, too little memory
  ${EXIT.interrupted}  ended by Ctrl-C or SIGTERM, cleanly`;

const EXAMPLES = `
Examples:
  powerinfer2 convert ~/Bamboo-base-v0_1 -o bamboo.pi2 --quant q4
  powerinfer2 run -m bamboo.pi2 -p "Once upon a time" -n 128
  powerinfer2 perplexity -m bamboo.pi2 -f text.txt -c 512
  powerinfer2 verify bamboo.pi2`;

/**
 * The command line. `argv` is `process.argv`; resolves with the exit status, never rejects. Results go to stdout, everything
 * else to stderr; an error is one line and a hint, its stack only with `--verbose`.
 */
export async function main(argv: readonly string[]): Promise<number> {
  // A reader that has gone is found out by the write that fails, not by an event; that of help comes when all is over.
  process.stdout.on('error', ignore);
  process.stderr.on('error', ignore);
  let verbose = false;
  const program = buildProgram().hook('preAction', (_, command) => {
    verbose = command.opts().verbose === true;
  });
  try {
    await program.parseAsync(llamaSpelling(argv));
    return EXIT.ok;
  } catch (error) {
    return reportError(error, verbose);
  }
}

function ignore(): void {}

/** Options of llama.cpp's programs with one dash and several letters: short options of this program have one letter. */
const LLAMA_SPELLING: Record<string, Record<string, string>> = {
  bench: { '-pg': '--pg', '-npl': '--npl' },
  run: { '-np': '--n-parallel' },
};

/** `bench -pg 512,128` as llama-bench has it. */
function llamaSpelling(argv: readonly string[]): string[] {
  return argv.map((word) => LLAMA_SPELLING[argv[2]]?.[word] ?? word);
}

function buildProgram(): Command {
  const { version, commit } = readBuild();
  const program = new Command('powerinfer2')
    .description('Language models larger than a phone’s memory, run from its flash.')
    .version(commit === 'unknown' ? version : `${version} (${commit.slice(0, 12)})`, '--version', 'print the version')
    .helpOption('-h, --help', 'print this help')
    .helpCommand('help [command]', 'print the help of a command')
    .addHelpText('after', `${EXAMPLES}\n${EXIT_HELP}`);
  const commands = [
    convertCommand(),
    runCommand(),
    evalCommand(),
    perplexityCommand(),
    profileCommand(),
    benchCommand(),
    inspectCommand(),
    verifyCommand(),
  ];
  for (const command of commands) {
    command
      .option('--verbose', 'print the stack of an error')
      .helpOption('-h, --help', 'print this help')
      .addHelpText('after', EXIT_HELP);
    program.addCommand(command);
  }
  for (const command of [program, ...commands]) {
    // Errors are printed by `reportError`, in one form for all.
    command.exitOverride().configureOutput({ outputError: ignore });
  }
  return program;
}

function reportError(error: unknown, verbose: boolean): number {
  if (error instanceof OutputClosed) return EXIT.ok;
  if (error instanceof ExitWith) return error.status;
  if (error instanceof CommanderError) return reportUsage(error);
  const known = error instanceof Pi2Error;
  const message = error instanceof Error ? error.message : String(error);
  printError(
    known ? message : `unforeseen: ${message}`,
    known ? error.hint : 'run it again with --verbose to see where',
  );
  if (verbose && error instanceof Error) process.stderr.write(`${stackWithCauses(error)}\n`);
  return known ? error.exitStatus : EXIT.failed;
}

/** Wrong command lines. Asking for help or for the version arrives here too, with exit code 0 and already answered. */
function reportUsage(error: CommanderError): number {
  if (error.exitCode === 0) return EXIT.ok;
  if (error.code !== 'commander.help') {
    const [message, suggestion] = error.message.replace(/^error: /, '').split('\n');
    const nearest = suggestion?.match(/^\(Did you mean (.*)\?\)$/)?.[1];
    printError(message, nearest ? `did you mean ${nearest}?` : 'powerinfer2 --help lists commands and options');
  }
  return EXIT.usage;
}

function printError(message: string, hint: string | undefined): void {
  process.stderr.write(`error: ${message}\n${hint === undefined ? '' : `hint: ${hint}\n`}`);
}

function stackWithCauses(error: Error): string {
  const cause = error.cause instanceof Error ? `\ncaused by: ${stackWithCauses(error.cause)}` : '';
  return `${error.stack ?? error.message}${cause}`;
}
