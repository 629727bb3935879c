/** Reads a graph of `npu/`: which weights it names, and where a bank has their bytes. No weight is read. */
import { readFile, stat } from 'node:fs/promises';
import type { onnx as Onnx } from 'onnx-proto';
import { Pi2Error } from '../base/error.js';
import { NPU_WEIGHTS_NAME } from '../format/npu.js';

/** A tensor of a graph whose bytes are in the file of weights. */
export interface GraphTensor {
  name: string;
  /** ONNX's number of the element type. */
  elementType: number;
  dimensions: number[];
  /** Behind the start of the bank. */
  offset: number;
  bytes: number;
}

/** Bytes of an element, by ONNX's number of its type. */
const ELEMENT_BYTES: Record<number, number> = { 1: 4, 2: 1, 3: 1, 10: 2 };
/** Graphs name their weights, they do not hold them. */
const GRAPH_BYTES_MAX = 16 * 1024 * 1024;
/** A tensor's data is in another file: `TensorProto.DataLocation` of the format. */
const EXTERNAL = 1;

const CONVERT_AGAIN = 'convert the checkpoint again with --npu';

/**
 * The tensors of the graph in `file` that are in the file of weights, as it names them for bank 0, which is `bank`. Throws `Pi2Error`
 * E_MODEL when the file is missing or no graph, when a tensor is in another file, and when its bytes are not those of its
 * shape or not the bank's.
 */
export async function readGraph(file: string, bank: { offset: number; bytes: number }): Promise<GraphTensor[]> {
  const graph = await parseGraph(file);
  const tensors: GraphTensor[] = [];
  for (const tensor of graph.initializer ?? []) {
    const { name, dataLocation, externalData, dataType, dims } = tensor;
    if (dataLocation !== EXTERNAL) continue;
    const entries = new Map((externalData ?? []).map(({ key, value }) => [key, value]));
    const where = `${file}: tensor ${JSON.stringify(name)}`;
    if (!name || entries.get('location') !== NPU_WEIGHTS_NAME) {
      throw damaged(`${where} is in ${JSON.stringify(entries.get('location'))}; expected ${NPU_WEIGHTS_NAME}`);
    }
    const offset = Number(entries.get('offset')) - bank.offset;
    const bytes = Number(entries.get('length'));
    const dimensions = (dims ?? []).map(Number);
    const expected = dimensions.reduce((count, size) => count * size, ELEMENT_BYTES[dataType ?? 0] ?? Number.NaN);
    if (bytes !== expected || !Number.isSafeInteger(bytes) || dimensions.some((size) => size < 1)) {
      throw damaged(`${where} has ${bytes} bytes, which is not what its type and shape (${dimensions}) take`);
    }
    if (!Number.isSafeInteger(offset) || offset < 0 || offset + bytes > bank.bytes) {
      throw damaged(`${where} begins at ${offset} of its bank and has ${bytes} bytes; a bank has ${bank.bytes}`);
    }
    tensors.push({ name, elementType: dataType as number, dimensions, offset, bytes });
  }
  if (tensors.length === 0) throw damaged(`${file} names no weights`);
  return tensors;
}

async function parseGraph(file: string): Promise<Onnx.IGraphProto> {
  let bytes: Buffer;
  try {
    const { size } = await stat(file);
    if (size > GRAPH_BYTES_MAX) throw damaged(`${file} has ${size} bytes, too many for a graph without weights`);
    bytes = await readFile(file);
  } catch (error) {
    if (error instanceof Pi2Error) throw error;
    throw damaged(`cannot read ${file}: ${(error as Error).message}`);
  }
  // Takes a while to import: only who runs graphs pays for it.
  const { default: onnxProto } = await import('onnx-proto');
  try {
    const { graph } = onnxProto.onnx.ModelProto.decode(bytes);
    if (graph) return graph;
  } catch (error) {
    throw damaged(`${file} is no graph: ${(error as Error).message}`);
  }
  throw damaged(`${file} has no graph in it`);
}

function damaged(message: string): Pi2Error {
  return new Pi2Error('E_MODEL', message, CONVERT_AGAIN);
}
