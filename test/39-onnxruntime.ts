// The dense unit `onnxruntime`: graphs of random weights by ONNX Runtime's CPU provider, against a plain computation; what is
// missing, damaged or something else is refused in words. native/npu/onnxruntime_unit_test.cc is built here, plain and with
// sanitizers, and is a process of its own: a wrong place in ONNX Runtime's table of functions would end it.
import { execFile, spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import t, { type Test } from 'tap';
import { Pi2Error } from '../src/base/error.js';
import { openModelDirectory } from '../src/format/model-directory.js';
import { type GraphShape, graphShapes, NPU_FOLDER } from '../src/format/npu.js';
import {
  type DeviceProfile,
  listDeviceProfiles,
  openDeviceProfile,
  parseDeviceProfile,
  providerFiles,
} from '../src/npu/device-profile.js';
import { findOnnxruntime, ONNXRUNTIME_LIBRARY } from '../src/npu/onnxruntime-library.js';
import {
  type DenseWeights,
  denseWeights,
  makeOnnxruntimeRequest,
  type OnnxruntimeRequest,
} from '../src/npu/onnxruntime-request.js';
import { computeDensely, type DenseGraphs, encodeModel, writeDenseGraphs } from './support/dense-graphs.js';
import type { CheckpointOptions } from './support/make-checkpoint.js';
import { makeModel } from './support/models.js';
import { Random } from './support/numbers.js';
import { REPOSITORY } from './support/shared.js';

const run = promisify(execFile);
const scratch = t.testdir({});
const library = findOnnxruntime();
const needsLibrary = { skip: existsSync(library) ? false : 'the optional package onnxruntime-node is not installed' };

const SOURCES = [
  'base/memory_test',
  'storage/mapped_file',
  'npu/onnxruntime_api',
  'npu/onnxruntime_session',
  'npu/onnxruntime_unit',
  'npu/onnxruntime_unit_test',
];
const SANITIZERS = { plain: '-O1', TSan: '-fsanitize=thread', 'ASan and UBSan': '-fsanitize=address,undefined' };

/** The test program built with `flag`, or null where such programs do not run, with `runner` before them. */
async function build(name: string, flag: string, compiler = 'g++', ...runner: string[]): Promise<string | null> {
  const probe = join(scratch, 'probe');
  const probed = spawnSync(compiler, [flag, '-x', 'c++', '-', '-o', probe], { input: 'int main() { return 0; }' });
  const [command, ...before] = [...runner, probe];
  if (probed.status !== 0 || spawnSync(command, before).status !== 0) return null;
  const program = join(scratch, name.replaceAll(' ', '-'));
  const flags = ['-std=c++20', '-g1', '-fno-exceptions', '-fno-rtti', '-fno-sanitize-recover=all', flag];
  const sources = SOURCES.map((source) => join(REPOSITORY, 'native', `${source}.cc`));
  await run(compiler, [...flags, '-I', REPOSITORY, ...sources, '-pthread', '-ldl', '-o', program]);
  return program;
}

const programs = Promise.all(Object.entries(SANITIZERS).map(([name, flag]) => build(name, flag)));

/** Writes a request as the test program reads it. */
function writeRequest(request: OnnxruntimeRequest, name: string): string {
  const { provider } = request;
  const lines = [`library ${request.library}`, `weights ${request.weights}`, `hidden ${request.hiddenSize}`];
  lines.push(`bankBytes ${request.bankBytes}`, `bankOffsets ${request.bankOffsets.join(' ')}`);
  for (const graph of request.graphs) {
    lines.push(`graph ${graph.tokens} ${graph.clusters} ${graph.path}`);
    for (const { name: tensor, elementType, offset, bytes, dimensions } of graph.tensors) {
      lines.push(`tensor ${tensor} ${elementType} ${offset} ${bytes} ${dimensions.join(' ')}`);
    }
  }
  if (provider.name) lines.push(`provider ${provider.name}`);
  if (provider.library) lines.push(`providerLibrary ${provider.library}`);
  if (provider.contexts) lines.push(`contexts ${provider.contexts}`);
  for (const [key, value] of Object.entries(provider.options)) lines.push(`option ${key} ${value}`);
  for (const [key, value] of Object.entries(provider.sessionOptions)) lines.push(`sessionOption ${key} ${value}`);
  const file = join(scratch, `${name}.txt`);
  writeFileSync(file, `${lines.join('\n')}\n`);
  return file;
}

/** What the program prints, whatever its exit status. */
async function outputOf(program: string | string[], ...args: string[]): Promise<string> {
  const [command, ...before] = [program].flat();
  try {
    return (await run(command, [...before, ...args])).stdout;
  } catch (error) {
    const { stdout, stderr, signal } = error as { stdout: string; stderr: string; signal: string | null };
    return `${stdout}${stderr}${signal ?? ''}`;
  }
}

const GRAPHS: DenseGraphs = { hidden: 96, clusterNeurons: 64, clusters: 3, banks: 2, tokens: [1, 2, 3, 4, 128] };
const SHAPES: GraphShape[] = GRAPHS.tokens.flatMap((tokens) => [1, 2, 3].map((clusters) => ({ tokens, clusters })));

function makeWeights(directory: string, options: DenseGraphs) {
  const { banks, bankBytes } = writeDenseGraphs(join(directory, NPU_FOLDER), options);
  const weights: DenseWeights = {
    directory,
    bankOffsets: banks.map((_, i) => i * bankBytes),
    bankBytes,
    hiddenSize: options.hidden,
  };
  return { banks, weights };
}

const SMALL = makeWeights(join(scratch, 'small'), GRAPHS);
const request = () => makeOnnxruntimeRequest(SMALL.weights, SHAPES, {});

/** Root of the mean of squared differences, over that of the expected. */
function relativeError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let difference = 0;
  let size = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (found[i] - expected[i]) ** 2;
    size += expected[i] ** 2;
  }
  return Math.sqrt(difference / size);
}

function randomInputs(count: number): Float32Array {
  const random = new Random(7);
  return Float32Array.from({ length: count }, () => random.normal());
}

/** Inputs of products are int8, as on an NPU: with a scale for each 32, or for a whole row where kernels are made so. */
const TOLERANCE = 0.03;
const REFUSED = [
  'the dense unit has no loaded graph of 1 tokens and 1 clusters',
  'the dense unit was given 1 tokens for a graph of 0 tokens and 0 clusters',
  'the dense unit was given 2 tokens for a graph of 1 tokens and 1 clusters',
  'the dense unit has no bank 2',
  'the dense unit has no loaded graph of 1 tokens and 1 clusters',
  'the dense unit has no loaded graph of 1 tokens and 1 clusters',
  'the model has no graph of 1 tokens and 99 clusters',
];

/** Runs every graph for every bank and compares with the plain computation. */
async function compare(
  t: Test,
  program: string | string[],
  made: OnnxruntimeRequest,
  weights: typeof SMALL,
  tolerance: number,
) {
  const x = randomInputs(128 * made.hiddenSize);
  writeFileSync(join(scratch, 'x'), x);
  const text = await outputOf(program, writeRequest(made, 'run'), 'live', join(scratch, 'x'), join(scratch, 'y'));
  const sums = made.graphs.length * made.bankOffsets.length;
  const lines = REFUSED.map((words) => `refused: ${words}`);
  lines.splice(4, 0, `onnxruntime 1.24.3, ${made.provider.name || 'cpu'}: ${sums} sums`);
  t.strictSame(text.trim().split('\n'), lines);
  const bytes = readFileSync(join(scratch, 'y'));
  const y = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  let at = 0;
  for (const { tokens, clusters } of made.graphs) {
    const count = tokens * made.hiddenSize;
    for (const [i, bank] of weights.banks.entries()) {
      const expected = computeDensely(bank, clusters, x.subarray(0, count));
      const error = relativeError(y.subarray(at, at + count), expected);
      t.ok(error < tolerance, `${tokens} tokens, ${clusters} clusters, bank ${i}: ${error}`);
      at += count;
    }
  }
  t.equal(at, y.length);
}

t.test('every graph and bank is what it should be', needsLibrary, async (t) => {
  for (const [i, program] of (await programs).entries()) {
    if (program === null) t.comment(`programs built with ${Object.values(SANITIZERS)[i]} do not run here`);
    else await compare(t, program, await request(), SMALL, TOLERANCE);
  }
  const floats = makeWeights(join(scratch, 'floats'), { ...GRAPHS, accuracyLevel: 0 });
  const exact = await makeOnnxruntimeRequest(floats.weights, SHAPES, {});
  await compare(t, (await programs)[0] as string, exact, floats, 1e-5);
});

t.test('the same by the arm64 library, under QEMU', needsLibrary, async (t) => {
  const made = await request();
  made.library = made.library.replace('/x64/', '/arm64/');
  const emulator = ['qemu-aarch64-static', '-cpu', 'max', '-L', '/usr/aarch64-linux-gnu'];
  const program = await build('arm64', '-O1', 'aarch64-linux-gnu-g++', ...emulator);
  const isHere = program !== null && made.library.includes('/arm64/') && existsSync(made.library);
  if (!isHere) t.pass('skipped, not installed: aarch64-linux-gnu-g++, qemu-aarch64-static, or the library for arm64');
  else await compare(t, [...emulator, program], made, SMALL, TOLERANCE);
});

t.test('a provider by its name gets the weights through the graph', needsLibrary, async (t) => {
  const made = await request();
  // The CPU provider is a device of the library as those of plug-ins are: all but the plug-in itself is tried here.
  made.provider = { ...made.provider, name: 'CPUExecutionProvider', options: { a: '1' } };
  await compare(t, (await programs)[0] as string, made, SMALL, TOLERANCE);
});

t.test('one node: a wrong place in the table would end the process', needsLibrary, async (t) => {
  const folder = join(scratch, 'one');
  mkdirSync(folder);
  writeFileSync(join(folder, 'weights.bin'), 'none');
  const node = [{ opType: 'Relu', input: ['x'], output: ['y'] }];
  writeFileSync(join(folder, 't1-c1.onnx'), encodeModel('one', node, [], [1, 5]));
  const made = await request();
  const graphs = [{ tokens: 1, clusters: 1, path: join(folder, 't1-c1.onnx'), tensors: [] }];
  const one = { ...made, graphs, weights: join(folder, 'weights.bin'), bankOffsets: [0], bankBytes: 4, hiddenSize: 5 };
  writeFileSync(join(scratch, 'x'), Float32Array.of(1, -2, 3, -4, 0.5));
  const file = writeRequest(one, 'one');
  const text = await outputOf((await programs)[0] as string, file, 'run', join(scratch, 'x'), join(scratch, 'y'));
  t.equal(text, 'onnxruntime 1.24.3, cpu: 1 sums\n');
  const bytes = readFileSync(join(scratch, 'y'));
  t.strictSame([...new Float32Array(bytes.buffer, bytes.byteOffset, 5)], [1, 0, 3, 0, 0.5]);
});

const MODELS: Record<string, CheckpointOptions> = {
  moe: { family: 'turbosparsemixtral', hidden: 64, heads: 2, experts: 3, neurons: 50, layers: 2 },
  opt: { family: 'opt', hidden: 160, heads: 5, neurons: 333, layers: 2, type: 'F16' },
  fatrelu: { family: 'sparsellama', hidden: 320, heads: 5, neurons: 129, layers: 1 },
};

t.test('graphs of converted models give what the library gives by its own interface', needsLibrary, async (t) => {
  const ort = await import('onnxruntime-node');
  for (const [name, options] of Object.entries(MODELS)) {
    const model = await openModelDirectory(await makeModel(join(scratch, name), options, 'q4', true));
    const weights = denseWeights(model);
    const made = await makeOnnxruntimeRequest(weights, graphShapes(model.manifest.hyperparameters.neuron_count), {});
    const x = randomInputs(128 * made.hiddenSize);
    writeFileSync(join(scratch, 'x'), x);
    const file = writeRequest(made, name);
    const text = await outputOf((await programs)[0] as string, file, 'run', join(scratch, 'x'), join(scratch, 'y'));
    t.match(text, /^onnxruntime 1\.24\.3, cpu: \d+ sums\n$/);
    const found = readFileSync(join(scratch, 'y'));
    const bytes = readFileSync(made.weights);
    let at = 0;
    for (const { tokens, clusters, path } of made.graphs) {
      for (const [bank, offset] of made.bankOffsets.entries()) {
        const session = await ort.InferenceSession.create(path, {
          externalData: [{ path: 'weights.bin', data: bytes.subarray(offset, offset + made.bankBytes) }],
          ...{ intraOpNumThreads: 1, interOpNumThreads: 1 },
        });
        const input = new ort.Tensor('float32', x.slice(0, tokens * made.hiddenSize), [tokens, made.hiddenSize]);
        const sums = (await session.run({ x: input })).y.data as Float32Array;
        await session.release();
        const expected = Buffer.from(sums.buffer, sums.byteOffset, sums.byteLength);
        const same = expected.equals(found.subarray(at, at + expected.length));
        t.ok(same, `${name}: ${tokens} tokens, ${clusters} clusters, bank ${bank}`);
        at += expected.length;
      }
    }
    t.equal(at, found.length);
  }
  const none = await openModelDirectory(await makeModel(join(scratch, 'none'), MODELS.moe, 'q4'));
  t.throws(() => denseWeights(none), { code: 'E_NPU', message: /none.*has no graphs for ONNX Runtime$/ });
});

t.test('what it holds is no more than it promises', needsLibrary, async (t) => {
  const program = (await programs)[0] as string;
  const sizes = { hidden: 1024, clusterNeurons: 512, clusters: 2, banks: 6, tokens: [1, 128] };
  const { weights } = makeWeights(join(scratch, 'large'), sizes);
  const made = await makeOnnxruntimeRequest(
    weights,
    [1, 128].map((tokens) => ({ tokens, clusters: 2 })),
    {},
  );
  for (const name of ['', 'CPUExecutionProvider']) {
    const provider = { ...made.provider, name };
    const text = await outputOf(program, writeRequest({ ...made, provider }, 'memory'), 'memory');
    const numbers = [...text.matchAll(/\d+/g)].map(Number);
    const [loaded, used, promised, one, onePromised] = numbers;
    t.equal(numbers.length, 5, text);
    t.ok(loaded > 0.5 * promised && loaded <= promised, `${loaded} of ${promised} bytes when loaded`);
    t.ok(used <= promised, `${used} of ${promised} bytes when used`);
    t.ok(one <= onePromised && one < loaded, `${one} of ${onePromised} bytes with one graph`);
  }
  t.comment(await outputOf(program, writeRequest(made, 'time'), 'time', '20'));
});

t.test('what cannot be opened is said in words', needsLibrary, async (t) => {
  const program = (await programs)[0] as string;
  const good = await request();
  const refused = async (change: Partial<OnnxruntimeRequest>, words: RegExp | string) => {
    const text = await outputOf(program, writeRequest({ ...good, ...change }, 'refused'), 'open');
    t.match(text, words, text);
  };
  await refused(
    { library: join(scratch, 'none.so') },
    /^FAILED: cannot load ONNX Runtime: .*none\.so: cannot open shared object file/,
  );
  const other = (await programs)[0] as string;
  copyFileSync(other, join(scratch, 'other.so'));
  await refused({ library: join(scratch, 'text.txt') }, /^FAILED: cannot load ONNX Runtime/);
  const shared = join(scratch, 'shared.so');
  await run('g++', ['-shared', '-fPIC', '-x', 'c++', '/dev/null', '-o', shared]);
  await refused({ library: shared }, /^FAILED: .*shared\.so is no ONNX Runtime: it has no OrtGetApiBase\n$/);
  const old = join(scratch, 'old.so');
  const source = join(scratch, 'old.cc');
  writeFileSync(
    source,
    `static const char* version() { return "1.21.0"; }
     static const void* api(unsigned) { return nullptr; }
     struct Base { const void* (*get)(unsigned); const char* (*version)(); };
     static const Base base{api, version};
     extern "C" const Base* OrtGetApiBase() { return &base; }`,
  );
  await run('g++', ['-shared', '-fPIC', source, '-o', old]);
  await refused({ library: old }, /^FAILED: .*old\.so is ONNX Runtime 1\.21\.0; 1\.22 or newer, below 2, is needed/);

  await refused({ weights: join(scratch, 'none.bin') }, /^FAILED: cannot map .*none\.bin: No such file/);
  const cut = join(scratch, 'cut.bin');
  copyFileSync(good.weights, cut);
  truncateSync(cut, 2 * good.bankBytes - 1);
  await refused({ weights: cut }, /^FAILED: .*cut\.bin has \d+ bytes; a bank of \d+ begins at \d+: it is cut off\n$/);
  await refused({ bankOffsets: [2 ** 53] }, /it is cut off\n$/);
  const changed = (change: object) => ({ graphs: [{ ...good.graphs[0], ...change }] });
  await refused(
    changed({ path: join(scratch, 'none.onnx') }),
    /^FAILED: cannot open .*none\.onnx: .*File doesn't exist/,
  );
  await refused(changed({ path: good.weights }), /^FAILED: cannot open .*weights\.bin: /);
  await refused(
    changed({ tokens: 2 }),
    /its input is \(1, 96\); expected x, floats \(2, 96\); convert the model again\n$/,
  );
  await refused({ hiddenSize: 64 }, /its input is \(1, 96\); expected x, floats \(1, 64\)/);
  const tensor = { ...good.graphs[0].tensors[0], offset: good.bankBytes - 1 };
  await refused(changed({ tensors: [tensor] }), /weights gate_0_weights are outside of a bank\n$/);
  const short = { ...good.graphs[0].tensors[0], bytes: 16 };
  await refused(changed({ tensors: [short] }), /^FAILED: cannot give .* its weights gate_0_weights: /);
  const named = (name: string, plugin = '') => ({ provider: { ...good.provider, name, library: plugin } });
  await refused(named('QNNExecutionProvider'), 'the provider QNNExecutionProvider finds no device here');
  await refused(
    named('QNNExecutionProvider', shared),
    /cannot load the provider QNNExecutionProvider from .*shared\.so: /,
  );
});

t.test('a graph file is looked through before anything is opened', async (t) => {
  const directory = join(scratch, 'damaged');
  mkdirSync(join(directory, NPU_FOLDER), { recursive: true });
  const file = join(directory, NPU_FOLDER, 't1-c1.onnx');
  const weights = { ...SMALL.weights, directory };
  const read = () => makeOnnxruntimeRequest(weights, [{ tokens: 1, clusters: 1 }], {});
  const external = (changes: Record<string, string>, tensor: object = {}) => {
    const entries = { location: 'weights.bin', offset: '0', length: '32', ...changes };
    const externalData = Object.entries(entries).map(([key, value]) => ({ key, value }));
    return [{ name: 'w', dataType: 1, dims: [8], dataLocation: 1, externalData, ...tensor }];
  };
  const write = (initializer: object[]) => writeFileSync(file, encodeModel('one', [], initializer, [1, 5]));
  const refused = (words: RegExp) => t.rejects(read(), { code: 'E_MODEL', message: words });

  await refused(/^cannot read .*t1-c1\.onnx: ENOENT/);
  writeFileSync(file, 'not a graph');
  await refused(/t1-c1\.onnx (is no graph|has no graph)/);
  writeFileSync(file, '');
  await refused(/has no graph in it$/);
  write([]);
  await refused(/names no weights$/);
  write(external({ location: '../../other.bin' }));
  await refused(/tensor "w" is in "..\/..\/other.bin"; expected weights\.bin$/);
  write(external({ length: '31' }));
  await refused(/has 31 bytes, which is not what its type and shape \(8\) take$/);
  write(external({}, { dims: [-8] }));
  await refused(/not what its type and shape/);
  write(external({}, { dataType: 8 }));
  await refused(/not what its type and shape/);
  write(external({ offset: String(SMALL.weights.bankBytes) }));
  await refused(/begins at \d+ of its bank and has 32 bytes; a bank has \d+$/);
  write(external({ offset: 'x' }));
  await refused(/begins at NaN/);
  truncateSync(file, 17 * 2 ** 20);
  await refused(/too many for a graph without weights$/);
});

t.test('the library is looked for', async (t) => {
  t.throws(() => findOnnxruntime(join(scratch, 'none.so')), {
    code: 'E_NPU',
    message: /none\.so is not there: ONNX Runtime cannot be loaded from it/,
  });
  t.equal(findOnnxruntime(SMALL.weights.directory), SMALL.weights.directory, 'what is given is taken');
  t.match(library, new RegExp(`${ONNXRUNTIME_LIBRARY}$`));
});

t.test('device profiles', async (t) => {
  t.strictSame(listDeviceProfiles(), ['linux-host', 'oneplus-12', 'oneplus-ace-2']);
  for (const name of listDeviceProfiles()) openDeviceProfile(name);
  t.throws(() => openDeviceProfile('oneplus-11'), { code: 'E_USAGE', hint: 'did you mean oneplus-12?' });
  t.throws(() => openDeviceProfile('none/at/all.json'), { code: 'E_FILE' });
  const profile = openDeviceProfile('oneplus-12');
  const parse = (change: (copy: DeviceProfile) => void) => {
    const copy = structuredClone(profile);
    change(copy);
    return parseDeviceProfile(JSON.stringify(copy), 'here.json');
  };
  t.strictSame(
    parse(() => {}),
    profile,
  );
  const refused = (change: (copy: DeviceProfile) => void, words: RegExp) =>
    t.throws(() => parse(change), { code: 'E_NPU', message: words });
  refused(
    (copy) => Object.assign(copy.provider!.options, { htp_archh: 75 }),
    /^here\.json: provider\.options: .*htp_archh/,
  );
  refused((copy) => Object.assign(copy.provider!.options, { htp_arch: 74 }), /provider\.options\.htp_arch/);
  refused(
    (copy) => Object.assign(copy.provider!, { library: '../x.so' }),
    /provider\.library: a file name without a folder/,
  );
  t.throws(() => parseDeviceProfile('{', 'here.json'), { code: 'E_NPU', message: /^here\.json is not JSON/ });

  t.strictSame(providerFiles(openDeviceProfile('linux-host')), []);
  const files = [
    'libonnxruntime_providers_qnn.so',
    'libQnnHtp.so',
    'libQnnSystem.so',
    'libQnnHtpPrepare.so',
    'libQnnHtpV75Stub.so',
    'libQnnHtpV75Skel.so',
  ];
  t.strictSame(providerFiles(profile), files);
  t.strictSame(providerFiles(openDeviceProfile('oneplus-ace-2')).slice(4), [
    'libQnnHtpV69Stub.so',
    'libQnnHtpV69Skel.so',
  ]);

  const place = join(scratch, 'phone');
  mkdirSync(place);
  const given = { library: join(place, 'libonnxruntime.so'), profile };
  for (const file of ['libonnxruntime.so', ...files.slice(0, 4)]) writeFileSync(join(place, file), '');
  const make = () => makeOnnxruntimeRequest(SMALL.weights, SHAPES, given);
  await t.rejects(make(), {
    code: 'E_NPU',
    message: `the NPU of OnePlus 12 (Snapdragon 8 Gen 3, SM8650) needs ${files.slice(4).join(', ')} in ${place}`,
  });
  for (const file of files) writeFileSync(join(place, file), '');
  t.strictSame((await make()).provider, {
    name: 'QNNExecutionProvider',
    library: join(place, 'libonnxruntime_providers_qnn.so'),
    options: {
      backend_path: join(place, 'libQnnHtp.so'),
      htp_performance_mode: 'burst',
      htp_arch: '75',
      soc_model: '57',
      vtcm_mb: '8',
    },
    sessionOptions: { 'session.disable_cpu_ep_fallback': '1' },
    contexts: join(SMALL.weights.directory, NPU_FOLDER, 'contexts-sm8650'),
  });
  const nowhere = { code: 'E_NPU', message: /where ONNX Runtime is/ };
  await t.rejects(
    makeOnnxruntimeRequest(SMALL.weights, SHAPES, { profile, library: undefined }),
    existsSync(library) ? { code: 'E_NPU' } : nowhere,
  );
  t.equal(new Pi2Error('E_NPU', '').exitStatus, 5);
});
