import { LIMITS } from '../../../src/format/hyperparameters.js';
import type { Config } from '../config.js';

/**
 * How a family says which layers have a sliding window:
 * - `none`: it has no windows, whatever other keys stand in the file;
 * - `all`: `sliding_window` holds for every layer, `absent` is the window when the key is not there (null: none);
 * - `upper`: only with `use_sliding_window`; `layer_types` if given, else the layers from `max_window_layers` on (qwen).
 */
export type WindowRule = { kind: 'none' } | { kind: 'all'; absent: number | null } | { kind: 'upper' };

const LAYER_TYPES = ['full_attention', 'sliding_attention'];

/** For each layer how many positions back a token sees, itself included; 0 is all of them. */
export function readWindows(config: Config, rule: WindowRule, layerCount: number): number[] {
  const layerTypes = readLayerTypes(config, layerCount);
  const window = readWindow(config, rule);
  if (rule.kind === 'upper') {
    const first = config.raw('max_window_layers') === 0 ? 0 : config.size('max_window_layers', LIMITS.layers, 28);
    return Array.from({ length: layerCount }, (_, layer) => {
      const slides = layerTypes ? layerTypes[layer] === 'sliding_attention' : window > 0 && layer >= first;
      if (slides && window === 0) {
        throw config.wrong('layer_types', 'full_attention in every layer, as no sliding window is in use');
      }
      return slides ? window : 0;
    });
  }
  // Families of this kind do not look at layer_types; where it contradicts them, nobody can tell what was trained.
  const type = window > 0 ? 'sliding_attention' : 'full_attention';
  if (layerTypes?.some((given) => given !== type)) {
    throw config.unsupported('layer_types', `${type} in every layer`);
  }
  return new Array(layerCount).fill(window);
}

function readWindow(config: Config, rule: WindowRule): number {
  if (rule.kind === 'none') return 0;
  if (rule.kind === 'upper' && !config.boolean('use_sliding_window', false)) return 0;
  if (config.raw('sliding_window') === null) return 0;
  const absent = rule.kind === 'upper' ? 4096 : rule.absent;
  if (absent === null && !config.has('sliding_window')) return 0;
  return config.size('sliding_window', LIMITS.context, absent ?? undefined);
}

function readLayerTypes(config: Config, layerCount: number): string[] | null {
  if (!config.has('layer_types')) return null;
  const types = config.raw('layer_types');
  if (!Array.isArray(types) || types.length !== layerCount || types.some((type) => typeof type !== 'string')) {
    throw config.wrong('layer_types', `a list of ${layerCount} texts, one for each layer`);
  }
  if (types.some((type) => !LAYER_TYPES.includes(type)))
    throw config.unsupported('layer_types', LAYER_TYPES.join(', '));
  return types;
}
