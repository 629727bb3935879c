import { readFileSync, statSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

/** Which powerinfer2 this is. */
export interface Build {
  version: string;
  /** Commit of the checkout that the package is, `unknown` for an installed package. */
  commit: string;
}

/** Reads version and commit from the package that this file belongs to. */
export function readBuild(): Build {
  const root = packageRoot();
  const { version } = JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8')) as { version: string };
  return { version, commit: readCommit(root) };
}

function packageRoot(): string {
  let folder = path.dirname(fileURLToPath(import.meta.url));
  for (;;) {
    const text = readText(path.join(folder, 'package.json'));
    if (text !== undefined && (JSON.parse(text) as { name?: string }).name === 'powerinfer2') return folder;
    const parent = path.dirname(folder);
    if (parent === folder) throw new Error('package.json of powerinfer2 not found');
    folder = parent;
  }
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
