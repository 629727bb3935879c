import { Engine, type EngineOptions } from '../engine/engine.js';
import type { ModelDirectory } from '../format/model-directory.js';
import { formatShare } from '../report/format.js';
import { log } from './output.js';

/** Opens a model for computing, and says on stderr whether neurons are predicted. Throws what `Engine.open` throws. */
export async function openEngine(model: ModelDirectory, options: EngineOptions): Promise<Engine> {
  const engine = await Engine.open(model, options);
  if (engine.notice !== null) log(engine.notice);
  if (engine.unit !== null && engine.unit.notice !== null) log(engine.unit.notice);
  const { predictor } = model.manifest;
  if (engine.operatingPoint !== null && predictor !== undefined) {
    const { kept_share, perplexity } = engine.operatingPoint;
    const grows = formatShare(perplexity / predictor.quality.exact_perplexity - 1);
    const kept = kept_share < 1 ? `, with ${formatShare(kept_share)} of the neurons in memory` : '';
    log(`neurons are predicted: measured, perplexity grows by ${grows}${kept}; --exact computes all that fire`);
  }
  return engine;
}
