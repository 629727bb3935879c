import { createHash } from 'node:crypto';
import { Pi2Error } from '../../src/base/error.js';
import { BLOCK } from '../../src/format/encoding.js';
import type { Hyperparameters } from '../../src/format/hyperparameters.js';
import type { NpuEntry, QuantizationName } from '../../src/format/manifest.js';
import {
  clusterNeurons,
  type GraphShape,
  graphFile,
  graphShapes,
  NPU_FOLDER,
  NPU_WEIGHTS_FILE,
  NPU_WEIGHTS_NAME,
} from '../../src/format/npu.js';
import type { Plan } from '../steps/extents.js';
import { type Output, OutputFile, writeSynced } from '../write/output.js';
import { type PackShop, packWeights } from './pack.js';

/** Throws `E_USAGE` unless weights are stored as a dense unit takes them. */
export function requireInt4(quantization: QuantizationName): void {
  if (quantization === 'q4') return;
  throw new Pi2Error(
    'E_USAGE',
    `--npu with --quant ${quantization}: a dense unit takes 4-bit weights`,
    'give --quant q4, or leave --npu out: without it the host computes any quantization',
  );
}

/** Throws `E_UNSUPPORTED` for a model whose rows are no whole blocks of MatMulNBits. */
export function requireWholeBlocks({ hidden_size }: Hyperparameters): void {
  if (hidden_size % BLOCK === 0) return;
  throw new Pi2Error(
    'E_UNSUPPORTED',
    `--npu: the hidden size ${hidden_size} is not a multiple of ${BLOCK}, the block of a dense unit's weights`,
    'convert without --npu',
  );
}

/** Makes `npu/` of the partial directory out of the bundles in it: weights, then graphs. Resolves with what the manifest says. */
export async function makeNpu(plan: Plan, h: Hyperparameters, output: Output, shop: PackShop): Promise<NpuEntry> {
  await output.makeFolder(NPU_FOLDER);
  const weights = await OutputFile.open(output.partial(NPU_WEIGHTS_FILE));
  try {
    await packWeights(plan, h, weights, shop);
    await weights.requireSize(plan.npuBytes);
  } finally {
    await weights.close();
  }
  // Takes a while to import: only who makes graphs pays for it.
  const { makeGraph } = await import('./onnx.js');
  const { lintGraph } = await import('./lint.js');
  const neighbours = new Map([[NPU_WEIGHTS_NAME, plan.npuBytes]]);
  const graphs: NpuEntry['graphs'] = [];
  for (const shape of graphShapes(h.neuron_count)) {
    const bytes = makeGraph(h, shape);
    const { problems } = lintGraph(bytes, neighbours);
    if (problems.length > 0) throw notForUnits(shape, problems);
    await writeSynced(output.partial(graphFile(shape)), bytes);
    graphs.push({ ...shape, bytes: bytes.length, sha256: createHash('sha256').update(bytes).digest('hex') });
  }
  return { cluster_neurons: clusterNeurons(h.neuron_count), graphs };
}

/** A model may be too large for a unit: its graphs name more weights than can be loaded at once. */
function notForUnits(shape: GraphShape, problems: string[]): Pi2Error {
  const what = `--npu: a dense unit would not take the graph ${graphFile(shape)}: ${problems.join('; ')}`;
  return new Pi2Error('E_UNSUPPORTED', what, 'convert without --npu');
}
