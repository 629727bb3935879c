// The kernels of every instruction set against double precision and against the scalar set: native/kernels/kernels_test.cc,
// built here for this machine and, where a cross compiler and QEMU are installed, for arm64.
import { execFile, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import t, { type Test } from 'tap';

const run = promisify(execFile);
const root = path.resolve(import.meta.dirname, '..');
const kernels = path.join(root, 'native', 'kernels');

const commonFlags = ['-std=c++20', '-O3', '-fno-exceptions', '-fno-rtti', `-I${root}`];
const avx2Flags = ['-mavx2', '-mfma', '-mf16c'];
const amxFlags = [
  ...avx2Flags,
  ...['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mavx512bf16', '-mamx-tile', '-mamx-bf16'],
];
const avx512Flags = [...avx2Flags, '-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mavx512vnni'];

/** The kernel sets of an architecture, with the flags binding.gyp gives them: each its own object, so that none reach others. */
function setsOf(architecture: string): Record<string, string[]> {
  if (architecture === 'arm64') return { scalar: [], neon: ['-march=armv8.2-a+dotprod+fp16'] };
  if (architecture !== 'x64') return { scalar: [] };
  const sets: Record<string, string[]> = { scalar: [], avx2: avx2Flags };
  if (existsSync(path.join(kernels, 'avx512.cc'))) Object.assign(sets, { avx512: avx512Flags, amx: amxFlags });
  return sets;
}

/** Builds the test program in `directory` and returns its path. */
async function build(compiler: string, architecture: string, directory: string, linkFlags: string[]): Promise<string> {
  const sets = setsOf(architecture);
  const units = { ...sets, dispatch: [], kernels_test: 'avx512' in sets ? ['-DPI2_HAVE_AVX512'] : [] };
  const objects: string[] = [];
  for (const [name, flags] of Object.entries(units)) {
    const object = path.join(directory, `${name}.o`);
    await run(compiler, [...commonFlags, ...flags, '-c', path.join(kernels, `${name}.cc`), '-o', object]);
    objects.push(object);
  }
  const program = path.join(directory, 'kernels_test');
  await run(compiler, [...linkFlags, ...objects, '-o', program]);
  return program;
}

function installed(command: string): boolean {
  return spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0;
}

/** Runs the program, which prints "name: N checks, 0 failed" for each of `sets`, or that the CPU cannot run it. */
async function expectPass(test: Test, command: string[], sets: string[]): Promise<void> {
  const [file, ...args] = command;
  const output = await run(file, args).then(
    ({ stdout }) => stdout,
    (error) => `${error.stdout}${error.message}`,
  );
  for (const set of sets) {
    test.match(output, new RegExp(`^${set}: ([1-9][0-9]+ checks, 0 failed|the CPU lacks it)$`, 'm'), `${set} kernels`);
  }
  test.notMatch(output, /FAILED|Command failed/, 'no check failed');
}

/** Why a test cannot run here, or false. */
function missing(...commands: string[]): string | false {
  const absent = commands.filter((command) => !installed(command));
  return absent.length > 0 && `not installed: ${absent.join(', ')}`;
}

t.test('kernels of this machine', { skip: missing('g++') }, async (t) => {
  const program = await build('g++', process.arch, t.testdir(), []);
  await expectPass(t, [program], Object.keys(setsOf(process.arch)));
});

const crossCompiler = 'aarch64-linux-gnu-g++';
const qemu = installed('qemu-aarch64-static') ? 'qemu-aarch64-static' : 'qemu-aarch64';
const noCross = process.arch === 'arm64' ? 'this machine is arm64 itself' : missing(crossCompiler, qemu);

t.test('arm64 kernels under QEMU', { skip: noCross }, async (t) => {
  const program = await build(crossCompiler, 'arm64', t.testdir(), ['-static']);
  await expectPass(t, [qemu, '-cpu', 'max', program], ['scalar', 'neon']);
});
