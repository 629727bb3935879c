import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import { type Extent, FORMAT_VERSION, type Manifest, manifestSchema } from '../../src/format/manifest.js';
import type { Recipe } from '../quantize/recipe.js';
import type { Plan } from '../steps/extents.js';
import type { Progress } from './journal.js';

/** Builds `model.json` of a finished conversion; checked by the schema that readers use. */
export function makeManifest(parts: {
  name: string;
  hyperparameters: Hyperparameters;
  recipe: Recipe;
  plan: Plan;
  progress: Progress;
  converter: string;
  sources: Manifest['provenance']['sources'];
}): Manifest {
  const { plan, progress } = parts;
  const extents: Extent[] = [];
  const tensors: Manifest['tensors'] = [];
  for (const { name, file, offset, bytes } of [...plan.resident, ...plan.neurons]) {
    extents.push({ name, file, offset, bytes, crc32: progress.pieces.get(name)?.crc32 ?? '' });
  }
  for (const neurons of plan.neurons) {
    const checksums = extents.find((extent) => extent.name === neurons.checksums.name) as Extent;
    checksums.crc32 = progress.pieces.get(neurons.name)?.checksums_crc32 ?? '';
  }
  for (const extent of plan.resident) {
    if (extent.kind === 'checksums') tensors.push(extent.tensor);
    else for (const { source: _, firstSourceRow: __, ...tensor } of extent.tensors) tensors.push(tensor);
  }
  return manifestSchema.parse({
    format: { name: 'pi2', version: FORMAT_VERSION },
    name: parts.name,
    hyperparameters: parts.hyperparameters,
    quantization: parts.recipe,
    layout: plan.layout,
    heat_order: 'identity',
    extents,
    tensors,
    provenance: { converter: parts.converter, sources: parts.sources },
  });
}
