/** Counters since open. Bytes are weight bytes the kernels read. */
export interface EngineCounters {
  tokens: number;
  weightBytesRead: number;
  kvBytesRead: number;
  /** Neurons that fired and neurons there were, over layers and tokens (routed experts only). */
  neuronsFired: number;
  neuronsSeen: number;
  /** Bytes held: weights, KV cache, scratch. Fixed at open. */
  weightBytes: number;
  kvBytes: number;
  scratchBytes: number;
  /** Of the dense unit. */
  unitBytes: number;
  /** Page faults of the whole process, since it began, that waited for a disk. */
  majorFaults: number;
  stream?: StreamCounters;
  predictor?: PredictorCounters;
  unit?: UnitCounters;
}

/** What the dense unit did since open; absent without one. A job is an expert of a layer and the tokens routed to it. */
export interface UnitCounters {
  /** Jobs that it took a part of; of them, those that another graph had to be made active for. */
  jobs: number;
  activations: number;
  /** Neurons it computed, over jobs and their tokens, padding left out; and bytes of their weights. */
  neurons: number;
  weightBytesRead: number;
  /** Time of these jobs; in them, the CPU's part, and waiting for the unit after it; the unit's own, 0 if it does not tell. */
  jobNs: number;
  cpuNs: number;
  waitNs: number;
  busyNs: number;
  /** E.g. `host`. */
  name: string;
}

/** What streaming cost since open; absent when all neurons are resident. */
export interface StreamCounters {
  hotHits: number;
  coldHits: number;
  misses: number;
  reads: number;
  /** Bytes of the neurons that were missing; bytes of the pages that were read for them. */
  askedBytes: number;
  readBytes: number;
  /** Of the asked bytes, those of neurons that fired. */
  usedBytes: number;
  /** Rows that were not read because their gate, read before them, did not fire. */
  sparedBytes: number;
  /** Time that computing threads waited for reads of gates and of rows, summed over threads. */
  gateStallNs: number;
  rowStallNs: number;
  /** Neurons whose reads began before attention, and those of them that were wanted. */
  prefetched: number;
  prefetchUsed: number;
  /** Whether gates are read before rows. */
  twoPhases: boolean;
  /** How bytes are really read, e.g. `direct, 4 threads`. */
  storage: string;
}

/** What prediction took and did since open; absent without a predictor. */
export interface PredictorCounters {
  /** Time spent on scores, summed over threads. */
  ns: number;
  weightBytesRead: number;
  /** Neurons scored, over layers and tokens; those of them that were computed or fetched. */
  scored: number;
  chosen: number;
  /** Neurons on flash that were left out, but would have been computed in memory. */
  skippedOnFlash: number;
}
