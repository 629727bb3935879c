import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { Pi2Error } from '../base/error.js';
import type { NativeAddon } from './contract.js';

const ADDON = path.join('build', 'Release', 'pi2.node');

let loaded: NativeAddon | undefined;

/**
 * The native addon, loaded once. It is looked for in the package that this file belongs to, whether it runs from `src/` or
 * from `dist/`. Throws `Pi2Error` E_ADDON when it is not built or cannot be loaded here.
 */
export function loadAddon(): NativeAddon {
  if (loaded) return loaded;
  const file = findUpward(ADDON);
  if (!file) {
    throw new Pi2Error(
      'E_ADDON',
      `the native addon ${ADDON} is not built`,
      'run npm run build in the powerinfer2 folder',
    );
  }
  try {
    loaded = createRequire(import.meta.url)(file) as NativeAddon;
    return loaded;
  } catch (error) {
    throw new Pi2Error(
      'E_ADDON',
      `cannot load ${file}: ${(error as Error).message}`,
      'it was built for another machine or Node: run npm run build again',
      { cause: error },
    );
  }
}

/** The nearest `name` in the folder of this file or in one above it. */
function findUpward(name: string): string | undefined {
  let folder = path.dirname(fileURLToPath(import.meta.url));
  for (;;) {
    const candidate = path.join(folder, name);
    if (existsSync(candidate)) return candidate;
    const parent = path.dirname(folder);
    if (parent === folder) return undefined;
    folder = parent;
  }
}
