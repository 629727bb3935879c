import { fileError, Pi2Error } from '../base/error.js';

/** Whoever read stdout has gone (`| head`): not an error, only the end. */
export class OutputClosed extends Error {}

/** Ends a command with an exit status when everything there was to say has been said. */
export class ExitWith extends Error {
  readonly status: number;

  constructor(status: number) {
    super(`exit status ${status}`);
    this.status = status;
  }
}

/** Writes to stdout and waits until it is taken. Throws `OutputClosed` when nobody reads any more. */
export function writeOut(text: string): Promise<void> {
  return new Promise((resolve, reject) => {
    process.stdout.write(text, (error) => {
      if (!error) resolve();
      else if ((error as NodeJS.ErrnoException).code === 'EPIPE') reject(new OutputClosed());
      else reject(fileError(error, 'write', 'standard output'));
    });
  });
}

/** One JSON object on a line of its own. */
export function writeJson(object: object): Promise<void> {
  return writeOut(`${JSON.stringify(object)}\n`);
}

/** A line of the log: stderr, so that stdout is the result alone. */
export function log(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** How often progress is shown where lines cannot be rewritten. */
const PLAIN_PROGRESS_MS = 5000;
const TERMINAL_PROGRESS_MS = 100;

/** A line on stderr that says how far a command is: rewritten in place on a terminal, now and then a new one elsewhere. */
export class Progress {
  readonly #terminal = process.stderr.isTTY === true;
  #shownAt = performance.now();
  #shown = false;

  show(line: string): void {
    const now = performance.now();
    if (now - this.#shownAt < (this.#terminal ? TERMINAL_PROGRESS_MS : PLAIN_PROGRESS_MS)) return;
    this.#shownAt = now;
    this.#shown = true;
    process.stderr.write(this.#terminal ? `\r\x1b[K${line}` : `${line}\n`);
  }

  /** Clears the line, so that what follows begins on a clean one. */
  end(): void {
    if (this.#shown && this.#terminal) process.stderr.write('\r\x1b[K');
    this.#shown = false;
  }
}

/**
 * Runs `work` with a signal that the first Ctrl-C or SIGTERM aborts; a second one ends the process as if nobody listened.
 */
export async function withInterrupt<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const abort = () => {
    stopListening();
    controller.abort();
  };
  const stopListening = () => {
    process.removeListener('SIGINT', abort);
    process.removeListener('SIGTERM', abort);
  };
  process.on('SIGINT', abort);
  process.on('SIGTERM', abort);
  try {
    return await work(controller.signal);
  } finally {
    stopListening();
  }
}

/** Ends a command that has no half result worth keeping. */
export function throwIfInterrupted(signal: AbortSignal): void {
  if (signal.aborted) throw new Pi2Error('E_INTERRUPTED', 'interrupted');
}
