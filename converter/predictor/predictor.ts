import { Pi2Error } from '../../src/base/error.js';
import { loadAddon } from '../../src/engine/addon.js';
import { Engine } from '../../src/engine/engine.js';
import { cutWindows, type Window } from '../../src/engine/evaluate.js';
import { expertCount } from '../../src/format/hyperparameters.js';
import {
  type Extent,
  type Manifest,
  type OperatingPoint,
  PREDICTOR_FILE,
  type PredictorEntry,
  type TensorEntry,
} from '../../src/format/manifest.js';
import { ModelDirectory } from '../../src/format/model-directory.js';
import { TextTokenizer } from '../../src/text/tokenizer.js';
import { cutText, PROFILE_CONTEXT } from '../activation/profiler.js';
import type { TensorSource } from '../checkpoint/tensor-source.js';
import type { Output } from '../write/output.js';
import { type CalibrationText, holdOut } from './calibration-text.js';
import type { PredictorChoice } from './choice.js';
import { collectSamples, measureResidual } from './collect.js';
import { type LayerCurve, RUNS } from './curve.js';
import { readDownNorms } from './down-norms.js';
import { type EncodedLayer, predictorBytes } from './encode.js';
import { Judge, type Judgement, perplexityOf, windowNlls } from './judge.js';
import { LayerFiles } from './layer-files.js';
import { judgeLayer, type LayerWorkshop, PREDICTOR_ENCODINGS, takeLayer, trainLayer } from './layers.js';
import { writePredictorFile } from './predictor-file.js';
import { SampleFile } from './samples.js';
import { chooseThresholds } from './thresholds.js';

/** Positions of the windows that perplexity is judged on: many short ones say how much it varies. */
const JUDGE_CONTEXT = 256;
/** The least that a standard error can be taken of. */
const JUDGE_WINDOWS_LEAST = 4;
/** A predictor is used if it reads so much less of the FFN than exact mode. */
const COST_SHARE_MOST = 0.9;
const NOTE_INTERVAL_MS = 10_000;
/** In the partial directory: samples and finished layers. */
const WORK = 'predictor.work';

export interface MakePredictorRequest {
  checkpoint: TensorSource;
  output: Output;
  /** Of the finished files, without a predictor. */
  manifest: Manifest;
  /** Heat order of each layer. */
  order: readonly Uint32Array[] | null;
  choice: PredictorChoice;
  /** The calibration text. */
  text: string;
  maxMemoryBytes: number;
  threads: number;
  note: (text: string) => void;
  signal: AbortSignal;
}

/** A predictor in `predictor.bin`, and what the manifest has to say of it. */
export interface MadePredictor {
  entry: PredictorEntry;
  extents: Extent[];
  tensors: TensorEntry[];
  /** Of the file. */
  bytes: number;
}

/** Why there is no predictor, with the numbers. */
export interface NoPredictor {
  reason: string;
}

/**
 * Makes the predictor of a model whose other files are finished, and writes `predictor.bin` into the partial directory. Trained
 * layers are kept in a directory beside it until then: a killed conversion does not train them again, but it collects samples
 * again. Resolves with the reason if a predictor is not worth having. Throws `E_TEXT`, `E_MEMORY`, `E_TENSOR`, `E_NOT_FINITE`,
 * `E_INTERRUPTED`, `E_IO`.
 */
export async function makePredictor(request: MakePredictorRequest): Promise<MadePredictor | NoPredictor> {
  const { output, manifest, checkpoint, choice } = request;
  const has = (file: string) => (checkpoint.textFiles.includes(file) ? output.partial(file) : null);
  const paths = { tokenizer: has('tokenizer.json'), config: has('tokenizer_config.json') };
  const model = new ModelDirectory(output.partialPath, manifest, paths);
  const text = await holdOut(model, request.text);
  const tokenizer = await TextTokenizer.open(paths);
  const context = Math.min(JUDGE_CONTEXT, manifest.hyperparameters.context_length);
  const windows = [...cutWindows(tokenizer.encodePlain(text.heldOut), context, tokenizer.bosTokenId)];
  if (windows.length < JUDGE_WINDOWS_LEAST) {
    const reason = `the text is too short to judge a predictor on: it leaves ${windows.length} windows of ${context} tokens`;
    if (!choice.isAsked) return { reason };
    throw new Pi2Error('E_TEXT', reason, 'give a longer --calibration text, or --predictor none');
  }
  const files = await LayerFiles.open(output.partial(WORK));
  const made = await new Maker(request, model, files, windows, context).make(text);
  await files.remove();
  return made;
}

/** The steps of making a predictor, on what they share. */
class Maker {
  readonly #request: MakePredictorRequest;
  readonly #model: ModelDirectory;
  readonly #files: LayerFiles;
  readonly #windows: readonly Window[];
  readonly #context: number;
  readonly #addon = loadAddon();
  #noted = performance.now();

  constructor(
    request: MakePredictorRequest,
    model: ModelDirectory,
    files: LayerFiles,
    windows: readonly Window[],
    context: number,
  ) {
    this.#request = request;
    this.#model = model;
    this.#files = files;
    this.#windows = windows;
    this.#context = context;
  }

  async make(text: CalibrationText): Promise<MadePredictor | NoPredictor> {
    const { choice, output } = this.#request;
    const { layers, curves, firedShare } = await this.#makeLayers(text);
    const { bytes, extents, tensors } = await writePredictorFile(output, layers);
    const exact = await windowNlls(this.#model, this.#addon, this.#windows, this.#context, () =>
      this.#progress('measuring the perplexity of exact mode'),
    );
    const input = choice.source === 'trained' ? 'ffn_norm' : 'residual';
    const judge = new Judge({
      ...{ addon: this.#addon, model: this.#model, curves, windows: this.#windows, context: this.#context, exact },
      ...{ input, withPredictor: this.#modelWith(extents, tensors) },
      onWindow: () => this.#progress(`calibrating thresholds, ${judge.judgements.length} settings measured`),
    });
    const points = await chooseThresholds(judge, choice.budget);
    const ranks = layers.map((layer) => layer.tensors[0].rows / expertCount(this.#model.manifest.hyperparameters));
    const reason = this.#whyNot(points, judge, ranks, firedShare);
    if (points === null || reason !== null) {
      await output.removeFile(PREDICTOR_FILE);
      return { reason: reason as string };
    }
    const entry: PredictorEntry = {
      ...{ source: choice.source, input, ...PREDICTOR_ENCODINGS, ranks },
      quality: {
        budget: choice.budget,
        text_sha256: text.heldOutSha256,
        tokens: this.#windows.reduce((sum, window) => sum + window.targets.length, 0),
        exact_perplexity: perplexityOf(exact, this.#windows),
      },
      points: points.map((point) => pointOf(point, judge)),
      curve: judge.judgements
        .map(measurementOf)
        .sort((a, b) => a.kept_share - b.kept_share || a.computed_share - b.computed_share),
    };
    return { entry, extents, tensors, bytes };
  }

  /** The model with more extents and tensors than its manifest knows of yet. */
  #modelWith(extents: readonly Extent[], tensors: readonly TensorEntry[]): ModelDirectory {
    const { path, manifest, tokenizerPaths } = this.#model;
    const grown = {
      ...manifest,
      extents: [...manifest.extents, ...extents],
      tensors: [...manifest.tensors, ...tensors],
    };
    return new ModelDirectory(path, grown, tokenizerPaths);
  }

  /** Trains every layer that is not there yet, or takes it from the checkpoint, and judges it on held-out samples. */
  async #makeLayers(text: CalibrationText) {
    const { choice, checkpoint, order, maxMemoryBytes, threads } = this.#request;
    const { hyperparameters, layout } = this.#model.manifest;
    const { layer_count } = hyperparameters;
    const experts = expertCount(hyperparameters);
    const done: (EncodedLayer | null)[] = [];
    for (let layer = 0; layer < layer_count; layer++) done.push(await this.#files.read(layer));
    const wantsTraining = choice.source === 'trained' && done.includes(null);
    const heldOut = await SampleFile.create(
      `${this.#files.directory}/held-out`,
      layer_count * experts,
      hyperparameters.hidden_size,
    );
    const training = await SampleFile.create(
      `${this.#files.directory}/training`,
      layer_count * experts,
      hyperparameters.hidden_size,
    );
    try {
      const lengths = await this.#collect(text, heldOut, wantsTraining ? training : null);
      const banksOf = (layer: number) => Array.from({ length: experts }, (_, expert) => layer * experts + expert);
      const magnitude = lengths.map((_, layer) => heldOut.meanMagnitude(banksOf(layer), hyperparameters.neuron_count));
      const worth = worthOf(magnitude, lengths);
      const shop: LayerWorkshop = {
        ...{ addon: this.#addon, hyperparameters, layout, heldOut, training, maxMemoryBytes, threads },
        ...{ banksOf, magnitude, worth },
        onProgress: (what) => this.#progress(what),
      };
      const layers: EncodedLayer[] = [];
      const curves: LayerCurve[] = [];
      for (let layer = 0; layer < layer_count; layer++) {
        const encoded =
          done[layer] ??
          (choice.source === 'trained'
            ? await trainLayer(shop, layer)
            : await takeLayer(shop, layer, checkpoint, order?.[layer] ?? null));
        if (done[layer] === null) await this.#files.write(layer, encoded);
        layers.push(encoded);
        curves.push(await judgeLayer(shop, layer, encoded));
      }
      return { layers, curves, firedShare: heldOut.firedShare(hyperparameters.neuron_count) };
    } finally {
      await heldOut.close();
      await training.close();
    }
  }

  /** Fills the files; resolves with the length of the residual stream in each layer. */
  async #collect(text: CalibrationText, heldOut: SampleFile, training: SampleFile | null): Promise<number[]> {
    const { choice, note } = this.#request;
    const { hyperparameters } = this.#model.manifest;
    const context = Math.min(PROFILE_CONTEXT, hyperparameters.context_length);
    const norms = await readDownNorms(this.#model, this.#addon);
    const engine = await Engine.open(this.#model, { context, threads: 0, loadMode: 'resident' });
    try {
      const collect = async (part: string, file: SampleFile) => {
        const { windows } = await cutText(this.#model, part, context, 0);
        const total = windows.reduce((sum, window) => sum + window.length, 0);
        const what = file === training ? 'to train on' : 'to judge on';
        note(`predictor: collecting samples of ${total} tokens ${what}`);
        const onStep = (tokens: number) => this.#progress(`${tokens} of ${total} tokens`);
        const input = choice.source === 'trained' ? 'ffn_norm' : 'residual';
        const done = await collectSamples({ engine, hyperparameters, windows, input, norms, file, onStep });
        if (done < total) note(`predictor: ${done} of ${total} tokens are taken, the file of samples is large enough`);
      };
      await collect(text.heldOut, heldOut);
      if (training) await collect(text.training, training);
      return await measureResidual(
        engine,
        hyperparameters,
        (await cutText(this.#model, text.heldOut, context, 0)).windows,
      );
    } finally {
      await engine.close();
    }
  }

  /** Why the predictor is not used, or null: no setting keeps to the budget, or the cheapest is hardly cheaper than exact mode. */
  #whyNot(points: Judgement[] | null, judge: Judge, ranks: number[], firedShare: number): string | null {
    const { choice } = this.#request;
    const { hyperparameters: h, layout } = this.#model.manifest;
    const percent = (share: number) => `${(100 * share).toFixed(1)} %`;
    if (points === null) {
      const growth = percent(judge.judgements[0].growthMost);
      return `even computing all that ever fired, perplexity may grow by ${growth}, more than ${percent(choice.budget)}`;
    }
    const whole = points[points.length - 1];
    const neurons = h.neuron_count * (layout.part1_bytes + layout.part2_bytes);
    const shape = { hiddenSize: h.hidden_size, neuronCount: h.neuron_count };
    const bytes = ranks.reduce((sum, rank) => sum + predictorBytes({ ...shape, rank }, PREDICTOR_ENCODINGS), 0);
    const own = bytes / ranks.length / neurons;
    const predicted = own + whole.computedShare;
    const exact = (1 + (layout.matrices - 1) * firedShare) / layout.matrices;
    if (predicted <= COST_SHARE_MOST * exact) return null;
    return (
      `within a budget of ${percent(choice.budget)} it would read ${percent(own)} of the FFN for itself and compute ` +
      `${percent(whole.computedShare)}, exact mode reads ${percent(exact)}`
    );
  }

  /** Notes now and then what is being done. Throws `E_INTERRUPTED`. */
  #progress(what: string): void {
    const { signal, note } = this.#request;
    if (signal.aborted) {
      throw new Pi2Error(
        'E_INTERRUPTED',
        'stopped while the predictor was made',
        'the same command continues where this one stopped',
      );
    }
    if (performance.now() - this.#noted < NOTE_INTERVAL_MS) return;
    this.#noted = performance.now();
    note(`predictor: ${what}`);
  }
}

/**
 * Magnitude of each layer that is worth the same: what is added to a long residual stream changes it less. Measured on the
 * trained dReLU model (lengths from 8 in layer 0 to 147 in layer 7), all of rank 64, by the power of the length: growth of
 * perplexity on 8146 tokens of unseen text where 12 % and 16 % of the neurons are computed.
 *
 * | power                            | 12 %     | 16 %     |
 * | the same share of each layer     | + 0.99 % | + 0.47 % |
 * | 0                                | + 1.02 % | + 0.51 % |
 * | 0.25                             | + 0.75 % | + 0.30 % |
 * | 0.5                              | + 0.68 % | + 0.27 % |
 * | 0.75                             | + 0.72 % | + 0.27 % |
 * | 1                                | + 0.81 % | + 0.29 % |
 * | 1.25                             | + 0.89 % | + 0.36 % |
 */
function worthOf(magnitude: readonly number[], lengths: readonly number[]): number[] {
  const mean = magnitude.reduce((sum, own, layer) => sum + own / Math.sqrt(lengths[layer]), 0) / magnitude.length;
  return lengths.map((length) => mean * Math.sqrt(length));
}

function measurementOf({ setting, ...judgement }: Judgement): PredictorEntry['curve'][number] {
  return {
    kept_share: setting.keptRuns / RUNS,
    computed_share: judgement.computedShare,
    fetched_share: judgement.fetchedShare,
    magnitude_share: judgement.magnitudeShare,
    perplexity: judgement.perplexity,
  };
}

function pointOf(judgement: Judgement, judge: Judge): OperatingPoint {
  return { ...measurementOf(judgement), ...judge.thresholds(judgement.setting) };
}
