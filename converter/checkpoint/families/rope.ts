import { type Hyperparameters, LIMITS } from '../../../src/format/hyperparameters.js';
import type { Config } from '../config.js';

export type RopePosition = Extract<Hyperparameters['position'], { kind: 'rope' }>;

const SUPPORTED = 'default, linear, llama3';

/**
 * The rotary embedding of a model. Older checkpoints have `rope_theta` and `rope_scaling`, newer ones all of it in
 * `rope_parameters`; a file with both must say the same in both. `fallback` is the family's default theta.
 */
export function readRope(config: Config, fallback: number): RopePosition {
  const older = config.object('rope_scaling');
  const newer = config.object('rope_parameters');
  const scaling = older ? readScaling(older) : newer ? readScaling(newer) : null;
  if (older && newer && JSON.stringify(scaling) !== JSON.stringify(readScaling(newer))) {
    throw config.wrong('rope_parameters', 'the same as in rope_scaling');
  }
  let theta: number | undefined;
  for (const place of [newer, older, config]) {
    if (!place?.has('rope_theta')) continue;
    const found = place.positive('rope_theta');
    if (theta !== undefined && theta !== found) throw place.wrong('rope_theta', `${theta}, as elsewhere in the file`);
    theta = found;
  }
  return { kind: 'rope', theta: theta ?? fallback, scaling };
}

function readScaling(rope: Config): RopePosition['scaling'] {
  const perLayerType = rope.keys().find((key) => /_attention$/.test(key));
  if (perLayerType) throw rope.unsupported(perLayerType, 'one rotary embedding for all layers');
  if (rope.has('partial_rotary_factor') && rope.raw('partial_rotary_factor') !== 1) {
    throw rope.unsupported('partial_rotary_factor', '1, rotation of whole heads');
  }
  const key = rope.has('rope_type') || !rope.has('type') ? 'rope_type' : 'type';
  switch (rope.text(key, rope.has('factor') ? undefined : 'default')) {
    case 'default':
      return null;
    case 'linear':
      return { kind: 'linear', factor: rope.positive('factor') };
    case 'llama3': {
      const low = rope.positive('low_freq_factor');
      const high = rope.positive('high_freq_factor');
      if (high <= low) throw rope.wrong('high_freq_factor', `a number above low_freq_factor ${low}`);
      return {
        kind: 'llama3',
        factor: rope.positive('factor'),
        low_freq_factor: low,
        high_freq_factor: high,
        original_context_length: rope.size('original_max_position_embeddings', LIMITS.context),
      };
    }
    default:
      throw rope.unsupported(key, SUPPORTED);
  }
}
