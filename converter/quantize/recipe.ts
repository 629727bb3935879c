import type { QuantizationName } from '../../src/format/manifest.js';
import { DOWN_TILE } from '../../src/format/npu.js';

/** Encodings that hold matrices; vectors and the router are always f32. */
export type MatrixEncoding = 'f16' | 'q8' | 'q4';

/** The encoding of each part of a model. Norms, biases and the router are f32 in all of them. */
export interface Recipe {
  name: QuantizationName;
  ffn: MatrixEncoding;
  attention: MatrixEncoding;
  /** Also of learned positions. */
  embedding: MatrixEncoding;
  /** When embeddings are tied, the embedding is the head and its encoding counts. */
  head: MatrixEncoding;
  /** For a dense unit: neurons that share a scale of Down. */
  down_tiles?: typeof DOWN_TILE;
}

/**
 * What `convert --quant` stores, chosen by perplexity and by the bytes a token reads. Measured with `powerinfer2 perplexity
 * -c 256` on held-out stories, against the float reference, for the dense dReLU, the dense SiLU and the MoE dReLU model:
 *
 * | q4: ffn, attention, embedding, head | dReLU   | SiLU    | MoE     |
 * | q4 q8 q8 q8                         | +0.46 % | +0.30 % | +0.37 % |
 * | q4 q4 q8 q8                         | +1.86 % | +0.68 % | +1.72 % |
 * | q4 q4 q8 q4 (chosen)                | +1.96 % | +0.86 % | +1.92 % |
 * | q4 q4 q4 q4                         | +2.05 % | +1.04 % | +2.14 % |
 *
 * Attention and head are read whole for every token, and with a sparse FFN they are most of what a token reads: 8 bits there
 * would cost a 7B model two fifths of its speed. Of the embedding a token reads one row, so it keeps 8 bits.
 */
export const RECIPES: Readonly<Record<QuantizationName, Recipe>> = {
  q4: { name: 'q4', ffn: 'q4', attention: 'q4', embedding: 'q8', head: 'q4' },
  q8: { name: 'q8', ffn: 'q8', attention: 'q8', embedding: 'q8', head: 'q8' },
  f16: { name: 'f16', ffn: 'f16', attention: 'f16', embedding: 'f16', head: 'f16' },
};

/** The recipe for a model: tied embeddings have one encoding for both uses. With `npu` (q4 only) a dense unit can read it. */
export function recipeFor(name: QuantizationName, tiedEmbeddings: boolean, npu = false): Recipe {
  const recipe: Recipe = npu ? { ...RECIPES[name], down_tiles: DOWN_TILE } : RECIPES[name];
  return tiedEmbeddings ? { ...recipe, head: recipe.embedding } : recipe;
}
