import type { QuantizationName } from '../../src/format/manifest.js';

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
}

/** What `convert --quant` stores. Chosen by measured perplexity and by the bytes a token reads. */
export const RECIPES: Readonly<Record<QuantizationName, Recipe>> = {
  q4: { name: 'q4', ffn: 'q4', attention: 'q4', embedding: 'q8', head: 'q8' },
  q8: { name: 'q8', ffn: 'q8', attention: 'q8', embedding: 'q8', head: 'q8' },
  f16: { name: 'f16', ffn: 'f16', attention: 'f16', embedding: 'f16', head: 'f16' },
};

/** The recipe for a model: tied embeddings have one encoding for both uses. */
export function recipeFor(name: QuantizationName, tiedEmbeddings: boolean): Recipe {
  const recipe = RECIPES[name];
  return tiedEmbeddings ? { ...recipe, head: recipe.embedding } : recipe;
}
