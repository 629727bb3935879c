/** Where ONNX Runtime is looked for. It is no part of this program: a dense unit of its kind exists only where it is installed. */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { Pi2Error } from '../base/error.js';

/** The file, as it is called on Linux. */
export const ONNXRUNTIME_LIBRARY = 'libonnxruntime.so.1';

/** Folder of the npm package that has the file of this machine. */
const PACKAGE_FOLDER = ['bin', 'napi-v6', 'linux', process.arch];

/**
 * The library that `given` names; without, that of the npm package `onnxruntime-node`; without that either, the name alone,
 * which the loader looks for in the system's places. Throws `Pi2Error` E_NPU when `given` is not there.
 */
export function findOnnxruntime(given?: string): string {
  if (given !== undefined) {
    if (existsSync(given)) return given;
    throw new Pi2Error(
      'E_NPU',
      `${given} is not there: ONNX Runtime cannot be loaded from it`,
      `give the path of ${ONNXRUNTIME_LIBRARY}, or install the npm package onnxruntime-node and leave it out`,
    );
  }
  let manifest: string;
  try {
    manifest = createRequire(import.meta.url).resolve('onnxruntime-node/package.json');
  } catch {
    return ONNXRUNTIME_LIBRARY;
  }
  const file = path.join(path.dirname(manifest), ...PACKAGE_FOLDER, ONNXRUNTIME_LIBRARY);
  return existsSync(file) ? file : ONNXRUNTIME_LIBRARY;
}
