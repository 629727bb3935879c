/** The part of the contract with the addon (contract.ts) that is about dense units. */
import type { OnnxruntimeRequest } from '../npu/onnxruntime-request.js';

/**
 * A dense unit that computes the first clusters of each bank, while the CPU computes the neurons behind them;
 * docs/DENSE_UNIT.md. With `stream`, hot neurons must be at least those that the most clusters of a `host` unit have.
 */
export interface UnitRequest {
  kind: 'host' | 'onnxruntime';
  /** Of the latter: its graphs, of all shapes that a schedule can have. */
  onnxruntime?: OnnxruntimeRequest;
  /** Cores that it takes from `EngineRequest.threads` while it computes. */
  threads: number;
  /** Neurons of a cluster, a multiple of 128; the last one of a bank may have fewer. */
  clusterNeurons: number;
  /** No schedule has more. */
  mostClusters: number;
  /** Clusters that are the unit's, of 1, 2, 3 and 4 tokens computed together, and of a chunk of a prompt. */
  clusters: number[];
  /** Trouble that tests ask for: the job of the unit that fails, numbered from 1. */
  failJob?: number;
}

/** Nanoseconds of a neuron on the CPU: to find out whether it fires, and beyond that if it does. */
export interface NeuronTimes {
  lookNs: number;
  fireNs: number;
}

/** Each for 1, 2, 3 and 4 tokens and for a chunk of a prompt. */
export interface UnitTimes {
  /** Nanoseconds that the unit takes for a job of 1, 2, … clusters; empty where so many tokens are never computed together. */
  unit: number[][];
  /** With all threads, and with those that are left beside the unit. */
  alone: NeuronTimes[];
  beside: NeuronTimes[];
}

/** What an open engine does with its unit; refused with `NATIVE_ARGUMENT` where there is none. */
export interface NativeUnitCalls {
  /** What unit and CPU take for the same neurons, in some tens of milliseconds. Before the first step. */
  measureUnit(): Promise<UnitTimes>;
  /** Another `UnitRequest.clusters`; loads the graphs that it needs. Not while a step runs. */
  setUnitSchedule(request: Pick<UnitRequest, 'clusters'>): Promise<void>;
}
