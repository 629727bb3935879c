import { existsSync, readFileSync, statSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { PROGRAM_VERSION } from '../base/version.js';

/** Which powerinfer2 this is. */
export interface Build {
  version: string;
  /** Commit of the checkout that the package is, `unknown` for an installed package. */
  commit: string;
}

/** Version and commit of the package that this file belongs to. */
export function readBuild(): Build {
  return { version: PROGRAM_VERSION, commit: readCommit(packageRoot()) };
}

function packageRoot(): string {
  let folder = path.dirname(fileURLToPath(import.meta.url));
  while (!existsSync(path.join(folder, 'package.json'))) folder = path.dirname(folder);
  return folder;
}

/** The commit that `.git` beside the package says is checked out, read as files: git itself need not be installed. */
function readCommit(root: string): string {
  const git = gitFolder(root);
  const head = readText(path.join(git, 'HEAD'))?.trim();
  if (head === undefined) return 'unknown';
  if (!head.startsWith('ref: ')) return isCommit(head) ? head : 'unknown';
  const ref = head.slice('ref: '.length);
  // A worktree has its own HEAD; branches are in the repository it belongs to.
  const common = path.resolve(git, readText(path.join(git, 'commondir'))?.trim() ?? '.');
  const loose = readText(path.join(common, ref))?.trim();
  const packed = readText(path.join(common, 'packed-refs'))
    ?.split('\n')
    .find((line) => line.endsWith(` ${ref}`));
  const commit = loose ?? packed?.split(' ')[0] ?? '';
  return isCommit(commit) ? commit : 'unknown';
}

function gitFolder(root: string): string {
  const git = path.join(root, '.git');
  if (!statSync(git, { throwIfNoEntry: false })?.isFile()) return git;
  const target = readText(git)?.match(/^gitdir: (.*)$/m)?.[1];
  return target === undefined ? git : path.resolve(root, target);
}

function isCommit(text: string): boolean {
  return /^[0-9a-f]{40,64}$/.test(text);
}

function readText(file: string): string | undefined {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return undefined;
  }
}
