import type { StepRequest } from '../../src/engine/contract.js';

/** What a step over tokens of sequence 0 is asked with. */
export function oneRun(tokens: Int32Array, position: number): Pick<StepRequest, 'tokens' | 'runs'> {
  return { tokens, runs: [{ sequence: 0, position, count: tokens.length }] };
}
