import { join } from 'node:path';
import t from 'tap';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import { convert } from '../converter/convert.js';
import { Engine } from '../src/engine/engine.js';
import { QUANTIZATIONS } from '../src/format/manifest.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { Oracle } from './oracle/forward.js';
import type { Transform } from './oracle/load.js';
import { decodedWeights } from './support/decoded-weights.js';
import { type CheckpointOptions, makeCheckpoint } from './support/make-checkpoint.js';
import { Random } from './support/numbers.js';

const scratch = t.testdir({});
const ODD = { hidden: 192, heads: 4, kvHeads: 1, headDim: 20, neurons: 704, vocab: 301, shards: 3 };
const linear = { rope_scaling: { type: 'linear', factor: 4 } };
const llama3 = { rope_theta: 500000, rope_scaling: { rope_type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64 } };
const MODELS: Record<string, CheckpointOptions> = {
  'llama silu': { ...ODD, family: 'llama', config: llama3 },
  'llama relu': { ...ODD, family: 'llama', hiddenAct: 'relu', headDim: 48, kvHeads: 2, config: linear },
  'llama fatrelu': { ...ODD, family: 'llama', hiddenAct: 'fatrelu', headDim: 80, config: { attention_bias: true } },
  mistral: { ...ODD, family: 'mistral', config: { sliding_window: 7 } },
  qwen2: { ...ODD, family: 'qwen2', tied: true, headDim: 48 , heads: 4},
  qwen3: { ...ODD, family: 'qwen3', headDim: 80, hidden: 320, kvHeads: 4 },
  mixtral: { ...ODD, family: 'mixtral', neurons: 173, experts: 5 },
  bamboo: { ...ODD, family: 'bamboo', hidden: 600, headDim: 48 , predictors: true},
  turbosparse: { ...ODD, family: 'turbosparsemixtral', neurons: 240, experts: 6, expertsPerToken: 3, predictors: true },
  sparsellama: { ...ODD, family: 'sparsellama', heads: 3, headDim: 64 },
  opt: { ...ODD, family: 'opt', kvHeads: 4, headDim: 48 },
};

async function loadOracle(directory: string, transform?: Transform): Promise<Oracle> {
  const checkpoint = await Checkpoint.open(directory);
  try {
    return await Oracle.load(checkpoint, transform);
  } finally {
    await checkpoint.close();
  }
}

async function convertTo(checkpoint: string, quantization: (typeof QUANTIZATIONS)[number]): Promise<string> {
  const output = `${checkpoint}-${quantization}.pi2`;
  await convert({ checkpoint, output, quantization, maxMemoryBytes: 2 ** 31, force: false }, () => {}, new AbortController().signal);
  return output;
}

const random = new Random(3);
for (const [name, options] of Object.entries(MODELS)) {
  t.test(name, async (t) => {
    let s = performance.now();
    const lap = () => { const n = performance.now(); const r = (n - s).toFixed(0); s = n; return r; };
    const checkpoint = makeCheckpoint(join(scratch, name), options);
    const m1 = lap();
    const tokens = Array.from({ length: 40 }, () => Math.floor(random.uniform() * 301));
    const original = (await loadOracle(checkpoint)).logits(tokens);
    const m2 = lap();
    for (const q of QUANTIZATIONS) {
      lap();
      const dir = await convertTo(checkpoint, q);
      const m3 = lap();
      const decoded = (await loadOracle(checkpoint, await decodedWeights(dir))).logits(tokens);
      const m4 = lap();
      const engine = await Engine.open(await openModelDirectory(dir), { context: 0, threads: 2 });
      const out = new Float32Array(tokens.length * engine.vocabSize);
      await engine.step(Int32Array.from(tokens), 0, out, true);
      await engine.close();
      const m5 = lap();
      const flat = (a: Float32Array[]) => Float32Array.from(a.flatMap((x) => [...x]));
      const dev = (a: Float32Array) => Math.sqrt(a.reduce((x, y) => x + y * y, 0) / a.length);
      const diff = (a: Float32Array, b: Float32Array) => a.map((x, i) => x - b[i]);
      const max = (a: Float32Array) => a.reduce((x, y) => Math.max(x, Math.abs(y)), 0);
      const o = flat(original), d = flat(decoded);
      t.comment(`${q}: std ${dev(o).toFixed(2)} max vs original ${max(diff(out, o)).toFixed(5)} vs decoded ${max(diff(out, d)).toFixed(5)} rms vs decoded ${dev(diff(out, d)).toFixed(5)} weights rms ${dev(diff(o, d)).toFixed(5)} times make ${m1} oracle ${m2} conv ${m3} dec ${m4} eng ${m5}`);
    }
  });
}
