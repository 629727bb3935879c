import type { SourceState } from '../sources.js';
import type { SourceModel, SourceTensor } from './model.js';
import type { SourcePredictor } from './predictors.js';
import type { SourceFile } from './source-file.js';

/** Where bytes begin. */
export interface Place {
  file: SourceFile;
  offset: number;
}

/**
 * Where a conversion gets its tensors from: a checkpoint on disk (`Checkpoint`), or anything that answers as one would. It may be
 * asked for any part of a tensor at any time, several parts at once.
 */
export interface TensorSource {
  /** The checkpoint's directory, for messages and the journal; text files are copied from it. */
  readonly directory: string;
  /** What the model is called. */
  readonly name: string;
  readonly model: SourceModel;
  /** Tokenizer and generation files that are there, to go with the model. */
  readonly textFiles: readonly string[];
  /** Bytes of a tensor. */
  bytes(tensor: SourceTensor): number;
  /** Fills `target` with the tensor's bytes from `byteOffset` on. */
  read(tensor: SourceTensor, byteOffset: number, target: Uint8Array): Promise<void>;
  /** Where a tensor lies; null if it is in no file. */
  place(tensor: SourceTensor): Place | null;
  /** The predictors that it brings, for each layer and expert, or null. */
  predictors(): SourcePredictor[][] | null;
  /** Every file that a model is made of, as it is now. */
  states(): Promise<SourceState[]>;
  /** sha256 of a file. */
  hash(state: SourceState, signal: AbortSignal): Promise<string>;
  close(): Promise<void>;
}
