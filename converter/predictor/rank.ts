/** Ranks that are tried: these shares of an expert's neurons, in whole sixteens. */
const SHARES = [1 / 32, 1 / 16, 1 / 8, 1 / 4];
const MULTIPLE = 16;

/** The ranks to try, ascending; none has more hidden units than the model's hidden size, but the least. */
export function rankCandidates(hiddenSize: number, neuronCount: number): number[] {
  const ranks = SHARES.map((share) => Math.max(MULTIPLE, Math.round((share * neuronCount) / MULTIPLE) * MULTIPLE));
  return [...new Set(ranks)].filter((rank, i) => i === 0 || rank <= hiddenSize);
}

/**
 * The candidate with the least `cost`. Costs fall to one minimum and rise again, since a larger predictor computes ever fewer
 * neurons less: nothing is tried beyond the first that costs more than the one before.
 */
export async function cheapestRank(ranks: readonly number[], cost: (rank: number) => Promise<number>): Promise<number> {
  let best = ranks[0];
  let least = Number.POSITIVE_INFINITY;
  for (const rank of ranks) {
    const own = ranks.length === 1 ? 0 : await cost(rank);
    if (own >= least) break;
    best = rank;
    least = own;
  }
  return best;
}
