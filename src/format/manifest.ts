import { z } from 'zod';
import { ENCODINGS } from './encoding.js';
import { hyperparametersSchema } from './hyperparameters.js';
import { DOWN_TILE, NPU_WEIGHTS_FILE } from './npu.js';

/** Version of the format this program writes, and the newest it reads. */
export const FORMAT_VERSION = 1;

export const MANIFEST_FILE = 'model.json';
export const RESIDENT_FILE = 'resident.bin';
export const NEURONS_FILE = 'neurons.bin';
export const PROFILE_FILE = 'profile.bin';
export const PREDICTOR_FILE = 'predictor.bin';

/** What `convert --quant` takes. Frozen: these names are on disk. */
export const QUANTIZATIONS = ['q4', 'q8', 'f16'] as const;
export type QuantizationName = (typeof QUANTIZATIONS)[number];

const bytes = z.number().int().min(0).max(Number.MAX_SAFE_INTEGER);
const count = z.number().int().min(1).max(Number.MAX_SAFE_INTEGER);
const encoding = z.enum(ENCODINGS);
const sha256 = z.string().regex(/^[0-9a-f]{64}$/);

export const extentSchema = z.strictObject({
  name: z.string().min(1),
  file: z.enum([RESIDENT_FILE, NEURONS_FILE, PREDICTOR_FILE, NPU_WEIGHTS_FILE]),
  offset: bytes,
  bytes: count,
  /** CRC-32 of the extent's bytes, 8 lower-case hex digits. */
  crc32: z.string().regex(/^[0-9a-f]{8}$/),
});

export const tensorSchema = z.strictObject({
  name: z.string().min(1),
  extent: z.string().min(1),
  /** From the extent's first byte. */
  offset: bytes,
  bytes: count,
  /** `u32` is for checksums and heat orders only. */
  encoding: z.enum([...ENCODINGS, 'u32']),
  rows: count,
  columns: count,
});

/** What fc1 of a predictor multiplies: the residual stream after attention, or what the FFN gets, normed. Frozen. */
export const PREDICTOR_INPUTS = ['residual', 'ffn_norm'] as const;
export type PredictorInput = (typeof PREDICTOR_INPUTS)[number];

const share = z.number().min(0).max(1);
const positive = z.number().positive();

/** One setting of the thresholds, and what it gave on held-out text. */
const operatingPointSchema = z.strictObject({
  /** Of the neurons of every expert, the hottest that counted as in memory; the others as on flash. */
  kept_share: share,
  /** For each layer: a neuron in memory is computed if its score is at least this. */
  memory_thresholds: z.array(z.number()),
  /** For each layer: a neuron on flash is fetched if its score is at least this. */
  flash_thresholds: z.array(z.number()),
  /** Of all neurons, those computed; of all neurons, those fetched. */
  computed_share: share,
  fetched_share: share,
  /** Of the contributions' magnitude (activation times norm of the down column), what was computed. */
  magnitude_share: share,
  perplexity: positive,
});

/** A predictor of which neurons contribute, and what it costs in quality; section 6 of FORMAT.md. */
const predictorSchema = z.strictObject({
  /** Whether it came with the checkpoint or was trained by the converter. */
  source: z.enum(['checkpoint', 'trained']),
  input: z.enum(PREDICTOR_INPUTS),
  fc1: encoding,
  fc2: encoding,
  /** For each layer: hidden units of each expert's predictor. */
  ranks: z.array(count),
  quality: z.strictObject({
    /** Most that perplexity may grow over that of exact mode: 0.01 is 1 %. */
    budget: positive,
    /** sha256 of the text that thresholds were judged on (no predictor was trained on it), and the tokens of it. */
    text_sha256: sha256,
    tokens: count,
    exact_perplexity: positive,
  }),
  /** The settings that keep to the budget, one for each share of neurons kept, ascending. */
  points: z.array(operatingPointSchema).min(1),
  /** Everything that was measured on the way, within the budget or not. */
  curve: z.array(operatingPointSchema.omit({ memory_thresholds: true, flash_thresholds: true })),
});

/** Graphs for a dense unit, and what their weights are cut into; section 7 of FORMAT.md. */
const npuSchema = z.strictObject({
  /** Neurons of every cluster of a bank but the last. */
  cluster_neurons: count,
  graphs: z.array(z.strictObject({ tokens: count, clusters: count, bytes: count, sha256 })),
});

export const manifestSchema = z.strictObject({
  format: z.strictObject({ name: z.literal('pi2'), version: z.number().int().min(1) }),
  /** Name of the checkpoint's directory. */
  name: z.string(),
  hyperparameters: hyperparametersSchema,
  quantization: z.strictObject({
    name: z.enum(QUANTIZATIONS),
    ffn: encoding,
    attention: encoding,
    embedding: encoding,
    head: encoding,
    /** Of Down: so many neurons share a scale. Absent: each has its own. */
    down_tiles: z.literal(DOWN_TILE).optional(),
  }),
  layout: z.strictObject({
    matrices: z.union([z.literal(2), z.literal(3)]),
    part1_bytes: count,
    part2_bytes: count,
    neurons_per_unit: count,
    unit_bytes: count,
    part1_stride: count,
    part2_offset: count,
    part2_stride: count,
  }),
  /** How the neurons of an expert are sorted: as in the checkpoint, or by the rates of `profile.bin`. */
  heat_order: z.union([
    z.literal('identity'),
    z.strictObject({
      /** Tokens that the profile counted. */
      tokens: count,
      profile_bytes: count,
      profile_sha256: sha256,
    }),
  ]),
  /** Absent: every gate is computed. */
  predictor: predictorSchema.optional(),
  /** Absent: there is no `npu/`, and no unit but the CPU can compute the model from its files. */
  npu: npuSchema.optional(),
  extents: z.array(extentSchema),
  tensors: z.array(tensorSchema),
  provenance: z.strictObject({
    converter: z.string(),
    /** Every file of the checkpoint that was read. */
    sources: z.array(z.strictObject({ file: z.string(), bytes, sha256 })),
    /** Texts that the heat order was profiled on, and how many tokens of each; absent in checkpoint order. */
    calibration: z.array(z.strictObject({ sha256, tokens: count })).optional(),
  }),
});

export type Manifest = z.infer<typeof manifestSchema>;
export type PredictorEntry = z.infer<typeof predictorSchema>;
export type NpuEntry = z.infer<typeof npuSchema>;
export type OperatingPoint = z.infer<typeof operatingPointSchema>;
export type Extent = z.infer<typeof extentSchema>;
export type TensorEntry = z.infer<typeof tensorSchema>;
