/** What a model is opened with under a budget of memory: where its neurons are, tokens at once, and whether it predicts. */
import { Pi2Error } from '../base/error.js';
import { rowBytes } from '../format/encoding.js';
import { type FiringRates, readFiringRates } from '../format/firing-rates.js';
import { rowsReadBytes } from '../format/layout.js';
import type { OperatingPoint, PredictorEntry } from '../format/manifest.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { clusterEnds } from '../plan/hot-ratio.js';
import type { NeuronCosts } from '../plan/keep-order.js';
import { budgetBytes, describeLimit } from '../plan/memory-limit.js';
import {
  BATCH_SIZE_MOST,
  leastMemory,
  MATRIX_BATCH_SIZE_MOST,
  type MemoryPlan,
  type MemoryQuestion,
  planMemory,
  type StreamShape,
  shareOfNeurons,
} from '../plan/memory-plan.js';
import { ablateShape, ablateStream, LLMFLASH_ABLATIONS } from './ablation.js';
import type { EngineMemory, EngineRequest, NativeAddon, StreamRequest } from './contract.js';
import type { EngineOptions } from './engine.js';
import { type ModelRequest, predictorRequest, streamRequest } from './engine-request.js';
import { unitRequest, type WantedUnit, wantedUnit } from './unit-request.js';

/** What this process takes beside the engine: garbage of JavaScript, logits, stacks, the unused ends of allocations. */
const RESERVE_BYTES = 32 * 1024 * 1024;
/** Of each neuron, where a profile tells how often it fires: its rate as read, as the engine is told it, and as it keeps it. */
const RATE_BYTES = 3 * Float32Array.BYTES_PER_ELEMENT;
/** The least that a message names is this much more: a process is not as large every time. */
const SLACK_BYTES = 8 * 1024 * 1024;

/** A request that keeps to the budget. */
export interface PlannedRequest {
  request: EngineRequest;
  /** Memory of the whole process that was to be kept to. With `min`, what that came to. */
  budgetBytes: number;
  /** The thresholds that the predictor works with; null when every neuron that fires is computed. */
  operatingPoint: OperatingPoint | null;
  /** The dense unit that was asked for. */
  wantedUnit: WantedUnit | null;
  /** Why the model's predictor is not used, though nobody asked for that. */
  notice: string | null;
}

/**
 * Decides what a model is opened with. Its predictor is used unless `exact` is asked for; it is left out, with a notice, where
 * memory is too little for it or for what its thresholds were chosen on. Throws `Pi2Error`: E_MEMORY when the budget is too
 * little even so, E_MODEL or E_IO when the profile cannot be read.
 */
export async function planRequest(
  model: ModelDirectory,
  base: ModelRequest,
  options: EngineOptions,
  addon: NativeAddon,
): Promise<PlannedRequest> {
  const { memory, loadMode = 'auto', engine = 'pi2' } = options;
  const isMapped = engine === 'mmap';
  if (isMapped) requireMappable(options);
  const ablated = [...(options.ablate ?? []), ...(engine === 'llmflash' ? LLMFLASH_ABLATIONS : [])];
  const exact = options.exact || isMapped || ablated.includes('predictor');
  const { predictor } = model.manifest;
  const policy: StreamRequest['policy'] = engine === 'llmflash' ? 'recency' : 'frequency';
  const how = { mode: loadMode === 'buffered' ? 'buffered' : 'direct', policy, ...ablateStream(ablated) } as const;
  // What is mapped is the page cache's: the budget is of what the process takes for itself.
  const mode = isMapped ? 'resident' : loadMode === 'direct' || loadMode === 'buffered' ? 'stream' : loadMode;
  const rateBytes = model.profilePath === null ? 0 : RATE_BYTES * base.expertOffsets.length * base.neuronCount;
  const processBytes = process.memoryUsage.rss() + RESERVE_BYTES + rateBytes;
  const hasMatrixUnit = !isMapped && (base.kernelSet ?? addon.cpu().kernelSets.at(-1)) === 'amx';
  const wanted = await wantedUnit(model, base, options);
  const requestOf = (
    batchSize: number,
    planned: StreamShape | undefined,
    point: OperatingPoint | null,
    firingRates?: Float32Array,
  ) => {
    const shape = planned && ablateShape(planned, ablated);
    return {
      ...base,
      ...(wanted === null ? {} : { unit: unitRequest(wanted, base, shape) }),
      ...(isMapped ? { mapped: true } : {}),
      ...(options.traceRecords === undefined ? {} : { traceRecords: options.traceRecords }),
      ...(shape === undefined
        ? {}
        : { stream: streamRequest(shape, { ...how, ...(firingRates ? { firingRates } : {}) }) }),
      ...(predictor === undefined || point === null ? {} : { predictor: predictorRequest(model, predictor, point) }),
      batchSize,
    };
  };
  let rates: Promise<FiringRates | null> | undefined;
  const readRates = () => {
    rates ??= readFiringRates(model);
    return rates;
  };
  const decide = async (entry?: PredictorEntry): Promise<Decision> => {
    const question: MemoryQuestion = {
      bankCount: base.expertOffsets.length,
      neuronCount: base.neuronCount,
      contextLength: base.contextLength,
      batchMost: hasMatrixUnit ? MATRIX_BATCH_SIZE_MOST : BATCH_SIZE_MOST,
      costs: neuronCosts(model),
      budgetBytes: budgetBytes(memory, processBytes),
      processBytes,
      mode,
      measure: (batchSize, shape) =>
        sumOfBytes(addon.memoryNeeded(requestOf(batchSize, shape, entry?.points[0] ?? null))),
      ...(wanted?.isForced && wanted.kind === 'host'
        ? { unitNeurons: clusterEnds(wanted.clusters, base.neuronCount) }
        : {}),
      ...(entry === undefined ? {} : { keptShares: entry.points.map((point) => point.kept_share) }),
      // Which experts are next nobody knows before attention.
      canPrefetch: entry !== undefined && base.expertCount === 1 && !ablated.includes('prefetch'),
    };
    if (memory?.kind === 'min') question.budgetBytes = leastMemory(question);
    let plan = planMemory(question);
    if (plan.kind === 'streamed') {
      const firingRates = await readRates();
      if (firingRates !== null) plan = planMemory({ ...question, firingRates });
    }
    return { plan, budgetBytes: question.budgetBytes };
  };

  /** How often neurons fire when their bank is asked, as the cache wants it. */
  const bankRates = async (): Promise<Float32Array | undefined> => {
    const known = policy === 'frequency' ? await readRates() : null;
    if (known === null) return undefined;
    const { neuronCount } = base;
    const all = new Float32Array(known.rates.length * neuronCount);
    for (const [bank, ofBank] of known.rates.entries()) {
      const routed = known.routed[bank] || 1;
      for (let i = 0; i < neuronCount; i++) all[bank * neuronCount + i] = Math.min(1, ofBank[i] / routed);
    }
    return all;
  };
  const planned = async (
    { plan, budgetBytes }: Decision,
    operatingPoint: OperatingPoint | null,
    notice: string | null,
  ) => {
    if (plan.kind === 'too_little') throw tooLittle(model, base.contextLength, options, budgetBytes, plan.leastBytes);
    const shape = plan.kind === 'streamed' ? plan.shape : undefined;
    const request = requestOf(plan.batchSize, shape, operatingPoint, shape && (await bankRates()));
    return { request, budgetBytes, operatingPoint, wantedUnit: wanted, notice };
  };
  if (predictor === undefined || exact) return planned(await decide(), null, null);
  const predicted = await decide(predictor);
  const startsFull = (await readRates()) !== null;
  const point = choosePoint(predictor, predicted.plan, base.neuronCount, startsFull);
  if (predicted.plan.kind === 'resident') return planned(predicted, point, null);
  const exactly = await decide();
  const why = whyExact(predictor, predicted.plan, exactly.plan, point);
  return why === null ? planned(predicted, point, null) : planned(exactly, null, why);
}

/** Refuses options that have no meaning where the kernel decides what is in memory. */
function requireMappable({ loadMode = 'auto' }: EngineOptions): void {
  if (loadMode === 'auto') return;
  const why = `--engine mmap cannot have --load-mode ${loadMode}: the kernel decides what is read`;
  throw new Pi2Error('E_USAGE', why, 'leave one out');
}

interface Decision {
  plan: MemoryPlan;
  budgetBytes: number;
}

/**
 * The operating point with the largest kept share that the plan has in memory; null if none has so few. What a point promises
 * was measured with that share of each expert in memory all the time, the hottest neurons. Where slots begin full, they start
 * with the next hottest and are given to others only for being used more, and places are shared out by rates: the same number
 * of places finds more than an even share of each bank does (docs/CACHE.md), so it is their number that counts. Else only hot
 * neurons do, of the bank that has the fewest.
 */
function choosePoint(
  { points }: PredictorEntry,
  plan: MemoryPlan,
  neuronCount: number,
  startsFull: boolean,
): OperatingPoint | null {
  const { hotNeurons, coldSlots } =
    plan.kind === 'streamed' ? plan.shape : { hotNeurons: [neuronCount], coldSlots: [0] };
  const sum = (counts: number[]) => counts.reduce((total, count) => total + count, 0);
  const kept = startsFull
    ? Math.floor((sum(hotNeurons) + sum(coldSlots)) / hotNeurons.length)
    : hotNeurons.reduce((least, count) => Math.min(least, count), neuronCount);
  return points.findLast(({ kept_share }) => shareOfNeurons(kept_share, neuronCount) <= kept) ?? null;
}

/** Why a model that does not fit with its predictor is not predicted, in words; null if it is. */
function whyExact(
  { points }: PredictorEntry,
  predicted: MemoryPlan,
  exactly: MemoryPlan,
  point: OperatingPoint | null,
): string | null {
  const because = (why: string) => `the predictor is left out, ${why}: every neuron that fires is computed`;
  if (predicted.kind === 'too_little') return because(`with it the model takes ${inMebibytes(predicted.leastBytes)}`);
  if (exactly.kind === 'resident') return because('without it everything is in memory');
  if (point !== null) return null;
  return because(`its thresholds want ${Math.ceil(100 * points[0].kept_share)} % of the neurons in memory`);
}

/** What neurons take in memory and cost to read, to rank them by: what they really take the addon says. */
function neuronCosts(model: ModelDirectory): NeuronCosts {
  const { layout, quantization, hyperparameters } = model.manifest;
  return {
    gateBytes: layout.part1_bytes,
    rowsBytes: (layout.matrices - 1) * rowBytes(quantization.ffn, hyperparameters.hidden_size),
    wholeReadBytes: layout.unit_bytes / layout.neurons_per_unit,
    rowsReadBytes: rowsReadBytes(layout),
  };
}

function sumOfBytes(memory: EngineMemory): number {
  return memory.weightBytes + memory.kvBytes + memory.scratchBytes + memory.unitBytes + memory.loadBytes;
}

function inMebibytes(bytes: number): string {
  return `${Math.ceil((bytes + SLACK_BYTES) / 2 ** 20)}M`;
}

/** Refuses, with the least that would do, what would end in swap or a kill. */
function tooLittle(
  model: ModelDirectory,
  contextLength: number,
  { loadMode, memory }: EngineOptions,
  budget: number,
  leastBytes: number,
): Pi2Error {
  const least = inMebibytes(leastBytes);
  const resident = loadMode === 'resident' ? ' with all weights in memory' : '';
  const streamHint = loadMode === 'resident' ? ', leave --load-mode out' : '';
  return new Pi2Error(
    'E_MEMORY',
    `${model.path}${resident} and a context of ${contextLength} take ${least}, ${describeLimit(memory, budget)}`,
    `the least that would do: --memory ${least}; or a smaller context with -c${streamHint}`,
  );
}
