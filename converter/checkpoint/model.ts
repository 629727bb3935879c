import type { Hyperparameters } from '../../src/format/hyperparameters.js';

/** A tensor of a checkpoint, found and checked: its name in the safetensors files and its shape, outermost first. */
export interface SourceTensor {
  name: string;
  /** Number type as safetensors spells it. Others are refused when the checkpoint is opened. */
  type: 'F32' | 'F16' | 'BF16';
  shape: readonly number[];
}

/** One FFN (of one expert). gate and up are [neurons x hidden], down is [hidden x neurons]; two-matrix FFNs have no gate. */
export interface SourceExpert {
  gate?: SourceTensor;
  up: SourceTensor;
  down: SourceTensor;
}

/** The tensors of one layer, by what they do. Names follow FORMAT.md section 3. */
export interface SourceLayer {
  attention_norm: SourceTensor;
  attention_norm_bias?: SourceTensor;
  q: SourceTensor;
  k: SourceTensor;
  v: SourceTensor;
  o: SourceTensor;
  q_bias?: SourceTensor;
  k_bias?: SourceTensor;
  v_bias?: SourceTensor;
  o_bias?: SourceTensor;
  q_norm?: SourceTensor;
  k_norm?: SourceTensor;
  ffn_norm: SourceTensor;
  ffn_norm_bias?: SourceTensor;
  router?: SourceTensor;
  up_bias?: SourceTensor;
  down_bias?: SourceTensor;
  experts: SourceExpert[];
}

/** A checkpoint as the converter sees it: one model, whatever its family called its tensors. */
export interface SourceModel {
  hyperparameters: Hyperparameters;
  embedding: SourceTensor;
  /** Learned positions (OPT) and how many of their first rows are never used. */
  position_embedding?: { tensor: SourceTensor; skippedRows: number };
  layers: SourceLayer[];
  output_norm: SourceTensor;
  output_norm_bias?: SourceTensor;
  /** Absent when tied to the embedding. */
  head?: SourceTensor;
  /** Tensors that are known and left out on purpose (predictors, stored rotary tables), for the log. */
  ignored: string[];
}
