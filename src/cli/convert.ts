import { Command, Option } from 'commander';
import { type ConvertEvent, convert } from '../../converter/convert.js';
import { PREDICTOR_MODES, type PredictorMode, QUALITIES, type Quality } from '../../converter/predictor/choice.js';
import type { ConvertResult } from '../../converter/result.js';
import { formatBytes, parseBytes } from '../base/bytes.js';
import { formatDuration } from '../base/duration.js';
import { Pi2Error } from '../base/error.js';
import { QUANTIZATIONS, type QuantizationName } from '../format/manifest.js';
import { describePredictor, predictorFacts } from '../report/predictor-table.js';
import { describeSummary, profileSummary } from '../report/profile-table.js';
import type { ProgressView } from '../ui/progress-view.js';
import { withInterrupt, writeJson } from './output.js';

interface Options {
  output?: string;
  quant: QuantizationName;
  maxRam: number;
  profile?: string;
  calibration?: string;
  predictor: PredictorMode;
  quality: Quality;
  npu?: boolean;
  force?: boolean;
  json?: boolean;
}

type ProgressEvent = Extract<ConvertEvent, { type: 'progress' }>;

const DEFAULT_MAX_RAM = '2G';
/** Between two lines of progress on something that is not a terminal. */
const LINE_INTERVAL_MS = 5000;
const JSON_INTERVAL_MS = 1000;
const VIEW_INTERVAL_MS = 100;
const LEAST_VIEW_COLUMNS = 40;
/** Names shown of the tensors that were left out. */
const IGNORED_SHOWN = 3;

/** `powerinfer2 convert`: from a HuggingFace checkpoint to a model directory. */
export function convertCommand(): Command {
  return new Command('convert')
    .description('convert a HuggingFace checkpoint into a model directory NAME.pi2')
    .argument('<checkpoint>', 'directory with config.json and *.safetensors')
    .option(
      '-o, --output <NAME.pi2>',
      'model directory to make (default: the name of the checkpoint, in this directory)',
    )
    .addOption(
      new Option('--quant <kind>', 'how weights are stored; f16 keeps them, q4 is a quarter of that')
        .choices(QUANTIZATIONS)
        .default('q4'),
    )
    .addOption(
      new Option('--max-ram <size>', 'most memory the conversion may take, e.g. 512M; the result is the same')
        .argParser(parseBytes)
        .default(parseBytes(DEFAULT_MAX_RAM), DEFAULT_MAX_RAM),
    )
    .option('--profile <FILE>', 'sort neurons by an activation profile of this checkpoint, the hottest first')
    .option(
      '--calibration <TEXT>',
      'the same, making the profile on this UTF-8 text first; the model must fit --max-ram',
    )
    .addOption(
      new Option('--predictor <source>', 'which neurons to compute: guessed as the checkpoint does, or trained, or not')
        .choices(PREDICTOR_MODES)
        .default('auto'),
    )
    .addOption(
      new Option('--quality <most>', 'how much perplexity a predictor may cost on held-out text')
        .choices(Object.keys(QUALITIES))
        .default('1%'),
    )
    .option('--npu', 'also make graphs and int4 weights for a dense unit (q4 only); npu/ is as large as the neurons')
    .option('--force', 'replace an existing model, once the new one is whole')
    .option('--json', 'print progress and result as JSON, one object a line, on stdout')
    .addHelpText(
      'after',
      `
Reads safetensors (one file or shards; bf16, f16, f32) of llama, mistral, qwen2, qwen3, mixtral, bamboo,
turbosparsemixtral, sparsellama and opt. Nothing is executed, nothing is written into the checkpoint.

While it works the model is called NAME.pi2.partial. Stopped by Ctrl-C, a full disk or a crash, the same command
continues where it stopped, and the result is the same byte for byte.

In heat order (--profile, --calibration) the model says the same, but the neurons it needs most lie together.
The profile becomes a part of it. While one is made, NAME.pi2.calibration holds the model in checkpoint order.

A predictor guesses which neurons contribute, so that the gates of the others are not computed either. auto takes
that of the checkpoint if there is one, else trains one, for ReLU models with a --calibration text; thresholds are
judged on the end of the text, which is not trained on. If it saves nothing within --quality, there is none.

--npu adds npu/: a graph for each number of tokens and of clusters (a few KiB), and int4 weights as ONNX
Runtime and Snapdragon NPUs take them. Both sides have the same numbers, so 32 neurons share scales of Down.

Examples:
  powerinfer2 convert ./TurboSparse-Mistral-Instruct
  powerinfer2 convert ./Bamboo-base-v0_1 -o bamboo.pi2 --calibration calibration.txt --max-ram 6G
  powerinfer2 convert ./Llama-3.2-1B -o llama.pi2 --quant q8 --max-ram 512M`,
    )
    .action(async (checkpoint: string, options: Options) => {
      await runConvert(checkpoint, options);
    });
}

async function runConvert(checkpoint: string, options: Options): Promise<void> {
  const log = options.json ? new JsonLog() : canShowView() ? await TerminalLog.open() : new LineLog();
  // Past a limit on file sizes a write fails and sends this signal, which Ink's exit hook would take for the end.
  process.on('SIGXFSZ', ignore);
  try {
    if (options.profile !== undefined && options.calibration !== undefined) {
      throw new Pi2Error('E_USAGE', '--profile and --calibration are given both', 'one of them makes the heat order');
    }
    const request = {
      checkpoint,
      output: options.output,
      quantization: options.quant,
      maxMemoryBytes: options.maxRam,
      force: options.force ?? false,
      profile: options.profile,
      calibration: options.calibration,
      predictor: options.predictor,
      quality: options.quality,
      npu: options.npu ?? false,
    };
    const onEvent = (event: ConvertEvent) => (event.type === 'note' ? log.note(event.text) : log.progress(event));
    const result = await withInterrupt((signal) => convert(request, onEvent, signal));
    log.close();
    if (options.json) await writeJson(resultObject(result));
    else process.stderr.write(`${describe(result).join('\n')}\n`);
  } finally {
    log.close();
    process.off('SIGXFSZ', ignore);
  }
}

/** A terminal with room for a line; one that says it has no rows (a pty that nobody sized) would be cleared at each frame. */
function canShowView(): boolean {
  return process.stderr.isTTY === true && process.stderr.rows > 2 && process.stderr.columns >= LEAST_VIEW_COLUMNS;
}

function ignore(): void {}

/** Tells of a conversion that runs. `close` may be called twice. */
interface Log {
  note(text: string): void;
  progress(event: ProgressEvent): void;
  close(): void;
}

/** Lets an event through when enough time has passed since the last, or when it is the last of all bytes. */
class Throttle {
  readonly #interval: number;
  #last = Number.NEGATIVE_INFINITY;
  #wasComplete = false;

  constructor(intervalMs: number) {
    this.#interval = intervalMs;
  }

  lets(event: ProgressEvent): boolean {
    const complete = event.bytesDone === event.bytesTotal;
    const isDue = performance.now() - this.#last >= this.#interval || (complete && !this.#wasComplete);
    if (isDue) {
      this.#last = performance.now();
      this.#wasComplete = complete;
    }
    return isDue;
  }
}

class TerminalLog implements Log {
  readonly #view: ProgressView;
  readonly #throttle = new Throttle(VIEW_INTERVAL_MS);
  #closed = false;

  private constructor(view: ProgressView) {
    this.#view = view;
  }

  /** Ink takes half a second to import: only a terminal pays for it. */
  static async open(): Promise<TerminalLog> {
    const { showProgress } = await import('../ui/progress-view.js');
    return new TerminalLog(showProgress());
  }

  note(text: string): void {
    this.#view.note(text);
  }

  progress(event: ProgressEvent): void {
    if (this.#throttle.lets(event)) this.#view.update(event);
  }

  close(): void {
    if (!this.#closed) this.#view.close();
    this.#closed = true;
  }
}

class LineLog implements Log {
  readonly #throttle = new Throttle(LINE_INTERVAL_MS);

  note(text: string): void {
    process.stderr.write(`${text}\n`);
  }

  progress(event: ProgressEvent): void {
    if (!this.#throttle.lets(event)) return;
    const percent = Math.floor((100 * event.bytesDone) / event.bytesTotal);
    const left = event.secondsLeft === null ? '' : `, ${formatDuration(event.secondsLeft)} left`;
    process.stderr.write(
      `${percent} %, ${formatBytes(event.bytesDone)} of ${formatBytes(event.bytesTotal)}, ${formatBytes(
        Math.round(event.bytesPerSecond),
      )}/s${left}: ${event.step}\n`,
    );
  }

  close(): void {}
}

class JsonLog implements Log {
  readonly #throttle = new Throttle(JSON_INTERVAL_MS);

  note(text: string): void {
    printJson({ type: 'note', text });
  }

  progress(event: ProgressEvent): void {
    if (!this.#throttle.lets(event)) return;
    printJson({
      type: 'progress',
      step: event.step,
      bytes_done: event.bytesDone,
      bytes_total: event.bytesTotal,
      bytes_per_second: Math.round(event.bytesPerSecond),
      seconds_left: event.secondsLeft,
    });
  }

  close(): void {}
}

/** Progress that nobody reads any more is no reason to stop. */
function printJson(value: object): void {
  writeJson(value).catch(ignore);
}

function resultObject(result: ConvertResult): object {
  return {
    type: 'result',
    output: result.output,
    quantization: result.quantization,
    bytes: result.bytes,
    resident_bytes: result.residentBytes,
    neurons_bytes: result.neuronsBytes,
    npu_bytes: result.npuBytes,
    bits_per_weight: result.bitsPerWeight,
    seconds: result.seconds,
    source_bytes: result.sourceBytes,
    source_bytes_per_second: Math.round(result.sourceBytesPerSecond),
    peak_memory_bytes: result.peakMemoryBytes,
    ignored: result.ignored,
    has_tokenizer: result.hasTokenizer,
    resumed: result.resumed,
    profile: result.profile && profileSummary(result.profile),
    predictor: result.predictor && { bytes: result.predictor.bytes, ...predictorFacts(result.predictor) },
    no_predictor: result.noPredictor,
  };
}

function describe(result: ConvertResult): string[] {
  const { bitsPerWeight: bits } = result;
  const head = bits.head === null ? 'the embedding is the head' : `head ${bits.head}`;
  const unit = result.npuBytes > 0 ? `, ${formatBytes(result.npuBytes)} for a dense unit` : '';
  const rate = formatBytes(Math.round(result.sourceBytesPerSecond));
  const lines = [
    `made ${result.output}: ${formatBytes(result.bytes)}, ${formatBytes(result.residentBytes)} resident and ${formatBytes(result.neuronsBytes)} neurons${unit}`,
    `bits per weight: ffn ${bits.ffn}, attention ${bits.attention}, embedding ${bits.embedding}, ${head}; all ${bits.total}`,
    `took ${formatDuration(result.seconds)} (${rate}/s of the checkpoint), peak memory ${formatBytes(result.peakMemoryBytes)}`,
  ];
  if (result.profile) lines.push(`neurons sorted by heat: ${describeSummary(profileSummary(result.profile))}`);
  if (result.predictor) lines.push(describePredictor(result.predictor, result.predictor.bytes));
  if (result.noPredictor !== null) lines.push(`no predictor: ${result.noPredictor}`);
  if (result.ignored.length > 0) {
    const more = result.ignored.length > IGNORED_SHOWN ? ', …' : '';
    const names = result.ignored.slice(0, IGNORED_SHOWN).join(', ');
    lines.push(`left out ${result.ignored.length} tensors that are not needed: ${names}${more}`);
  }
  lines.push(
    result.hasTokenizer
      ? 'the tokenizer was copied'
      : 'the checkpoint has no tokenizer.json: give the model tokens (--tokens), not text',
  );
  return lines;
}
