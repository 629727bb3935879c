import type { ModelDirectory } from '../format/model-directory.js';
import { loadAddon } from './addon.js';
import type { NativeAddon } from './contract.js';
import { nativeError } from './engine.js';

/**
 * Bytes of a model's weights (`resident.bin`, `neurons.bin`, `predictor.bin`) that are in the kernel's page cache now; null
 * where the kernel does not tell. Throws `Pi2Error` E_IO when a file cannot be read.
 */
export async function modelPageCacheBytes(
  model: ModelDirectory,
  addon: Pick<NativeAddon, 'pageCacheBytes'> = loadAddon(),
): Promise<number | null> {
  const paths = [model.residentPath, model.neuronsPath];
  if (model.manifest.predictor) paths.push(model.predictorPath);
  let total = 0;
  for (const path of paths) {
    try {
      const bytes = await addon.pageCacheBytes(path);
      if (bytes === null) return null;
      total += bytes;
    } catch (error) {
      throw nativeError(error, 'look at the page cache');
    }
  }
  return total;
}
