import type { Hyperparameters } from '../format/hyperparameters.js';

/**
 * Rotary frequencies of a model: `head_dim / 2` of them, radians a position, scaling applied; empty for learned positions.
 * Computed in double precision and rounded once.
 *
 * `frequency[i] = theta ^ (-2 i / head_dim)`. Linear scaling divides all by its factor. llama3 scaling leaves wavelengths
 * shorter than `original / high_freq_factor` alone, divides those longer than `original / low_freq_factor` by the factor and
 * blends between them.
 */
export function ropeFrequencies(h: Pick<Hyperparameters, 'head_dim' | 'position'>): Float32Array {
  const { position } = h;
  if (position.kind !== 'rope') return new Float32Array(0);
  return Float32Array.from({ length: h.head_dim / 2 }, (_, i) => {
    const frequency = position.theta ** ((-2 * i) / h.head_dim);
    const { scaling } = position;
    if (scaling === null) return frequency;
    if (scaling.kind === 'linear') return frequency / scaling.factor;
    const wavelength = (2 * Math.PI) / frequency;
    const original = scaling.original_context_length;
    if (wavelength < original / scaling.high_freq_factor) return frequency;
    if (wavelength > original / scaling.low_freq_factor) return frequency / scaling.factor;
    const smooth =
      (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
    return ((1 - smooth) * frequency) / scaling.factor + smooth * frequency;
  });
}
