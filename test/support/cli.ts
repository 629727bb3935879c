import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { join } from 'node:path';
import { REPOSITORY } from './shared.js';

const PROGRAM = join(REPOSITORY, 'bin', 'powerinfer2.js');

/**
 * Compiles the program, so that what is spawned is what stands in `src/`. Writes only what has changed: another test may be
 * running the program meanwhile.
 */
export function buildProgram(): void {
  const compiler = join(REPOSITORY, 'node_modules', 'typescript', 'bin', 'tsc');
  execFileSync(process.execPath, [compiler, '-p', join(REPOSITORY, 'tsconfig.build.json')]);
}

/** What a finished command left. */
export interface Finished {
  status: number | null;
  stdout: string;
  stderr: string;
}

/** Starts the command line as a process of its own, without a terminal. */
export function startCli(args: readonly string[]): ChildProcess {
  return spawn(process.execPath, [PROGRAM, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
}

/** Waits for a process and collects what it wrote. */
export async function finish(child: ChildProcess): Promise<Finished> {
  const stdout: Buffer[] = [];
  const stderr: Buffer[] = [];
  child.stdout?.on('data', (piece) => stdout.push(piece));
  child.stderr?.on('data', (piece) => stderr.push(piece));
  const status = await new Promise<number | null>((resolve) => child.on('close', resolve));
  return { status, stdout: Buffer.concat(stdout).toString('utf8'), stderr: Buffer.concat(stderr).toString('utf8') };
}

/** Runs the command line to its end. */
export function runCli(...args: string[]): Promise<Finished> {
  return finish(startCli(args));
}

/** The objects of a `--json` output, one a line. */
// biome-ignore lint/suspicious/noExplicitAny: tests look into what they expect.
export function jsonLines(stdout: string): any[] {
  return stdout
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line));
}
