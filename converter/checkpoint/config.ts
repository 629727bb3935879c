import { Pi2Error } from '../../src/base/error.js';
import { quoted } from './safetensors.js';

/**
 * A JSON object of a checkpoint (`config.json`, or an object inside), read key by key with checks.
 *
 * A key that is absent has the default that HuggingFace's classes give it, told by the caller; `null` is a value of its own
 * there ("none"), so the readers tell the two apart. Every wrong value is `E_CONFIG` with key, value and expectation.
 */
export class Config {
  readonly #values: object;
  /** Name of the file, for messages. */
  readonly file: string;
  /** Where in the file this object is, e.g. `rope_scaling.`; empty at the top. */
  readonly #prefix: string;

  constructor(values: object, file: string, prefix = '') {
    this.#values = values;
    this.file = file;
    this.#prefix = prefix;
  }

  /** The value of a key as it stands in the file; undefined when absent. Inherited properties are not values. */
  raw(key: string): unknown {
    return Object.hasOwn(this.#values, key) ? (this.#values as Record<string, unknown>)[key] : undefined;
  }

  /** Whether the key is there with a value other than null. */
  has(key: string): boolean {
    return this.raw(key) !== undefined && this.raw(key) !== null;
  }

  keys(): string[] {
    return Object.keys(this.#values);
  }

  /** A whole number from 1 to `most`. Without a default the key is required. */
  size(key: string, most: number, fallback?: number): number {
    const value = this.raw(key) ?? fallback;
    if (value === undefined) throw this.wrong(key, `a whole number from 1 to ${most}`);
    if (!Number.isSafeInteger(value) || (value as number) < 1 || (value as number) > most) {
      throw this.wrong(key, `a whole number from 1 to ${most}`, value);
    }
    return value as number;
  }

  /** A finite number above zero. Without a default the key is required. */
  positive(key: string, fallback?: number): number {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== 'number' || !Number.isFinite(value) || value <= 0) {
      throw this.wrong(key, 'a number above 0', value);
    }
    return value;
  }

  boolean(key: string, fallback: boolean): boolean {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== 'boolean') throw this.wrong(key, 'true or false', value);
    return value;
  }

  text(key: string, fallback?: string): string {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== 'string') throw this.wrong(key, 'a text', value);
    return value;
  }

  /** An object inside this one, or null when absent or null. */
  object(key: string): Config | null {
    const value = this.raw(key) ?? null;
    if (value === null) return null;
    if (typeof value !== 'object' || Array.isArray(value)) throw this.wrong(key, 'an object', value);
    return new Config(value, this.file, `${this.#prefix}${key}.`);
  }

  /** Token ids: one, a list, or none. */
  tokenIds(key: string): number[] {
    const value = this.raw(key) ?? [];
    const ids: unknown[] = Array.isArray(value) ? value : [value];
    for (const id of ids) {
      if (!Number.isSafeInteger(id) || (id as number) < 0)
        throw this.wrong(key, 'a token id, a list of them or null', value);
    }
    return ids as number[];
  }

  /** The error of a value that cannot be right. */
  wrong(key: string, expectation: string, value: unknown = this.raw(key)): Pi2Error {
    const found = value === undefined ? 'is missing' : `is ${quoted(value)}`;
    return new Pi2Error(
      'E_CONFIG',
      `${this.file}: ${this.#prefix}${key} ${found}; expected ${expectation}`,
      'check that the checkpoint is complete and unchanged',
    );
  }

  /** The error of a value that is right but asks for what cannot be done. `supported` says what can. */
  unsupported(key: string, supported: string): Pi2Error {
    return new Pi2Error(
      'E_UNSUPPORTED',
      `${this.file}: ${this.#prefix}${key} ${quoted(this.raw(key))} is not supported`,
      `supported: ${supported}`,
    );
  }
}
