import { Pi2Error } from '../base/error.js';
import { expertCount, type Hyperparameters } from '../format/hyperparameters.js';
import type { Engine, EngineOptions, StepEngine, StepOptions } from './engine.js';

/** How well the predictor chose, over all measured tokens and layers. Null where there was nothing to choose. */
export interface Recall {
  /** Of the neurons that fire when all are computed, those that the predicted step computed too. */
  recallShare: number | null;
  /** The same by |what the neuron contributes|; null too unless every neuron is in memory. */
  recallMagnitudeShare: number | null;
}

/**
 * An engine that computes every predicted token twice: first exactly, then predicted from the same position; the second result
 * is the one that counts. Both begin with the same KV cache; inside the token, later layers see what earlier ones left out.
 */
export class RecallMeter implements StepEngine {
  readonly contextLength: number;
  readonly vocabSize: number;
  readonly batchSize: number;
  readonly #engine: Engine;
  readonly #shape: Hyperparameters;
  readonly #exactFired: Uint8Array;
  readonly #fired: Uint8Array;
  readonly #routed: Uint8Array;
  /** Null unless every neuron is in memory: only then the engine tells. */
  readonly #activations: Float32Array | null;
  #exactCount = 0;
  #foundCount = 0;
  #exactMagnitude = 0;
  #foundMagnitude = 0;

  /** Throws `Pi2Error` E_USAGE when `engine` does not predict. `shape` is of the model that is open. */
  constructor(engine: Engine, shape: Hyperparameters) {
    if (engine.operatingPoint === null) {
      throw new Pi2Error(
        'E_USAGE',
        '--measure-recall has nothing to measure: the model has no predictor, or memory is too little for it',
        'convert with --calibration TEXT, give more --memory, or leave --measure-recall out',
      );
    }
    this.contextLength = engine.contextLength;
    this.vocabSize = engine.vocabSize;
    this.batchSize = engine.batchSize;
    this.#engine = engine;
    this.#shape = shape;
    this.#exactFired = new Uint8Array(engine.firedBytesPerToken);
    this.#fired = new Uint8Array(engine.firedBytesPerToken);
    this.#routed = new Uint8Array(engine.routedBytesPerToken);
    const slots = shape.layer_count * (shape.experts?.used_per_token ?? 1);
    this.#activations = engine.storage === 'resident' ? new Float32Array(slots * shape.neuron_count) : null;
  }

  /** Measures steps of one token that are predicted; others pass. */
  async step(tokens: Int32Array, position: number, logits: Float32Array, options: StepOptions = {}): Promise<void> {
    if (options.exact === true || tokens.length > 1) return this.#engine.step(tokens, position, logits, options);
    const activations = this.#activations ?? undefined;
    await this.#engine.step(tokens, position, logits, {
      exact: true,
      fired: this.#exactFired,
      routed: this.#routed,
      ...(activations && { activations }),
    });
    await this.#engine.step(tokens, position, logits, { ...options, fired: this.#fired });
    this.#compare();
  }

  /** Over all steps so far. */
  recall(): Recall {
    const hasMagnitude = this.#activations !== null && this.#exactMagnitude > 0;
    return {
      recallShare: this.#exactCount > 0 ? this.#foundCount / this.#exactCount : null,
      recallMagnitudeShare: hasMagnitude ? this.#foundMagnitude / this.#exactMagnitude : null,
    };
  }

  #compare(): void {
    const experts = expertCount(this.#shape);
    const neurons = this.#shape.neuron_count;
    const bankBytes = Math.ceil(neurons / 8);
    const routedBytes = Math.ceil(experts / 8);
    // Activations have a row for each expert in use, ascending, layer behind layer.
    let row = 0;
    for (let layer = 0; layer < this.#shape.layer_count; layer++) {
      for (let expert = 0; expert < experts; expert++) {
        if (!isSet(this.#routed, layer * routedBytes, expert)) continue;
        const bank = (layer * experts + expert) * bankBytes;
        for (let neuron = 0; neuron < neurons; neuron++) {
          if (isSet(this.#exactFired, bank, neuron)) this.#count(bank, neuron, row * neurons + neuron);
        }
        row++;
      }
    }
  }

  /** Counts a neuron that fires exactly; `at` is the place of its activation. */
  #count(bank: number, neuron: number, at: number): void {
    const isFound = isSet(this.#fired, bank, neuron);
    const magnitude = Math.abs(this.#activations?.[at] ?? 0);
    this.#exactCount++;
    this.#exactMagnitude += magnitude;
    if (!isFound) return;
    this.#foundCount++;
    this.#foundMagnitude += magnitude;
  }
}

/** Refuses options of an engine that never predicts: E_USAGE. */
export function requirePredicting({ exact, ablate = [], engine }: EngineOptions): void {
  const without = exact ? '--exact' : engine === 'mmap' ? '--engine mmap' : '--ablate predictor';
  if (!exact && engine !== 'mmap' && !ablate.includes('predictor')) return;
  throw new Pi2Error(
    'E_USAGE',
    `--measure-recall does not go with ${without}: nothing is predicted`,
    'leave one of the two out',
  );
}

/** Whether bit `index` is set in the bits that begin at byte `begin`. */
function isSet(bits: Uint8Array, begin: number, index: number): boolean {
  return ((bits[begin + (index >> 3)] >> (index & 7)) & 1) === 1;
}
