import { existsSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The repository's directory: the nearest one above this file that has a package.json. */
export const REPOSITORY = findRepository();

const SHARED_MODELS = resolve(REPOSITORY, '../shared/models');

export type SharedModel = 'stories-drelu' | 'stories-moe-drelu' | 'stories-silu';
export const SHARED_MODEL_NAMES: readonly SharedModel[] = ['stories-drelu', 'stories-moe-drelu', 'stories-silu'];

/** A trained checkpoint beside the repository, or null when this machine has none. */
export function sharedModel(name: SharedModel | 'text'): string | null {
  const directory = join(SHARED_MODELS, name);
  return existsSync(directory) ? directory : null;
}

/** tap options that skip a test, with the reason, when a shared model is absent. */
export function needsShared(name: SharedModel | 'text'): { skip: string | false } {
  return { skip: sharedModel(name) ? false : `${join(SHARED_MODELS, name)} is not on this machine` };
}

function findRepository(): string {
  let directory = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(directory, 'package.json'))) {
    const above = dirname(directory);
    if (above === directory) throw new Error('no package.json above the tests');
    directory = above;
  }
  return directory;
}
