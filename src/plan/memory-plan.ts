/**
 * Which neurons are kept in memory. A bank is one expert of one layer; its neurons are in heat order.
 *
 *   gates  exact mode needs every gate for every token, so they come first: all of them, or as many chunks in each bank as fit
 *   slots  what is left holds up and down rows: of the neurons that fire nearly always (hot), the others come and go (cold)
 *
 * The planner knows nothing of bytes: `measure` asks the engine, which is the one place that does.
 */

/** Gates are kept in whole chunks of this many neurons. */
export const CHUNK_NEURONS = 128;
/** Reads on their way and being computed, two halves of 2 MiB: more is better spent on neurons. */
const STAGING_BYTES_MOST = 4 * 1024 * 1024;
/** Staging is this share of what remains above the least, while that is little. */
const STAGING_SHARE = 1 / 16;
/** A neuron that fires for this share of tokens is kept for good: a slot that changes hands would serve less. */
const HOT_RATE = 0.5;

/** The part of a `StreamRequest` that the planner decides; one number a bank. */
export interface StreamShape {
  residentGates: number[];
  hotNeurons: number[];
  coldSlots: number[];
  stagingBytes: number;
}

export interface MemoryQuestion {
  bankCount: number;
  /** Neurons of a bank. */
  neuronCount: number;
  /** Memory of the whole process. */
  budgetBytes: number;
  /** What is not the engine's: the process as it is before opening, and a reserve for what it will do. */
  processBytes: number;
  /** `auto` keeps everything resident if it fits, `resident` wants just that, `stream` never does. */
  mode: 'auto' | 'resident' | 'stream';
  /** Bytes of an engine with this shape, or with every neuron resident. Must not shrink when a number of the shape grows. */
  measure(shape?: StreamShape): number;
  /** For each bank, the share of tokens that each neuron fires for, falling; without it all neurons are taken to be alike. */
  firingRates?: readonly (readonly number[])[];
}

/** `bytes` is the process and the engine together; never more than the budget, unless it is too little. */
export type MemoryPlan =
  | { kind: 'resident'; bytes: number }
  | { kind: 'streamed'; bytes: number; shape: StreamShape }
  | { kind: 'too_little'; leastBytes: number };

/** Decides what is kept. Pure; with a larger budget no bank gets fewer gates and no fewer neurons are kept in all. */
export function planMemory(question: MemoryQuestion): MemoryPlan {
  const { mode, budgetBytes, processBytes } = question;
  const resident = processBytes + question.measure();
  if (mode !== 'stream' && resident <= budgetBytes) return { kind: 'resident', bytes: resident };
  const least = mode === 'resident' ? resident : leastMemory(question);
  if (mode === 'resident' || least > budgetBytes) return { kind: 'too_little', leastBytes: least };
  const forStaging = Math.min(STAGING_BYTES_MOST, STAGING_SHARE * (budgetBytes - least));
  const total = (shape: StreamShape) => processBytes + question.measure(shape);
  const fits = (shape: StreamShape) => total(shape) <= budgetBytes - forStaging;
  const { bankCount, neuronCount } = question;
  const gates = (chunks: number) => gatesShape(question, chunks);
  const chunks = mostThatFit(bankCount * Math.ceil(neuronCount / CHUNK_NEURONS), (count) => fits(gates(count)));
  let shape = gates(chunks);
  // Rows are kept by neuron only where the gate says which are wanted: banks must have all their gates first.
  if (shape.residentGates.every((count) => count === neuronCount)) {
    const shares = shareSlots(question);
    const withSlots = (slots: number) => ({ ...shape, ...shares(slots) });
    shape = withSlots(mostThatFit(bankCount * neuronCount, (slots) => fits(withSlots(slots))));
  }
  const withStaging = (stagingBytes: number) => ({ ...shape, stagingBytes });
  shape = withStaging(mostThatFit(STAGING_BYTES_MOST, (bytes) => total(withStaging(bytes)) <= budgetBytes));
  return { kind: 'streamed', bytes: total(shape), shape };
}

/** The least memory that the model can run in, of the whole process. */
export function leastMemory(question: MemoryQuestion): number {
  const { mode, processBytes, measure } = question;
  const resident = processBytes + measure();
  if (mode === 'resident') return resident;
  const streamed = processBytes + measure(gatesShape(question, 0));
  return mode === 'auto' ? Math.min(resident, streamed) : streamed;
}

/** The largest number up to `most` that fits; 0 always does. */
function mostThatFit(most: number, fits: (count: number) => boolean): number {
  let low = 0;
  let high = most;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** `total` spread evenly over banks, the first ones getting what is left over. */
function evenly(total: number, bankCount: number): number[] {
  return Array.from({ length: bankCount }, (_, bank) => Math.floor((total + bankCount - 1 - bank) / bankCount));
}

function gatesShape({ bankCount, neuronCount }: MemoryQuestion, chunks: number): StreamShape {
  const zeros = new Array<number>(bankCount).fill(0);
  const residentGates = evenly(chunks, bankCount).map((count) => Math.min(count * CHUNK_NEURONS, neuronCount));
  return { residentGates, hotNeurons: zeros, coldSlots: zeros, stagingBytes: 0 };
}

/**
 * How a number of kept neurons is shared out. With rates, the neurons that fire most over all banks are counted, and each bank
 * gets as many places as it has among them; those that fire for half of the tokens or more are hot.
 */
function shareSlots(question: MemoryQuestion): (slots: number) => Pick<StreamShape, 'hotNeurons' | 'coldSlots'> {
  const { bankCount, firingRates } = question;
  if (firingRates === undefined) {
    return (slots) => ({ hotNeurons: new Array<number>(bankCount).fill(0), coldSlots: evenly(slots, bankCount) });
  }
  const ranked = firingRates.flatMap((rates, bank) => rates.map((rate) => ({ bank, rate })));
  ranked.sort((a, b) => b.rate - a.rate);
  return (slots) => {
    const hotNeurons = new Array<number>(bankCount).fill(0);
    const coldSlots = new Array<number>(bankCount).fill(0);
    for (const { bank, rate } of ranked.slice(0, slots)) (rate >= HOT_RATE ? hotNeurons : coldSlots)[bank]++;
    return { hotNeurons, coldSlots };
  };
}
