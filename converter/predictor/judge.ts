import type { NativeAddon, PredictorRequest } from '../../src/engine/contract.js';
import { Engine } from '../../src/engine/engine.js';
import { predictorRequest } from '../../src/engine/engine-request.js';
import { measurePerplexity, type Window } from '../../src/engine/evaluate.js';
import type { OperatingPoint, PredictorInput } from '../../src/format/manifest.js';
import type { ModelDirectory } from '../../src/format/model-directory.js';
import { type LayerCurve, LEVELS, RUNS } from './curve.js';

/** Thresholds to try: numbers of levels of the curves, and how many runs of neurons count as in memory. */
export interface Setting {
  keptRuns: number;
  memory: number;
  flash: number;
}

/** What a setting gave on held-out text. */
export interface Judgement {
  setting: Setting;
  computedShare: number;
  fetchedShare: number;
  magnitudeShare: number;
  perplexity: number;
  /** How much more than exact mode's that is, with a standard error on top: so much it will hardly be on other text. */
  growthMost: number;
}

export interface JudgeRequest {
  addon: NativeAddon;
  /** Without a predictor. */
  model: ModelDirectory;
  /** The same with the extents and tensors of `predictor.bin`, and what the predictor gets to see. */
  withPredictor: ModelDirectory;
  input: PredictorInput;
  curves: readonly LayerCurve[];
  windows: readonly Window[];
  context: number;
  /** Of each window in exact mode: minus the logarithm of its probability. */
  exact: readonly number[];
  /** Hears of every window; may throw to end early. */
  onWindow: () => void;
}

/** Runs held-out text under thresholds and compares it with exact mode, window by window. */
export class Judge {
  readonly #request: JudgeRequest;
  readonly #judgements = new Map<string, Judgement>();

  constructor(request: JudgeRequest) {
    this.#request = request;
  }

  /** Everything that was judged so far. */
  get judgements(): Judgement[] {
    return [...this.#judgements.values()];
  }

  /** The thresholds of a setting, one a layer. */
  thresholds({ memory, flash }: Setting): Pick<OperatingPoint, 'memory_thresholds' | 'flash_thresholds'> {
    const { curves } = this.#request;
    return {
      memory_thresholds: curves.map((curve) => curve.thresholds[memory]),
      flash_thresholds: curves.map((curve) => curve.thresholds[flash]),
    };
  }

  /** Judges a setting, once. */
  async judge(setting: Setting): Promise<Judgement> {
    const key = Object.values(setting).join();
    const known = this.#judgements.get(key);
    if (known) return known;
    const { addon, model, withPredictor, input, windows, exact, context, onWindow } = this.#request;
    const neurons = model.manifest.hyperparameters.neuron_count;
    const flashFrom = Math.ceil((setting.keptRuns / RUNS) * neurons);
    const predictor = { ...predictorRequest(withPredictor, { input }, this.thresholds(setting)), flashFrom };
    const nlls = await windowNlls(model, predicting(addon, predictor), windows, context, onWindow);
    const judgement = { setting, ...this.#shares(setting), ...compare(exact, nlls, windows) };
    this.#judgements.set(key, judgement);
    return judgement;
  }

  /** Of all neurons, those that are computed and those of them that are fetched; of the magnitude, what is computed. */
  #shares({ keptRuns, memory, flash }: Setting) {
    const { curves } = this.#request;
    const shares = { computedShare: 0, fetchedShare: 0, magnitudeShare: 0 };
    for (const curve of curves) {
      for (let run = 0; run < RUNS; run++) {
        const { computed, magnitude } = curve.runs[run < keptRuns ? memory : flash][run];
        shares.computedShare += computed / curves.length;
        if (run >= keptRuns) shares.fetchedShare += computed / curves.length;
        shares.magnitudeShare += magnitude / curves.length;
      }
    }
    // Sums of many shares may miss 1 by a rounding.
    for (const key of Object.keys(shares) as (keyof typeof shares)[]) shares[key] = Math.min(1, shares[key]);
    return shares;
  }
}

/** For each window, minus the logarithm of its probability. The engine is opened and closed. */
export async function windowNlls(
  model: ModelDirectory,
  addon: NativeAddon,
  windows: readonly Window[],
  context: number,
  onWindow: () => void,
): Promise<number[]> {
  const engine = await Engine.open(model, { context, threads: 0, loadMode: 'resident' }, addon);
  try {
    const nlls: number[] = [];
    for (const window of windows) {
      const { nll_per_token, tokens } = await measurePerplexity(engine, [window], onWindow);
      nlls.push(nll_per_token * tokens);
    }
    return nlls;
  } finally {
    await engine.close();
  }
}

/** The perplexity of all windows. */
export function perplexityOf(nlls: readonly number[], windows: readonly Window[]): number {
  const tokens = windows.reduce((sum, window) => sum + window.targets.length, 0);
  return Math.exp(nlls.reduce((sum, nll) => sum + nll, 0) / tokens);
}

/** Paired by window: what windows differ in by themselves cancels out. */
function compare(exact: readonly number[], nlls: readonly number[], windows: readonly Window[]) {
  const lengths = windows.map((window) => window.targets.length);
  const tokens = lengths.reduce((sum, length) => sum + length, 0);
  const differences = nlls.map((nll, w) => nll - exact[w]);
  const mean = differences.reduce((sum, difference) => sum + difference, 0) / tokens;
  const squares = differences.reduce((sum, difference, w) => sum + (difference - mean * lengths[w]) ** 2, 0);
  const error = Math.sqrt((squares * windows.length) / (windows.length - 1)) / tokens;
  return { perplexity: perplexityOf(nlls, windows), growthMost: Math.exp(mean + error) - 1 };
}

/** An addon whose engines have a predictor that the model does not know of yet. */
function predicting(addon: NativeAddon, predictor: PredictorRequest): NativeAddon {
  return {
    ...addon,
    memoryNeeded: (request) => addon.memoryNeeded({ ...request, predictor }),
    openEngine: (request) => addon.openEngine({ ...request, predictor }),
  };
}

/** The last level: nothing is computed. */
export const LAST_LEVEL = LEVELS.length - 1;
