import { RUNS } from './curve.js';
import { type Judge, type Judgement, LAST_LEVEL, type Setting } from './judge.js';

/**
 * Of the budget, what thresholds of neurons in memory may take where some are on flash. A neuron that is fetched costs as much as
 * some thirty that are computed: nearly all of the budget is for leaving fetches out. Half of this, measured on the trained dReLU
 * model, computes 22 % in place of 18 % with half of the neurons in memory, and fetches no fewer: 2.7 %.
 */
const MEMORY_PART = 0.3;

/**
 * The cheapest settings that keep to a perplexity budget, one for each share of neurons in memory, ascending; null if none does.
 * Everything in memory: as few neurons as the budget allows. Else: thresholds of memory that take a part of it, and as few
 * fetches as the rest allows. More is left out from level to level, and perplexity grows: levels are found by halving.
 */
export async function chooseThresholds(judge: Pick<Judge, 'judge'>, budget: number): Promise<Judgement[] | null> {
  const all = (level: number): Setting => ({ keptRuns: RUNS, memory: level, flash: level });
  const fits = async (setting: Setting, most: number) => (await judge.judge(setting)).growthMost <= most;
  if (!(await fits(all(0), budget))) return null;
  const spares = (level: number) => fits(all(level), MEMORY_PART * budget);
  const memory = (await spares(0)) ? await lastThat(0, LAST_LEVEL, spares) : 0;
  const whole = await lastThat(memory, LAST_LEVEL, (level) => fits(all(level), budget));
  const points = [await judge.judge(all(whole))];
  let most = LAST_LEVEL;
  for (let keptRuns = RUNS - 1; keptRuns >= 0; keptRuns--) {
    const setting = (flash: number): Setting => ({ keptRuns, memory, flash });
    // The fewer are in memory, the more are left out by the same threshold.
    most = await lastThat(memory, most, (flash) => fits(setting(flash), budget));
    points.unshift(await judge.judge(setting(most)));
  }
  return points;
}

/** The last number up to `last` that passes; `first` does, and every number before one that does. */
async function lastThat(first: number, last: number, passes: (number: number) => Promise<boolean>): Promise<number> {
  let low = first;
  let high = last;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (await passes(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}
