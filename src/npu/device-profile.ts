/** What a device's NPU wants to be told: `profiles/NAME.json`; docs/DENSE_UNIT.md says where each value is from. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { fileError, nearestName, Pi2Error } from '../base/error.js';

const fileName = z.string().regex(/^[A-Za-z0-9_.-]+$/, 'a file name without a folder');
const onOff = z.union([z.literal(0), z.literal(1)]);

/** Options of the QNN provider, by its own names. */
const qnnOptionsSchema = z.strictObject({
  /** The backend that computes; libQnnHtp.so is the NPU. */
  backend_path: fileName,
  htp_performance_mode: z.enum([
    'burst',
    'balanced',
    'default',
    'high_performance',
    'high_power_saver',
    'low_balanced',
    'low_power_saver',
    'power_saver',
    'extreme_power_saver',
    'sustained_high_performance',
  ]),
  /** Version of the Hexagon tensor processor. */
  htp_arch: z.union([z.literal(68), z.literal(69), z.literal(73), z.literal(75), z.literal(79), z.literal(81)]),
  /** Qualcomm's number of the chip. */
  soc_model: z.number().int().min(1),
  /** Fast memory of the NPU that a graph may have. */
  vtcm_mb: z.number().int().min(1),
  htp_graph_finalization_optimization_mode: z.number().int().min(0).max(3).optional(),
  enable_htp_fp16_precision: onOff.optional(),
  enable_htp_shared_memory_allocator: onOff.optional(),
  rpc_control_latency: z.number().int().min(0).optional(),
});

const providerSchema = z.strictObject({
  /** As ONNX Runtime names the devices of the plug-in. */
  name: z.literal('QNNExecutionProvider'),
  /** The plug-in, beside ONNX Runtime. */
  library: fileName,
  options: qnnOptionsSchema,
  session_options: z.strictObject({
    /** 1: a graph that the NPU cannot take whole is an error. */
    'session.disable_cpu_ep_fallback': z.enum(['0', '1']).optional(),
  }),
  /** Folder in `npu/` of the model for graphs as the NPU compiled them; they are of one chip and version of the SDK. */
  contexts: fileName.optional(),
});

const deviceProfileSchema = z.strictObject({
  /** For people. */
  device: z.string().min(1),
  chip: z.string().min(1),
  /** Absent: there is no NPU that can be had; the CPU provider computes. */
  provider: providerSchema.optional(),
});

export type DeviceProfile = z.infer<typeof deviceProfileSchema>;

const FOLDER = 'profiles';

/** Names of the profiles that come with the program. */
export function listDeviceProfiles(): string[] {
  return readdirSync(profileFolder())
    .filter((file) => file.endsWith('.json'))
    .map((file) => path.basename(file, '.json'))
    .sort();
}

/**
 * Opens the profile called `name`, or the file `name` if it has a folder or ends in `.json`. Throws `Pi2Error`: E_USAGE for a
 * name that there is none of, E_FILE, and E_NPU for a file that is no profile.
 */
export function openDeviceProfile(name: string): DeviceProfile {
  const isFile = name.includes('/') || name.endsWith('.json');
  const known = listDeviceProfiles();
  if (!isFile && !known.includes(name)) {
    const nearest = nearestName(name, known);
    const hint = nearest === undefined ? `there are ${known.join(', ')}; or give a file` : `did you mean ${nearest}?`;
    throw new Pi2Error('E_USAGE', `there is no device profile called ${JSON.stringify(name)}`, hint);
  }
  const file = isFile ? name : path.join(profileFolder(), `${name}.json`);
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    throw fileError(error, 'read', file);
  }
  return parseDeviceProfile(text, file);
}

/** Parses and checks the text of a profile; `where` names it in errors. Throws `Pi2Error` E_NPU and nothing else. */
export function parseDeviceProfile(text: string, where: string): DeviceProfile {
  const hint = `compare it with ${FOLDER}/oneplus-12.json`;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new Pi2Error('E_NPU', `${where} is not JSON: ${(error as Error).message}`, hint);
  }
  const parsed = deviceProfileSchema.safeParse(json);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0];
  throw new Pi2Error('E_NPU', `${where}: ${issue.path.join('.') || 'the profile'}: ${issue.message}`, hint);
}

/**
 * Every file that the NPU of a profile needs on the device, all beside ONNX Runtime: the plug-in, the backend, what compiles
 * graphs, and the two halves of the call into the NPU (the stub for the CPU's side, the skel that the NPU loads).
 */
export function providerFiles({ provider }: DeviceProfile): string[] {
  if (provider === undefined) return [];
  const { backend_path, htp_arch } = provider.options;
  const call = `libQnnHtpV${htp_arch}`;
  return [provider.library, backend_path, 'libQnnSystem.so', 'libQnnHtpPrepare.so', `${call}Stub.so`, `${call}Skel.so`];
}

/** Throws `Pi2Error` E_NPU that names what is missing of `providerFiles` in `directory`, and where to put it. */
export function requireProviderFiles(profile: DeviceProfile, directory: string): void {
  const missing = providerFiles(profile).filter((file) => !existsSync(path.join(directory, file)));
  if (missing.length === 0) return;
  throw new Pi2Error(
    'E_NPU',
    `the NPU of ${profile.device} (${profile.chip}) needs ${missing.join(', ')} in ${directory}`,
    "put them beside ONNX Runtime: they are in Qualcomm's AI Runtime SDK and in the package of its ONNX Runtime provider",
  );
}

/** The folder of the profiles, above this file, whether it runs from `src/` or from `dist/`. */
function profileFolder(): string {
  let folder = path.dirname(fileURLToPath(import.meta.url));
  while (!existsSync(path.join(folder, FOLDER)) && path.dirname(folder) !== folder) folder = path.dirname(folder);
  return path.join(folder, FOLDER);
}
