/**
 * Exit statuses of every command, documented in README.md. Frozen: scripts depend on them.
 */
export const EXIT = {
  ok: 0,
  /** A check that was asked for failed (`verify` found a wrong extent), or an unforeseen error. */
  failed: 1,
  /** The command line is wrong: unknown flag, bad value, empty prompt, prompt longer than the context. */
  usage: 2,
  /** The checkpoint or text given as input cannot be used. */
  badInput: 3,
  /** The model directory is damaged, incomplete or of a newer format. */
  badModel: 4,
  /** The machine refused: disk full, read error, too little memory, missing file or permission. */
  machine: 5,
  /** Ended by Ctrl-C or SIGTERM, after a clean stop. */
  interrupted: 130,
} as const;

export type ExitName = keyof typeof EXIT;

/** Stable error codes: the part of an error that scripts and tests may rely on, and the exit status it ends with. */
export const ERROR_CODES = {
  // command line
  E_USAGE: 'usage',
  E_EMPTY_PROMPT: 'usage',
  E_CONTEXT_FULL: 'usage',
  // checkpoints
  E_CHECKPOINT: 'badInput',
  E_CONFIG: 'badInput',
  E_UNSUPPORTED: 'badInput',
  E_SAFETENSORS: 'badInput',
  E_TENSOR: 'badInput',
  E_NOT_FINITE: 'badInput',
  E_PICKLE: 'badInput',
  E_TOKENIZER: 'badInput',
  E_TEXT: 'badInput',
  E_PROFILE: 'badInput',
  E_CHANGED: 'badInput',
  // model directories
  E_MODEL: 'badModel',
  E_MODEL_VERSION: 'badModel',
  E_CHECKSUM: 'badModel',
  // machine
  E_FILE: 'machine',
  E_EXISTS: 'usage',
  E_DISK_FULL: 'machine',
  E_IO: 'machine',
  E_MEMORY: 'machine',
  E_CPU: 'machine',
  E_ADDON: 'machine',
  E_NPU: 'machine',
  E_INTERRUPTED: 'interrupted',
} as const satisfies Record<string, ExitName>;

export type ErrorCode = keyof typeof ERROR_CODES;

/**
 * An error for a person: `message` says what is wrong and where, `hint` what to do about it.
 * The command line prints both on stderr and exits with the status of `code`; a stack only under `--verbose`.
 */
export class Pi2Error extends Error {
  readonly code: ErrorCode;
  readonly hint: string | undefined;

  constructor(code: ErrorCode, message: string, hint?: string, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'Pi2Error';
    this.code = code;
    this.hint = hint;
  }

  /** The exit status of a command that ends with this error. */
  get exitStatus(): number {
    return EXIT[ERROR_CODES[this.code]];
  }
}

/**
 * Turns an error of a file operation on `path` into a `Pi2Error` that names the file and says what to do.
 * A `Pi2Error` passes unchanged.
 */
export function fileError(error: unknown, doing: string, path: string): Pi2Error {
  if (error instanceof Pi2Error) return error;
  const code = (error as NodeJS.ErrnoException)?.code;
  const options = { cause: error };
  switch (code) {
    case 'ENOENT':
      return new Pi2Error('E_FILE', `cannot ${doing} ${path}: no such file or directory`, 'check the path', options);
    case 'EACCES':
    case 'EPERM':
      return new Pi2Error('E_FILE', `cannot ${doing} ${path}: permission denied`, 'check its permissions', options);
    case 'EISDIR':
      return new Pi2Error('E_FILE', `cannot ${doing} ${path}: it is a directory`, 'give a file', options);
    case 'ENOTDIR':
      return new Pi2Error('E_FILE', `cannot ${doing} ${path}: not a directory`, 'give a directory', options);
    case 'ENOSPC':
    case 'EDQUOT':
    case 'EFBIG':
      return new Pi2Error(
        'E_DISK_FULL',
        `cannot ${doing} ${path}: no space left`,
        'free some space and run the same command again',
        options,
      );
    default:
      return new Pi2Error('E_IO', `cannot ${doing} ${path}: ${(error as Error)?.message ?? error}`, undefined, options);
  }
}

/** The name in `known` nearest to `given` by edit distance, if any is near enough to be a slip of the hand. */
export function nearestName(given: string, known: readonly string[]): string | undefined {
  let best: string | undefined;
  let bestDistance = Math.max(2, Math.floor(given.length / 3)) + 1;
  for (const name of known) {
    const distance = editDistance(given.toLowerCase(), name.toLowerCase());
    if (distance < bestDistance) {
      bestDistance = distance;
      best = name;
    }
  }
  return best;
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length];
}
