/** The part of the contract with the addon (contract.ts) that drives a neuron cache without a model. */

/**
 * Which neurons tokens needed, as steps record it: `fired` and `routed` of `StepRequest`, token behind token. To replay it: of
 * each bank how many neurons are hot and how many cold slots it has, and `firingRates` as of `StreamRequest`.
 */
export interface ReplayRequest {
  tokens: number;
  layerCount: number;
  expertCount: number;
  neuronCount: number;
  fired: Uint8Array;
  routed: Uint8Array;
  hotNeurons: number[];
  coldSlots: number[];
  firingRates?: Float32Array;
  /** Tokens before this one fill the cache and are not counted. */
  countFrom: number;
}

/** Needed neurons by where the cache had them. */
export interface ReplayCounters {
  hotHits: number;
  coldHits: number;
  misses: number;
}
