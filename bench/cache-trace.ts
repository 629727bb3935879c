import { type ActivationProfile, layerCounts } from '../converter/activation/profile.js';
import type { Engine } from '../src/engine/engine.js';
import { expertCount } from '../src/format/hyperparameters.js';
import type { ModelDirectory } from '../src/format/model-directory.js';

/** Which neurons each token needs: bits as `StepRequest` records them, token behind token. */
export interface NeuronTrace {
  tokens: number;
  layerCount: number;
  expertCount: number;
  neuronCount: number;
  fired: Uint8Array;
  routed: Uint8Array;
}

/**
 * The same as numbers. Neuron n of bank b (an expert of a layer, layer-major) is bank * neuronCount + n; those of token t are
 * `units[starts[t]]` to `units[starts[t + 1] - 1]`, ascending: the order in which decoding needs them.
 */
export interface NeedList {
  tokens: number;
  bankCount: number;
  neuronCount: number;
  starts: Uint32Array;
  units: Uint32Array;
}

/** How often neurons fire on calibration text; for each bank, neurons in heat order. */
export interface HeatRates {
  /** [banks x neurons]: share of all tokens. */
  ofTokens: Float32Array;
  /** [banks x neurons]: share of the tokens that are routed to the bank. */
  ofBank: Float32Array;
}

/**
 * Runs a model over windows of text and records what fires. Which neurons a token needs does not depend on how many are computed
 * together, so they are computed in batches.
 */
export async function recordTrace(
  model: ModelDirectory,
  engine: Engine,
  windows: readonly (readonly number[])[],
): Promise<NeuronTrace> {
  const { hyperparameters: h } = model.manifest;
  const tokens = windows.reduce((sum, window) => sum + window.length, 0);
  const { firedBytesPerToken, routedBytesPerToken } = engine;
  const fired = new Uint8Array(tokens * firedBytesPerToken);
  const routed = new Uint8Array(tokens * routedBytesPerToken);
  const logits = new Float32Array(engine.vocabSize);
  let done = 0;
  for (const window of windows) {
    for (let position = 0; position < window.length; position += engine.batchSize) {
      const batch = Int32Array.from(window.slice(position, position + engine.batchSize));
      const end = done + batch.length;
      await engine.step(batch, position, logits, {
        exact: true,
        fired: fired.subarray(done * firedBytesPerToken, end * firedBytesPerToken),
        routed: routed.subarray(done * routedBytesPerToken, end * routedBytesPerToken),
      });
      done = end;
    }
  }
  const shape = { layerCount: h.layer_count, expertCount: expertCount(h), neuronCount: h.neuron_count };
  return { tokens, ...shape, fired, routed };
}

/** The trace as numbers. */
export function listNeeds(trace: NeuronTrace): NeedList {
  const { tokens, neuronCount, fired } = trace;
  const bankCount = trace.layerCount * trace.expertCount;
  const bankBytes = Math.ceil(neuronCount / 8);
  let count = 0;
  for (const byte of fired) for (let rest = byte; rest !== 0; rest &= rest - 1) count++;
  const starts = new Uint32Array(tokens + 1);
  const units = new Uint32Array(count);
  let at = 0;
  for (let token = 0; token < tokens; token++) {
    starts[token] = at;
    const first = token * bankCount * bankBytes;
    for (let i = 0; i < bankCount * bankBytes; i++) {
      const base = Math.floor(i / bankBytes) * neuronCount + (i % bankBytes) * 8;
      for (let rest = fired[first + i]; rest !== 0; rest &= rest - 1)
        units[at++] = base + 31 - Math.clz32(rest & -rest);
    }
  }
  starts[tokens] = at;
  return { tokens, bankCount, neuronCount, starts, units };
}

/** The rates of a profile. */
export function heatRates(profile: ActivationProfile): HeatRates {
  const { layers, experts, neurons } = profile.shape;
  const ofTokens = new Float32Array(layers * experts * neurons);
  const ofBank = new Float32Array(ofTokens.length);
  for (let bank = 0; bank < layers * experts; bank++) {
    const counts = layerCounts(profile, Math.floor(bank / experts));
    const first = (bank % experts) * neurons;
    // Bundles are sorted by these counts: sorted, counts are in heat order.
    const falling = counts
      .slice(first, first + neurons)
      .sort()
      .reverse();
    for (let n = 0; n < neurons; n++) {
      ofTokens[bank * neurons + n] = falling[n] / profile.batches[0];
      ofBank[bank * neurons + n] = falling[n] / Math.max(1, profile.routed[bank]);
    }
  }
  return { ofTokens, ofBank };
}
