import path from 'node:path';
import { Pi2Error } from '../base/error.js';
import { expertCount } from '../format/hyperparameters.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { bankExtent, bankLayout, type GraphShape, graphFile, NPU_FOLDER, NPU_WEIGHTS_FILE } from '../format/npu.js';
import { type DeviceProfile, requireProviderFiles } from './device-profile.js';
import { type GraphTensor, readGraph } from './graph-file.js';
import { findOnnxruntime } from './onnxruntime-library.js';

/** What the unit `onnxruntime` is opened with, as the addon takes it; native/npu/onnxruntime_config.h. */
export interface OnnxruntimeRequest {
  /** Path of libonnxruntime.so.1, or a name that the loader looks for. */
  library: string;
  graphs: OnnxruntimeGraph[];
  weights: string;
  /** Where each bank (layer by layer, in it expert by expert) begins in the file of weights. */
  bankOffsets: number[];
  bankBytes: number;
  hiddenSize: number;
  provider: OnnxruntimeProvider;
}

/** The graph of a shape, which all banks share. */
export interface OnnxruntimeGraph extends GraphShape {
  path: string;
  tensors: GraphTensor[];
}

/** An execution provider of ONNX Runtime. */
export interface OnnxruntimeProvider {
  /** As the library names its devices; empty: the CPU provider. */
  name: string;
  /** Plug-in that has it; empty: the library itself. */
  library: string;
  options: Record<string, string>;
  sessionOptions: Record<string, string>;
  /** Directory of compiled graphs, written at first and opened later; empty: compiled each time. */
  contexts: string;
}

/** Graphs and weights that a dense unit is to compute. */
export interface DenseWeights {
  /** The directory whose `npu/` has them. */
  directory: string;
  bankOffsets: readonly number[];
  bankBytes: number;
  hiddenSize: number;
}

/** Where things are that are no part of the model. */
export interface OnnxruntimePlaces {
  /** The library; default: looked for. */
  library?: string;
  /** The device whose NPU computes; default: the CPU provider. */
  profile?: DeviceProfile;
}

const CPU_PROVIDER: OnnxruntimeProvider = { name: '', library: '', options: {}, sessionOptions: {}, contexts: '' };

/** What `convert --npu` made of a model. Throws `Pi2Error` E_NPU when the model has none. */
export function denseWeights(model: ModelDirectory): DenseWeights {
  const { hyperparameters: h, npu } = model.manifest;
  const directory = model.path;
  if (npu === undefined) {
    const message = `${directory} has no graphs for ONNX Runtime`;
    throw new Pi2Error('E_NPU', message, 'convert the checkpoint again with --npu, or take --npu host');
  }
  const experts = expertCount(h);
  const banks = Array.from({ length: h.layer_count * experts }, (_, bank) => bank);
  const bankOffsets = banks.map((bank) => model.extent(bankExtent(Math.floor(bank / experts), bank % experts)).offset);
  return { directory, bankOffsets, bankBytes: bankLayout(h).bytes, hiddenSize: h.hidden_size };
}

/**
 * Reads the graphs of `shapes` and finds what computes them. Throws `Pi2Error`: E_MODEL when a graph is missing, damaged or
 * names bytes that no bank has; E_NPU when a library of the profile is missing.
 */
export async function makeOnnxruntimeRequest(
  weights: DenseWeights,
  shapes: readonly GraphShape[],
  { library, profile }: OnnxruntimePlaces,
): Promise<OnnxruntimeRequest> {
  const found = findOnnxruntime(library);
  const { directory, bankBytes, hiddenSize } = weights;
  const bank = { offset: weights.bankOffsets[0], bytes: bankBytes };
  const graphs: OnnxruntimeGraph[] = [];
  for (const { tokens, clusters } of shapes) {
    const file = path.join(directory, graphFile({ tokens, clusters }));
    graphs.push({ tokens, clusters, path: file, tensors: await readGraph(file, bank) });
  }
  return {
    library: found,
    graphs,
    weights: path.join(directory, NPU_WEIGHTS_FILE),
    bankOffsets: [...weights.bankOffsets],
    bankBytes,
    hiddenSize,
    provider:
      profile?.provider === undefined ? CPU_PROVIDER : makeProvider(profile, found, path.join(directory, NPU_FOLDER)),
  };
}

/** The provider of a device; its libraries are beside ONNX Runtime. */
function makeProvider(profile: DeviceProfile, library: string, folder: string): OnnxruntimeProvider {
  const { provider } = profile;
  if (provider === undefined) return CPU_PROVIDER;
  if (!library.includes('/')) {
    throw new Pi2Error(
      'E_NPU',
      `it is not said where ONNX Runtime is: the libraries of the NPU of ${profile.device} are beside it`,
      'give the path of the library',
    );
  }
  const directory = path.dirname(path.resolve(library));
  requireProviderFiles(profile, directory);
  const options = Object.fromEntries(Object.entries(provider.options).map(([key, value]) => [key, String(value)]));
  // The plug-in would look for its backend where the loader does: not beside itself.
  options.backend_path = path.join(directory, provider.options.backend_path);
  return {
    name: provider.name,
    library: path.join(directory, provider.library),
    options,
    sessionOptions: { ...provider.session_options },
    contexts: provider.contexts === undefined ? '' : path.join(folder, provider.contexts),
  };
}
