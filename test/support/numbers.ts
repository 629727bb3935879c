/** Number types of safetensors, to and from float32, and a seeded source of random numbers. */

export type NumberType = 'F32' | 'F16' | 'BF16';

const bits = new DataView(new ArrayBuffer(4));

/** Decodes little-endian numbers of a safetensors type. */
export function decode(bytes: Uint8Array, type: NumberType): Float32Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const count = bytes.length / (type === 'F32' ? 4 : 2);
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    if (type === 'F32') values[i] = view.getFloat32(4 * i, true);
    else if (type === 'F16') values[i] = fromHalf(view.getUint16(2 * i, true));
    else values[i] = fromBrain(view.getUint16(2 * i, true));
  }
  return values;
}

/** Encodes numbers as little-endian bytes of a safetensors type, rounding to nearest, ties to even. */
export function encode(values: Float32Array, type: NumberType): Uint8Array {
  const bytes = new Uint8Array(values.length * (type === 'F32' ? 4 : 2));
  const view = new DataView(bytes.buffer);
  for (let i = 0; i < values.length; i++) {
    if (type === 'F32') view.setFloat32(4 * i, values[i], true);
    else if (type === 'F16') view.setUint16(2 * i, toHalf(values[i]), true);
    else view.setUint16(2 * i, toBrain(values[i]), true);
  }
  return bytes;
}

/** bfloat16 is the upper half of a float32. */
export function fromBrain(half: number): number {
  bits.setUint32(0, half << 16);
  return bits.getFloat32(0);
}

export function toBrain(value: number): number {
  bits.setFloat32(0, value);
  const word = bits.getUint32(0);
  if (Number.isNaN(value)) return (word >>> 16) | 0x40;
  return ((word + 0x7fff + ((word >>> 16) & 1)) >>> 16) & 0xffff;
}

/** IEEE half: 1 sign, 5 exponent (bias 15), 10 fraction bits. */
export function fromHalf(half: number): number {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

export function toHalf(value: number): number {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const size = Math.abs(value);
  if (Number.isNaN(value)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  // One unit in the last place at this size; below 2^-14 all numbers are subnormal with a unit of 2^-24.
  const exponent = Math.max(-14, Math.floor(Math.log2(size)));
  const units = roundToEven(size / 2 ** (exponent - 10));
  // Adding, not or-ing, lets a fraction that rounds up to 2048 units carry into the exponent.
  return sign | (units < 1024 ? units : ((exponent + 14) << 10) + units);
}

function roundToEven(value: number): number {
  const down = Math.floor(value);
  const rest = value - down;
  if (rest !== 0.5) return rest < 0.5 ? down : down + 1;
  return down % 2 === 0 ? down : down + 1;
}

/** Seeded random numbers: mulberry32, the same everywhere. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** From 0 up to but without 1. */
  uniform(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  }

  /** Normal distribution with mean 0 and deviation 1. */
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.uniform())) * Math.cos(2 * Math.PI * this.uniform());
  }
}
