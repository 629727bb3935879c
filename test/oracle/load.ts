import type { Checkpoint } from '../../converter/checkpoint/checkpoint.js';
import type { SourceExpert, SourceLayer, SourceTensor } from '../../converter/checkpoint/model.js';
import { decode } from '../support/numbers.js';

/** Row-major numbers with their shape, outermost first. */
export interface Matrix {
  rows: number;
  columns: number;
  values: Float32Array;
}

export interface ExpertWeights {
  gate?: Matrix;
  up: Matrix;
  down: Matrix;
}

type LayerTensors = Omit<SourceLayer, 'experts'>;
/** The tensors of `SourceLayer` under the same names, loaded. */
export type LayerWeights = { [name in keyof LayerTensors]: Matrix } & { experts: ExpertWeights[] };

export interface Weights {
  embedding: Matrix;
  /** Row p belongs to position p. */
  position_embedding?: Matrix;
  layers: LayerWeights[];
  output_norm: Matrix;
  output_norm_bias?: Matrix;
  /** The embedding itself when tied. */
  head: Matrix;
}

/**
 * Changes a matrix as it is loaded, e.g. rounds it as an encoding would. Names are those of FORMAT.md section 3, and
 * `layers.L.experts.E.gate`, `.up`, `.down` for the FFN. Vectors have one row.
 */
export type Transform = (name: string, matrix: Matrix) => Float32Array;

/** Loads a whole checkpoint as float32. */
export async function loadWeights(checkpoint: Checkpoint, transform?: Transform): Promise<Weights> {
  const { model } = checkpoint;
  const load = async (name: string, tensor: SourceTensor, skippedRows = 0): Promise<Matrix> => {
    const columns = tensor.shape[tensor.shape.length - 1];
    const all = await readTensor(checkpoint, tensor);
    const values = all.subarray(skippedRows * columns);
    const matrix = { rows: values.length / columns, columns, values };
    return transform ? { ...matrix, values: transform(name, matrix) } : matrix;
  };
  const loadIf = (name: string, tensor?: SourceTensor) => (tensor ? load(name, tensor) : Promise.resolve(undefined));
  const position = model.position_embedding;
  const embedding = await load('embedding', model.embedding);
  return {
    embedding,
    position_embedding: position && (await load('position_embedding', position.tensor, position.skippedRows)),
    layers: await Promise.all(model.layers.map((layer, index) => loadLayer(layer, `layers.${index}`, load))),
    output_norm: await load('output_norm', model.output_norm),
    output_norm_bias: await loadIf('output_norm_bias', model.output_norm_bias),
    head: (await loadIf('head', model.head)) ?? embedding,
  };
}

type Load = (name: string, tensor: SourceTensor) => Promise<Matrix>;

async function loadLayer({ experts, ...tensors }: SourceLayer, prefix: string, load: Load): Promise<LayerWeights> {
  const loaded: Record<string, Matrix> = {};
  for (const [name, tensor] of Object.entries(tensors)) {
    if (tensor) loaded[name] = await load(`${prefix}.${name}`, tensor);
  }
  const expertWeights = await Promise.all(
    experts.map((expert, index) => loadExpert(expert, `${prefix}.experts.${index}`, load)),
  );
  return { ...loaded, experts: expertWeights } as LayerWeights;
}

async function loadExpert(expert: SourceExpert, prefix: string, load: Load): Promise<ExpertWeights> {
  return {
    gate: expert.gate && (await load(`${prefix}.gate`, expert.gate)),
    up: await load(`${prefix}.up`, expert.up),
    down: await load(`${prefix}.down`, expert.down),
  };
}

/** All numbers of a tensor of a checkpoint, as float32. */
export async function readTensor(checkpoint: Checkpoint, tensor: SourceTensor): Promise<Float32Array> {
  const bytes = new Uint8Array(checkpoint.bytes(tensor));
  await checkpoint.read(tensor, 0, bytes);
  return decode(bytes, tensor.type);
}
