import { open } from 'node:fs/promises';
import { fileError } from '../../src/base/error.js';
import { roundUpToPage } from '../../src/format/layout.js';
import type { ModelDirectory } from '../../src/format/model-directory.js';
import { type GraphShape, graphFile, NPU_WEIGHTS_FILE, NPU_WEIGHTS_NAME } from '../../src/format/npu.js';
import type { GraphFacts } from './lint.js';

/** A graph of a model directory, and whether a dense unit would take it. */
export interface CheckedGraph extends GraphShape {
  file: string;
  bytes: number;
  /** What an NPU would not take, in words. */
  problems: string[];
  /** Null if there are problems. */
  facts: GraphFacts | null;
}

/** Reads and lints every graph of a model, in the order of the manifest; none without `npu/`. Throws `E_FILE`. */
export async function checkGraphs(model: ModelDirectory): Promise<CheckedGraph[]> {
  const { npu, extents } = model.manifest;
  if (npu === undefined) return [];
  // Takes a while to import: only models that have graphs pay for it.
  const { lintGraph } = await import('./lint.js');
  const ends = extents.filter(({ file }) => file === NPU_WEIGHTS_FILE).map(({ offset, bytes }) => offset + bytes);
  const neighbours = new Map([[NPU_WEIGHTS_NAME, roundUpToPage(Math.max(...ends))]]);
  const checked: CheckedGraph[] = [];
  for (const { tokens, clusters, bytes } of npu.graphs) {
    const shape = { tokens, clusters };
    const content = await readGraph(model.graphPath(shape), bytes);
    checked.push({ ...shape, file: graphFile(shape), bytes, ...lintGraph(content, neighbours) });
  }
  return checked;
}

/** The first `bytes` of a file, which has as many. */
async function readGraph(path: string, bytes: number): Promise<Uint8Array> {
  try {
    const file = await open(path, 'r');
    try {
      const { buffer, bytesRead } = await file.read(Buffer.alloc(bytes), 0, bytes, 0);
      return buffer.subarray(0, bytesRead);
    } finally {
      await file.close();
    }
  } catch (error) {
    throw fileError(error, 'read', path);
  }
}
