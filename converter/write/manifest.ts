import { crc32 } from 'node:zlib';
import { PROGRAM_VERSION } from '../../src/base/version.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import {
  type Extent,
  FORMAT_VERSION,
  type Manifest,
  manifestSchema,
  type NpuEntry,
} from '../../src/format/manifest.js';
import { type Heat, orderBytes } from '../activation/heat.js';
import type { MadePredictor } from '../predictor/predictor.js';
import type { Recipe } from '../quantize/recipe.js';
import type { Plan } from '../steps/extents.js';
import type { Progress } from './journal.js';

/** Who makes models, as manifests and journals name it. */
export const CONVERTER = `powerinfer2 ${PROGRAM_VERSION}`;

/** Builds `model.json` of a finished conversion; checked by the schema that readers use. */
export function makeManifest(parts: {
  name: string;
  hyperparameters: Hyperparameters;
  recipe: Recipe;
  plan: Plan;
  progress: Progress;
  sources: Manifest['provenance']['sources'];
  heat: Heat | null;
  predictor: MadePredictor | null;
  npu: NpuEntry | null;
}): Manifest {
  const { plan, progress, heat, predictor } = parts;
  const extents: Extent[] = [];
  const tensors: Manifest['tensors'] = [];
  for (const { name, file, offset, bytes } of [...plan.resident, ...plan.neurons, ...plan.npu]) {
    extents.push({ name, file, offset, bytes, crc32: progress.pieces.get(name)?.crc32 ?? '' });
  }
  for (const neurons of plan.neurons) {
    const checksums = extents.find((extent) => extent.name === neurons.checksums.name) as Extent;
    checksums.crc32 = progress.pieces.get(neurons.name)?.checksums_crc32 ?? '';
  }
  for (const extent of plan.resident) {
    if (extent.kind !== 'tensors') tensors.push(extent.tensor);
    else for (const { source: _, firstSourceRow: __, order: ___, ...tensor } of extent.tensors) tensors.push(tensor);
    if (extent.kind !== 'heat_order') continue;
    const entry = extents.find(({ name }) => name === extent.name) as Extent;
    entry.crc32 = crc32(orderBytes(extent)).toString(16).padStart(8, '0');
  }
  return manifestSchema.parse({
    format: { name: 'pi2', version: FORMAT_VERSION },
    name: parts.name,
    hyperparameters: parts.hyperparameters,
    quantization: parts.recipe,
    layout: plan.layout,
    heat_order: heat
      ? { tokens: heat.profile.batches[0], profile_bytes: heat.bytes.length, profile_sha256: heat.sha256 }
      : 'identity',
    ...(predictor ? { predictor: predictor.entry } : {}),
    ...(parts.npu ? { npu: parts.npu } : {}),
    extents: [...extents, ...(predictor?.extents ?? [])],
    tensors: [...tensors, ...(predictor?.tensors ?? [])],
    provenance: {
      converter: CONVERTER,
      sources: parts.sources,
      ...(heat ? { calibration: heat.profile.texts } : {}),
    },
  });
}
