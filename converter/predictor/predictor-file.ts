import { crc32 } from 'node:zlib';
import { roundUpToPage } from '../../src/format/layout.js';
import { type Extent, PREDICTOR_FILE, type TensorEntry } from '../../src/format/manifest.js';
import { type Output, OutputFile } from '../write/output.js';
import type { EncodedLayer } from './encode.js';

/** What lies where in `predictor.bin`. */
export interface PredictorFile {
  extents: Extent[];
  tensors: TensorEntry[];
  bytes: number;
}

/** Writes and syncs `predictor.bin`: an extent a layer, each on a page of its own. */
export async function writePredictorFile(output: Output, layers: readonly EncodedLayer[]): Promise<PredictorFile> {
  const extents: Extent[] = [];
  let offset = 0;
  const file = await OutputFile.create(output.partial(PREDICTOR_FILE));
  try {
    for (const { bytes, tensors } of layers) {
      const padded = new Uint8Array(roundUpToPage(bytes.length));
      padded.set(bytes);
      await file.write(padded, offset);
      const checksum = crc32(bytes).toString(16).padStart(8, '0');
      extents.push({ name: tensors[0].extent, file: PREDICTOR_FILE, offset, bytes: bytes.length, crc32: checksum });
      offset += padded.length;
    }
    await file.sync();
  } finally {
    await file.close();
  }
  return { extents, tensors: layers.flatMap((layer) => layer.tensors), bytes: offset };
}
