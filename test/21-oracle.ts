import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import t, { type Test } from 'tap';
import { Checkpoint } from '../converter/checkpoint/checkpoint.js';
import type { Hyperparameters } from '../src/format/hyperparameters.js';
import { indexOfMaximum, layerNorm, Oracle, rmsNorm, rotaryFrequencies, rotate, route } from './oracle/forward.js';
import type { Transform } from './oracle/load.js';
import { type CheckpointOptions, makeCheckpoint } from './support/make-checkpoint.js';
import { encode } from './support/numbers.js';
import { safetensors } from './support/safetensors.js';
import { needsShared, SHARED_MODEL_NAMES, sharedModel } from './support/shared.js';

async function load(directory: string, transform?: Transform): Promise<Oracle> {
  const checkpoint = await Checkpoint.open(directory);
  try {
    return await Oracle.load(checkpoint, transform);
  } finally {
    await checkpoint.close();
  }
}

/** An oracle over a random checkpoint. */
const random = (t: Test, options: CheckpointOptions, transform?: Transform) =>
  load(makeCheckpoint(join(t.testdir(), 'checkpoint'), options), transform);

function greatestDifference(a: Float32Array, b: Float32Array): number {
  if (a.length !== b.length) throw new Error(`${a.length} numbers against ${b.length}`);
  return a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i])), 0);
}

const tokens = [5, 17, 3, 99, 42, 8, 77, 120, 64, 1, 30, 11];

t.test('two tokens through one layer, worked out by hand', async (t) => {
  const directory = join(t.testdir(), 'hand');
  mkdirSync(directory);
  const config = {
    model_type: 'llama',
    hidden_act: 'silu',
    hidden_size: 2,
    intermediate_size: 1,
    num_hidden_layers: 1,
    num_attention_heads: 1,
    vocab_size: 2,
    max_position_embeddings: 4,
    rms_norm_eps: 1e-12,
  };
  writeFileSync(join(directory, 'config.json'), JSON.stringify(config));
  const tensor = (name: string, shape: number[], values: number[]) => {
    return { name, dtype: 'F32', shape, bytes: encode(Float32Array.from(values), 'F32') };
  };
  const identity = [1, 0, 0, 1];
  const tensors = [
    tensor('model.embed_tokens.weight', [2, 2], [3, 4, 4, -3]),
    tensor('model.layers.0.input_layernorm.weight', [2], [1, 1]),
    ...['q', 'k', 'v', 'o'].map((name) => tensor(`model.layers.0.self_attn.${name}_proj.weight`, [2, 2], identity)),
    tensor('model.layers.0.post_attention_layernorm.weight', [2], [1, 1]),
    tensor('model.layers.0.mlp.gate_proj.weight', [1, 2], [1, 0]),
    tensor('model.layers.0.mlp.up_proj.weight', [1, 2], [0, 1]),
    tensor('model.layers.0.mlp.down_proj.weight', [2, 1], [1, -1]),
    tensor('model.norm.weight', [2], [1, 1]),
    tensor('lm_head.weight', [2, 2], identity),
  ];
  writeFileSync(join(directory, 'model.safetensors'), safetensors(tensors));
  const [first, second] = (await load(directory)).logits([0, 1]);
  // Token 0 sees itself alone: attention gives back its norm (0.8485, 1.1314), the FFN adds silu(g) * u to x and takes it from y.
  t.ok(greatestDifference(first, Float32Array.of(1.006842, 0.9931109)) < 1e-6);
  t.ok(greatestDifference(second, Float32Array.of(1.2498142, -0.6617887)) < 1e-6);
});

t.test('rotary frequencies', async (t) => {
  const position = { kind: 'rope', theta: 500000, scaling: null } as const;
  const frequencies = (scaling: Extract<Hyperparameters['position'], { kind: 'rope' }>['scaling']) =>
    rotaryFrequencies({ head_dim: 128, position: { ...position, scaling } } as Hyperparameters);
  const near = (found: number, expected: number) =>
    t.ok(Math.abs(found / expected - 1) < 1e-12, `${found} ${expected}`);

  const plain = frequencies(null);
  const linear = frequencies({ kind: 'linear', factor: 4 });
  for (const i of [0, 20, 63]) near(linear[i], plain[i] / 4);

  // Llama 3.1: the values that its published formula gives with these numbers.
  const llama3 = frequencies({
    kind: 'llama3',
    factor: 8,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_context_length: 8192,
  });
  near(llama3[0], 1);
  near(llama3[20], 0.016560440080994446);
  near(llama3[28], 0.0032114459947525913);
  near(llama3[30], 0.0013718935677611381);
  near(llama3[32], 0.0005248461609929547);
  near(llama3[34], 0.00017850781276799638);
  near(llama3[40], 3.428102195952591e-5);
  near(llama3[63], 3.068925988914511e-7);
});

t.test('a rotation keeps length, and scores depend on the distance alone', async (t) => {
  const frequencies = Float64Array.of(1, 0.1);
  const score = (queryPosition: number, keyPosition: number) => {
    const query = Float32Array.of(1, 2, 3, 4);
    const key = Float32Array.of(-2, 1, 0.5, 3);
    rotate(query, queryPosition, frequencies);
    rotate(key, keyPosition, frequencies);
    return query.reduce((sum, value, i) => sum + value * key[i], 0);
  };
  t.ok(Math.abs(score(7, 4) - score(103, 100)) < 1e-5);
  t.ok(Math.abs(score(7, 4) - score(7, 5)) > 0.1);
  const quarter = Float32Array.of(1, 0);
  rotate(quarter, 1, Float64Array.of(Math.PI / 2));
  t.ok(greatestDifference(quarter, Float32Array.of(0, 1)) < 1e-7, 'from the first half of the head to the second');
});

t.test('norms', async (t) => {
  const x = Float32Array.of(1, 2, 3, 4);
  const ones = new Float32Array(4).fill(1);
  const layer = layerNorm(x, ones, Float32Array.of(0, 0, 0, 10), 0);
  t.ok(greatestDifference(layer, Float32Array.of(-1.3416408, -0.4472136, 0.4472136, 11.3416408)) < 1e-5);
  const rms = rmsNorm(x, Float32Array.of(1, 1, 1, 2), 0);
  t.ok(greatestDifference(rms, Float32Array.of(0.3651484, 0.7302967, 1.0954452, 2.921187)) < 1e-6);
  t.ok(
    rmsNorm(new Float32Array(4), ones, 1e-5).every((value) => value === 0),
    'epsilon keeps zero from dividing by zero',
  );
});

t.test('routing: the best experts, softmax over them alone, the first of equals', async (t) => {
  const { experts, weights } = route(Float32Array.of(0, Math.log(3), 5, 0, Math.log(3) + 5), 2);
  t.same(experts, [4, 2]);
  t.ok(Math.abs(weights[0] - 0.75) < 1e-6 && Math.abs(weights[1] - 0.25) < 1e-6);
  t.same(route(Float32Array.of(1, 1, 1), 2), { experts: [0, 1], weights: [0.5, 0.5] });
});

t.test('a sliding window hides what lies before it', async (t) => {
  const options = { family: 'mistral', layers: 1, config: { sliding_window: 4 } } as const;
  const oracle = await random(t, options);
  const windowed = oracle.logits(tokens);
  const alone = oracle.logits(tokens.slice(-4));
  t.ok(greatestDifference(windowed[11], alone[3]) < 1e-4, 'one layer sees the last 4 tokens and nothing else');
  t.ok(greatestDifference(windowed[11], oracle.logits(tokens.slice(-3))[2]) > 1e-2, 'and no fewer');
  const full = (await random(t, { ...options, config: { sliding_window: null } })).logits(tokens);
  t.same(full[3], windowed[3], 'no difference while all fits in');
  t.ok(greatestDifference(full[4], windowed[4]) > 1e-2);
});

t.test('qwen windows hold from max_window_layers on', async (t) => {
  const config = { use_sliding_window: true, sliding_window: 3, max_window_layers: 1 };
  const upper = (await random(t, { family: 'qwen2', config })).logits(tokens)[11];
  const none = (await random(t, { family: 'qwen2', config: { ...config, max_window_layers: 2 } })).logits(tokens)[11];
  const both = (await random(t, { family: 'qwen2', config: { ...config, max_window_layers: 0 } })).logits(tokens)[11];
  for (const [a, b] of [
    [upper, none],
    [upper, both],
    [none, both],
  ]) {
    t.ok(greatestDifference(a, b) > 1e-2);
  }
});

t.test('q and k norms make the scale of projections irrelevant', async (t) => {
  const options = { family: 'qwen3', headDim: 64 } as const;
  const plain = (await random(t, options)).logits(tokens)[11];
  const scaled = await random(t, options, (name, { values }) =>
    /\.[qk]$/.test(name) ? values.map((w) => 5 * w) : values,
  );
  t.ok(greatestDifference(plain, scaled.logits(tokens)[11]) < 1e-2);
  const normed = await random(t, options, (name, { values }) =>
    /\.q_norm$/.test(name) ? values.map((w) => 5 * w) : values,
  );
  t.ok(greatestDifference(plain, normed.logits(tokens)[11]) > 1e-1);
});

t.test('every bias counts', async (t) => {
  const shapes: CheckpointOptions[] = [
    { family: 'qwen2' },
    { family: 'llama', config: { attention_bias: true } },
    { family: 'opt' },
  ];
  for (const options of shapes) {
    const names = new Set<string>();
    const plain = await random(t, options, (name, { values }) => {
      if (name.endsWith('bias')) names.add(name);
      return values;
    });
    const expected = plain.logits(tokens)[11];
    for (const bias of names) {
      const without = await random(t, options, (name, { values }) => (name === bias ? values.map(() => 0) : values));
      // A key bias adds the same to all scores of a head where positions are learned: softmax does not see it.
      const visible = !(options.family === 'opt' && bias.endsWith('k_bias'));
      t.equal(greatestDifference(without.logits(tokens)[11], expected) > 1e-3, visible, `${options.family} ${bias}`);
    }
  }
});

t.test('activations: what fires', async (t) => {
  const fired = async (options: CheckpointOptions) => {
    const sequence = (await random(t, { neurons: 2000, ...options })).sequence();
    for (const token of tokens) sequence.step(token);
    return sequence.trace[0].fired[0] / 2000;
  };
  const near = (share: number, expected: number, name: string) =>
    t.ok(Math.abs(share - expected) < 0.05, `${name} ${share}`);
  near(await fired({ family: 'llama' }), 1, 'silu: all');
  near(await fired({ family: 'llama', hiddenAct: 'relu' }), 0.5, 'gate above zero: half of random ones');
  near(await fired({ family: 'bamboo' }), 0.25, 'gate and up above zero: a quarter');
  near(await fired({ family: 'opt' }), 0.5, 'up above zero: half');
  const fatrelu = { family: 'sparsellama', config: { hidden_act_param: 1 } } as const;
  near(await fired(fatrelu), 0.16, 'gate of normal distribution from 1 on');
});

t.test('positions of OPT begin at row 2 of its table', async (t) => {
  const directory = makeCheckpoint(join(t.testdir(), 'opt'), { family: 'opt', context: 20 });
  const checkpoint = await Checkpoint.open(directory);
  t.teardown(() => checkpoint.close());
  let rows = 0;
  await Oracle.load(checkpoint, (name, { rows: found, values }) => {
    if (name === 'position_embedding') rows = found;
    return values;
  });
  t.equal(rows, 20);
  const oracle = await Oracle.load(checkpoint);
  t.notSame(oracle.logits([7, 7])[0], oracle.logits([7, 7])[1]);
  t.throws(() => oracle.logits(new Array(21).fill(7)), RangeError, 'no position behind the table');
});

t.test('a tied head is the embedding, transformed once', async (t) => {
  const names: string[] = [];
  const options = { family: 'qwen2', tied: true } as const;
  const oracle = await random(t, options, (name, { values }) => {
    names.push(name);
    return values;
  });
  t.ok(names.includes('embedding') && !names.includes('head'));
  t.equal(oracle.logits(tokens)[11].length, 131);
});

t.test('logits of random checkpoints are of a size that tests can compare', async (t) => {
  for (const family of [
    'llama',
    'mistral',
    'qwen2',
    'qwen3',
    'mixtral',
    'bamboo',
    'turbosparsemixtral',
    'opt',
  ] as const) {
    for (const tied of [false, true]) {
      const logits = (await random(t, { family, tied, type: 'F16' })).logits(tokens)[11];
      const size = Math.sqrt(logits.reduce((sum, value) => sum + value * value, 0) / logits.length);
      t.ok(size > 1 && size < 10, `${family} ${tied}: ${size}`);
    }
  }
});

interface ReferenceCase {
  ids: number[];
  greedy_ids: number[];
  greedy_top1_top2_gap: number[];
  top10_ids: number[];
  top10_logits: number[];
}

interface Reference {
  cases: ReferenceCase[];
  active_neurons?: { ids: number[]; counts: number[][]; experts?: number[][][]; expert_weights?: number[][][] };
}

/** Where float32 and float64 sums may disagree about the better of two tokens. */
const NEAR_TIE = 1e-3;

for (const name of SHARED_MODEL_NAMES) {
  t.test(`${name}: the reference that came with the trained checkpoint`, needsShared(name), async (t) => {
    const directory = sharedModel(name) as string;
    const oracle = await load(directory);
    const reference: Reference = JSON.parse(readFileSync(join(directory, 'reference/cases.json'), 'utf8'));

    const bytes = readFileSync(join(directory, 'reference/logits.f32'));
    const vocab = oracle.hyperparameters.vocab_size;
    for (const [position, logits] of oracle.logits(reference.cases[0].ids).entries()) {
      const expected = Float32Array.from({ length: vocab }, (_, i) => bytes.readFloatLE(4 * (position * vocab + i)));
      const difference = greatestDifference(logits, expected);
      t.ok(difference < 1e-3, `position ${position}: ${difference}`);
    }

    for (const { ids, greedy_ids, greedy_top1_top2_gap, top10_ids, top10_logits } of reference.cases) {
      const last = oracle.logits(ids).at(-1) as Float32Array;
      t.equal(indexOfMaximum(last), top10_ids[0]);
      for (const [i, id] of top10_ids.entries()) t.ok(Math.abs(last[id] - top10_logits[i]) < 1e-3, `logit of ${id}`);
      const tie = greedy_top1_top2_gap.findIndex((gap) => gap < NEAR_TIE);
      const length = tie === -1 ? greedy_ids.length : tie;
      t.same(oracle.greedy(ids, length), greedy_ids.slice(0, length));
    }

    const active = reference.active_neurons;
    if (!active) return;
    const sequence = oracle.sequence();
    let differing = 0;
    for (const [position, token] of active.ids.entries()) {
      sequence.step(token);
      for (const [layer, { fired, experts, weights }] of sequence.trace.entries()) {
        differing += Math.abs(fired.reduce((a, b) => a + b, 0) - active.counts[layer][position]);
        if (!active.experts || !active.expert_weights) continue;
        t.same(experts, active.experts[layer][position]);
        for (const [i, weight] of weights.entries()) {
          t.ok(Math.abs(weight - active.expert_weights[layer][position][i]) < 1e-4);
        }
      }
    }
    t.ok(differing <= 5, `neurons on the very border of firing: ${differing}`);
  });
}
