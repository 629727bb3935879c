/** Synthetic GGUF models of a shape: random blocks, no quantization of floats. Right for speed, void for quality. */
import { type Cipher, createCipheriv } from 'node:crypto';
import { rename, rm, stat } from 'node:fs/promises';
import { fileError } from '../src/base/error.js';
import { GGML_TYPES, type GgmlType, type GgufTensor, type MetadataValue, tensorBytes, writeGguf } from './gguf.js';
import type { Shape } from './shapes.js';

/** How all matrices of a model are stored; its norms are floats. */
export type MatrixType = Exclude<GgmlType, 'f32'>;

/** What the bytes of a shape are for. */
export interface ShapeBytes {
  /** All tensors. */
  total: number;
  /** Neurons: gate, up and down. */
  ffn: number;
  /** What a token does not read: all but one row of the embeddings, and the neurons of experts that it is not routed to. */
  unused: number;
}

const RMS_EPSILON = 1e-5;
const ROPE_BASE = 10_000;
/** ggml's own numbers for what a file mostly holds (`general.file_type`). */
const FILE_TYPES: Record<MatrixType, number> = { q4_0: 2, q4_1: 3, iq4_xs: 30 };
/** Bytes 0 to 255 follow the unknown token, the beginning and the end. */
const FIRST_BYTE_TOKEN = 3;
const TOKEN_TYPES = { normal: 1, unknown: 2, control: 3, byte: 6 };

/**
 * Writes the GGUF file of a shape unless one of the right size is there; returns whether it was made. Same arguments, same
 * bytes. Throws `Pi2Error`.
 */
export async function generateGguf(shape: Shape, type: MatrixType, seed: number, path: string): Promise<boolean> {
  const expected = shapeBytes(shape, type).total;
  const there = await stat(path).catch(() => null);
  if (there !== null && there.size >= expected) return false;
  const partial = `${path}.partial`;
  try {
    await writeGguf(partial, metadataOf(shape, type), tensorsOf(shape, type, new RandomBlocks(seed)));
    await rename(partial, path);
  } catch (error) {
    await rm(partial, { force: true });
    throw fileError(error, 'write the synthetic model', path);
  }
  return true;
}

/** Sizes of a shape whose matrices are stored as `type`. */
export function shapeBytes(shape: Shape, type: MatrixType): ShapeBytes {
  const sum = (tensors: GgufTensor[]) => tensors.reduce((total, tensor) => total + tensorBytes(tensor), 0);
  const tensors = tensorsOf(shape, type, null);
  const embeddings = sum(tensors.filter(({ name }) => name === 'token_embd.weight'));
  const ffn = sum(tensors.filter(({ name }) => /\.ffn_(gate|up|down)(_exps)?\./.test(name)));
  const { expertCount = 1, expertsPerToken = 1 } = shape;
  return { total: sum(tensors), ffn, unused: embeddings + ffn * (1 - expertsPerToken / expertCount) };
}

/** What llama.cpp needs to know of a shape. The tokenizer is a SentencePiece vocabulary that spells nothing. */
function metadataOf(shape: Shape, type: MatrixType): Map<string, MetadataValue> {
  const u32 = (value: number): MetadataValue => ({ type: 'u32', value });
  const f32 = (value: number): MetadataValue => ({ type: 'f32', value });
  const string = (value: string): MetadataValue => ({ type: 'string', value });
  const tokens = Array.from({ length: shape.vocabSize }, (_, id) => tokenOf(id));
  const { expertCount, expertsPerToken } = shape;
  return new Map([
    ['general.architecture', string('llama')],
    ['general.name', string(`synthetic-${shape.name}`)],
    ['general.file_type', u32(FILE_TYPES[type])],
    ['general.quantization_version', u32(2)],
    ['llama.vocab_size', u32(shape.vocabSize)],
    ['llama.context_length', u32(shape.contextLength)],
    ['llama.embedding_length', u32(shape.hiddenSize)],
    ['llama.block_count', u32(shape.layerCount)],
    ['llama.feed_forward_length', u32(shape.neuronCount)],
    ['llama.attention.head_count', u32(shape.headCount)],
    ['llama.attention.head_count_kv', u32(shape.kvHeadCount)],
    ['llama.attention.layer_norm_rms_epsilon', f32(RMS_EPSILON)],
    ['llama.rope.dimension_count', u32(shape.hiddenSize / shape.headCount)],
    ['llama.rope.freq_base', f32(ROPE_BASE)],
    ...(expertCount !== undefined && expertsPerToken !== undefined
      ? ([
          ['llama.expert_count', u32(expertCount)],
          ['llama.expert_used_count', u32(expertsPerToken)],
        ] as const)
      : []),
    ['tokenizer.ggml.model', string('llama')],
    ['tokenizer.ggml.tokens', { type: 'strings', value: tokens.map(({ text }) => text) }],
    ['tokenizer.ggml.scores', { type: 'f32s', value: tokens.map((_, id) => -id) }],
    ['tokenizer.ggml.token_type', { type: 'i32s', value: tokens.map(({ kind }) => kind) }],
    ['tokenizer.ggml.bos_token_id', u32(1)],
    ['tokenizer.ggml.eos_token_id', u32(2)],
    ['tokenizer.ggml.unknown_token_id', u32(0)],
  ] as [string, MetadataValue][]);
}

function tokenOf(id: number): { text: string; kind: number } {
  if (id === 0) return { text: '<unk>', kind: TOKEN_TYPES.unknown };
  if (id < FIRST_BYTE_TOKEN) return { text: id === 1 ? '<s>' : '</s>', kind: TOKEN_TYPES.control };
  const byte = id - FIRST_BYTE_TOKEN;
  if (byte > 255) return { text: `t${id}`, kind: TOKEN_TYPES.normal };
  return { text: `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`, kind: TOKEN_TYPES.byte };
}

/** All tensors in the order of llama.cpp's converter. Without blocks only their sizes are meant. */
function tensorsOf(shape: Shape, type: MatrixType, blocks: RandomBlocks | null): GgufTensor[] {
  const { hiddenSize, neuronCount, vocabSize, layerCount } = shape;
  const kvSize = (hiddenSize / shape.headCount) * shape.kvHeadCount;
  const blockScale = 1 / Math.sqrt(2 * layerCount);
  const experts = shape.expertCount === undefined ? [] : [shape.expertCount];
  const suffix = shape.expertCount === undefined ? '' : '_exps';
  // As in `tensorsOf` of shapes.ts: products have the size of their inputs, and what a block adds is small.
  const matrix = (name: string, inputs: number, outputs: number[], scale = 1): GgufTensor => ({
    name: `${name}.weight`,
    dimensions: [inputs, ...outputs],
    type,
    fill: (bytes) => blocks?.fill(bytes, type, scale / Math.sqrt(inputs)),
  });
  const floats = (name: string, dimensions: number[], value: number): GgufTensor => ({
    name: `${name}.weight`,
    dimensions,
    type: 'f32',
    fill: (bytes) => {
      const ones = Buffer.from(Float32Array.of(value).buffer);
      bytes.fill(ones);
    },
  });
  const layers = Array.from({ length: layerCount }, (_, i) => {
    const layer = `blk.${i}`;
    return [
      floats(`${layer}.attn_norm`, [hiddenSize], 1),
      matrix(`${layer}.attn_q`, hiddenSize, [hiddenSize]),
      matrix(`${layer}.attn_k`, hiddenSize, [kvSize]),
      matrix(`${layer}.attn_v`, hiddenSize, [kvSize]),
      matrix(`${layer}.attn_output`, hiddenSize, [hiddenSize], blockScale),
      floats(`${layer}.ffn_norm`, [hiddenSize], 1),
      ...(experts.length > 0 ? [router(`${layer}.ffn_gate_inp`, hiddenSize, experts[0], blocks)] : []),
      matrix(`${layer}.ffn_gate${suffix}`, hiddenSize, [neuronCount, ...experts]),
      matrix(`${layer}.ffn_up${suffix}`, hiddenSize, [neuronCount, ...experts]),
      matrix(`${layer}.ffn_down${suffix}`, neuronCount, [hiddenSize, ...experts], blockScale),
    ];
  });
  return [
    matrix('token_embd', hiddenSize, [vocabSize], Math.sqrt(hiddenSize)),
    ...layers.flat(),
    floats('output_norm', [hiddenSize], 1),
    matrix('output', hiddenSize, [vocabSize]),
  ];
}

/** The router of a mixture, in floats as llama.cpp keeps it. */
function router(name: string, inputs: number, experts: number, blocks: RandomBlocks | null): GgufTensor {
  return {
    name: `${name}.weight`,
    dimensions: [inputs, experts],
    type: 'f32',
    fill: (bytes) => blocks?.fillFloats(bytes, 1 / Math.sqrt(inputs)),
  };
}

/** A deterministic stream of random blocks: AES in counter mode, then the scales of each block set. */
class RandomBlocks {
  readonly #stream: Cipher;
  #zeros = Buffer.alloc(0);

  constructor(seed: number) {
    const key = Buffer.alloc(16);
    key.writeUInt32LE(seed);
    this.#stream = createCipheriv('aes-128-ctr', key, Buffer.alloc(16));
  }

  /** Fills `bytes` with blocks of weights of about this deviation. */
  fill(bytes: Buffer, type: MatrixType, deviation: number): void {
    this.#random(bytes);
    // Deviation of what the nibbles stand for: uniform of 16 steps; of IQ4's table, times the scale of 1 set below.
    const scale = toHalf(deviation / (type === 'iq4_xs' ? 73 : Math.sqrt((16 ** 2 - 1) / 12)));
    const least = toHalf((-7.5 * deviation) / Math.sqrt((16 ** 2 - 1) / 12));
    const { blockBytes } = GGML_TYPES[type];
    for (let at = 0; at < bytes.length; at += blockBytes) {
      bytes.writeUInt16LE(scale, at);
      if (type === 'q4_1') bytes.writeUInt16LE(least, at + 2);
      if (type === 'iq4_xs') {
        // Eight scales of 6 bits, stored plus 32: high bits in two bytes, low bits in four. 33 is a scale of 1.
        bytes.writeUInt16LE(0xaaaa, at + 2);
        bytes.fill(0x11, at + 4, at + 8);
      }
    }
  }

  /** Fills `bytes` with floats, uniform with this deviation. */
  fillFloats(bytes: Buffer, deviation: number): void {
    this.#random(bytes);
    for (let at = 0; at < bytes.length; at += 4) {
      bytes.writeFloatLE((bytes.readUInt32LE(at) / 2 ** 32 - 0.5) * Math.sqrt(12) * deviation, at);
    }
  }

  #random(bytes: Buffer): void {
    if (this.#zeros.length < bytes.length) this.#zeros = Buffer.alloc(bytes.length);
    this.#stream.update(this.#zeros.subarray(0, bytes.length)).copy(bytes);
  }
}

/** A positive or negative normal number as the bits of a half float, rounded down to it. */
function toHalf(value: number): number {
  const sign = value < 0 ? 0x8000 : 0;
  const exponent = Math.floor(Math.log2(Math.abs(value)));
  const mantissa = Math.floor((Math.abs(value) / 2 ** exponent - 1) * 1024);
  if (exponent < -14) return sign | Math.floor(Math.abs(value) * 2 ** 24);
  return sign | ((exponent + 15) << 10) | mantissa;
}
