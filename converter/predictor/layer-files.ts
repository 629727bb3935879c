import { mkdir, readFile, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { fileError } from '../../src/base/error.js';
import { writeSynced } from '../write/output.js';
import type { EncodedLayer } from './encode.js';

/**
 * Finished layers, each in a file of its own until `predictor.bin` is written: a conversion that was killed takes them from here.
 * A file that is not whole is as good as none. Whether it is of the same request is told by the name of the directory.
 */
export class LayerFiles {
  readonly directory: string;

  private constructor(directory: string) {
    this.directory = directory;
  }

  /** Makes the directory, or takes it over as it is. */
  static async open(directory: string): Promise<LayerFiles> {
    try {
      await mkdir(directory, { recursive: true });
    } catch (error) {
      throw fileError(error, 'make', directory);
    }
    return new LayerFiles(directory);
  }

  async write(layer: number, { tensors, bytes }: EncodedLayer): Promise<void> {
    const path = this.#path(layer);
    const header = Buffer.from(`${JSON.stringify({ tensors, crc32: crc32(bytes) })}\n`);
    await writeSynced(`${path}.new`, Buffer.concat([header, bytes]));
    await rename(`${path}.new`, path);
  }

  /** A layer that is done, or null. */
  async read(layer: number): Promise<EncodedLayer | null> {
    const file = await readFile(this.#path(layer)).catch(() => null);
    if (file === null) return null;
    try {
      const end = file.indexOf('\n');
      const header = JSON.parse(file.toString('utf8', 0, end));
      const bytes = new Uint8Array(file.subarray(end + 1));
      return crc32(bytes) === header.crc32 ? { tensors: header.tensors, bytes } : null;
    } catch {
      return null;
    }
  }

  async remove(): Promise<void> {
    await rm(this.directory, { recursive: true, force: true });
  }

  #path(layer: number): string {
    return join(this.directory, `layer-${layer}`);
  }
}
