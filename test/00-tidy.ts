// Style is a failing test. What a formatter and a compiler cannot see: sizes, words, paths, docstrings, and that documents say
// what is there.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Command } from 'commander';
import t from 'tap';
import { ERROR_CODES, EXIT } from '../src/base/error.js';
import { benchCommand } from '../src/cli/bench.js';
import { convertCommand } from '../src/cli/convert.js';
import { evalCommand } from '../src/cli/eval.js';
import { inspectCommand } from '../src/cli/inspect.js';
import { perplexityCommand } from '../src/cli/perplexity.js';
import { profileCommand } from '../src/cli/profile.js';
import { runCommand } from '../src/cli/run.js';
import { verifyCommand } from '../src/cli/verify.js';
import { REPOSITORY } from './support/shared.js';

const SOURCE_LINES_MAX = 450;
/** A test file costs most of a second to start: few and larger ones. */
const TEST_LINES_MAX = 900;
/** Sources that may be longer, and why. */
const LONG_SOURCES: Record<string, string> = {
  'native/kernels/avx2.cc': 'all kernels of an instruction set are one file: nothing in it may be shared with another',
  'native/kernels/avx512.cc': 'the same',
  'native/kernels/amx.cc': 'the same',
  'native/kernels/neon.cc': 'the same',
  'native/kernels/kernels_test.cc': 'one program that tests every set, also where only it is copied to',
};

const SKIPPED =
  /^(\.git|\.tap|node_modules|build|dist|bench\/(cache|results|llama\/node_modules)|demo\/stories-drelu|test\/fixtures)(\/|$)|\.pi2/;
const TEXT =
  /\.(ts|tsx|js|mjs|cc|h|md|json|gyp|yml)$|^(bench\/llama\/\.npmrc|\.ci\/run)$|^\.(npmrc|taprc|editorconfig|gitignore|clang-format)$/;
const SOURCE = /\.(ts|tsx|js|mjs|cc|h)$/;
const SELF = 'test/00-tidy.ts';

const files = listFiles('').filter((file) => TEXT.test(file));
const textOf = new Map(files.map((file) => [file, readFileSync(join(REPOSITORY, file), 'utf8')]));
const read = (file: string) => textOf.get(file) as string;
const packageJson = JSON.parse(read('package.json'));
const documents = files.filter((file) => file.endsWith('.md'));
const commands = [
  convertCommand(),
  runCommand(),
  evalCommand(),
  perplexityCommand(),
  profileCommand(),
  benchCommand(),
  inspectCommand(),
  verifyCommand(),
];

/** Files of a folder of the repository, folders inside it included, by their paths from its root. */
function listFiles(folder: string): string[] {
  return readdirSync(join(REPOSITORY, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = folder === '' ? entry.name : `${folder}/${entry.name}`;
    if (SKIPPED.test(path)) return [];
    if (entry.isDirectory()) return listFiles(path);
    return entry.isFile() ? [path] : [];
  });
}

/** `file:line: text` of every line that matches. */
function findLines(among: readonly string[], pattern: RegExp): string[] {
  return among.flatMap((file) =>
    read(file)
      .split('\n')
      .flatMap((line, i) => (pattern.test(line) ? [`${file}:${i + 1}: ${line.trim()}`] : [])),
  );
}

/**
 * The declarations that match and have no comment right above. Declarations of one line may share the comment of the first of
 * them, and what a file is about may be said at its top.
 */
function findUndocumented(among: readonly string[], declaration: RegExp): string[] {
  return among.flatMap((file) => {
    const lines = read(file).split('\n');
    if (/^#pragma once\n\/\*\*/.test(read(file))) return [];
    return lines.flatMap((line, i) => {
      if (!declaration.test(line)) return [];
      let above = i - 1;
      // Between a comment and its declaration may stand: others of one line, template heads, suppressions of a lint.
      const isBetween = (text: string) => /^(template|\/\/ biome-ignore)/.test(text) || declaration.test(text);
      while (isBetween(lines[above] ?? '')) above--;
      return /(\*\/|^\s*\/\/.*)$/.test(lines[above] ?? '') ? [] : [`${file}:${i + 1}: ${line.trim()}`];
    });
  });
}

t.test('files have one concept and a readable length', async (t) => {
  const long = files
    .filter((file) => SOURCE.test(file))
    .map((file) => ({ file, lines: read(file).split('\n').length - 1 }))
    .filter(({ file, lines }) => lines > (file.startsWith('test/') ? TEST_LINES_MAX : SOURCE_LINES_MAX));
  t.strictSame(
    long.filter(({ file }) => !(file in LONG_SOURCES)),
    [],
  );
  const excused = Object.keys(LONG_SOURCES).filter((file) => !long.some((found) => found.file === file));
  t.strictSame(excused, [], 'no excuse is left over');
});

t.test('nothing is unfinished, and nothing knows the machine it was written on', async (t) => {
  const others = files.filter((file) => file !== SELF && !file.endsWith('package-lock.json'));
  t.strictSame(findLines(others, /\b(TODO|FIXME|XXX|HACK|WIP|TBD)\b|\bnot (yet )?implemented\b|\bplaceholder\b/i), []);
  t.strictSame(findLines(others, /(^|[^\w.-])\/(work|tmp|home|root)\//), [], 'no paths of a machine');
  const outsideSupport = others.filter((file) => !file.startsWith('test/support/'));
  t.strictSame(findLines(outsideSupport, /\.\.\/shared\b/), [], 'only test/support looks beside the repository');
  const core = files.filter((file) => /^(src|converter|native)\//.test(file) && file !== 'native/build.mjs');
  t.strictSame(findLines(core, /process\.env\b|\bgetenv\(/), [], 'no environment variables');
  t.strictSame(findLines(others, /[ \t]+$/), [], 'no blanks at the end of a line');
  t.strictSame(
    files.filter((file) => !/[^\n]\n$/.test(read(file))),
    [],
    'files end with one newline',
  );
});

t.test('what others call says what it does', async (t) => {
  const typescript = files.filter((file) => /^(src|converter|bench)\/.*\.tsx?$/.test(file));
  t.strictSame(findUndocumented(typescript, /^export (default )?(abstract )?(async )?(function|class)\b/), []);
  const headers = files.filter((file) => /^native\/.*\.h$/.test(file));
  t.strictSame(findUndocumented(headers, /^(class|struct|enum class) \w+.*\{/), []);
  t.strictSame(findUndocumented(headers, /^(?!static_assert|typedef|using|return)[\w:<][\w:<>*&, ]*\w\(/), []);
});

t.test('the lock names no registry, and leaves no package out', async (t) => {
  const lock = read('package-lock.json');
  t.notMatch(lock, /"resolved"/, 'no address of a package');
  t.notMatch(read('bench/llama/package-lock.json'), /"resolved"/, 'nor in the lock of the benchmarks');
  const configured = findLines(
    ['.npmrc', '.ci/run', 'package.json', 'bench/llama/.npmrc', 'bench/llama/package.json'],
    /https?:\/\/|\bregistry\b(?!-resolved)/,
  );
  t.strictSame(configured, []);
  const { packages } = JSON.parse(lock);
  const missing: string[] = [];
  for (const [path, entry] of Object.entries<Record<string, Record<string, string>>>(packages)) {
    for (const name of Object.keys({ ...entry.dependencies, ...entry.optionalDependencies })) {
      // As Node looks for it: in the package's own node_modules, then in those of the folders above.
      const folders = [path];
      for (let at = path; at !== ''; ) {
        at = at.slice(0, Math.max(0, at.lastIndexOf('node_modules/') - 1));
        folders.push(at);
      }
      const found = folders.some((folder) => `${folder}${folder === '' ? '' : '/'}node_modules/${name}` in packages);
      if (!found) missing.push(`${path}: ${name}`);
    }
  }
  t.strictSame(missing, [], 'npm ci refuses a lock that lacks a package, an optional one too');
});

t.test('every dependency is used, and DEPENDENCIES.md says what for', async (t) => {
  const { dependencies, optionalDependencies, devDependencies, overrides } = packageJson;
  const names = Object.keys({ ...dependencies, ...optionalDependencies, ...devDependencies });
  const rows = read('docs/DEPENDENCIES.md')
    .split('\n')
    .filter((line) => line.startsWith('|'))
    .map((line) => line.split('|')[1]);
  t.strictSame(
    names.filter((name) => !rows.some((row) => row.includes(`\`${name}\``))),
    [],
    'a line for each',
  );
  const ofBenchmarks = Object.keys(JSON.parse(read('bench/llama/package.json')).dependencies);
  const packages = rows.flatMap((row) => [...row.matchAll(/`(@?[\w-]+(?:\/[\w-]+)?)`/g)].map((match) => match[1]));
  const programs = ['aarch64-linux-gnu-g++', 'qemu-aarch64-static'];
  t.strictSame(
    packages.filter((name) => ![...names, ...ofBenchmarks, ...programs].includes(name)),
    [],
    'no line is left over',
  );
  const everything = [...files.filter((file) => SOURCE.test(file) || file === 'binding.gyp')].map(read).join('\n');
  const scripts = Object.values<string>(packageJson.scripts).join('\n');
  // Types come with what they type; the compiler and Biome are the scripts `tsc` and `biome`.
  const byOtherNames: Record<string, string> = {
    typescript: 'tsc',
    '@biomejs/biome': 'biome',
    'clang-format': 'clang-format',
  };
  const unused = names.filter((name) => {
    if (name.startsWith('@types/')) return false;
    // Only in place of the version that another package asks for.
    if (name in overrides) return false;
    if (name === 'react') return !/"jsx": "react-jsx"/.test(read('tsconfig.json'));
    if (name in byOtherNames) return !scripts.includes(byOtherNames[name]);
    return !new RegExp(`(from|import\\(|require\\()\\s*'${name}'`).test(everything);
  });
  t.strictSame(unused, []);
  const versions = Object.values<string>({ ...dependencies, ...optionalDependencies, ...devDependencies });
  t.strictSame(
    versions.filter((version) => !/^\d+\.\d+\.\d+$/.test(version)),
    [],
    'exact versions',
  );
});

t.test('documents name files, commands and options that are there', async (t) => {
  for (const document of documents) {
    const text = read(document);
    const folder = document.includes('/') ? document.slice(0, document.lastIndexOf('/')) : '';
    const links = [...text.matchAll(/\]\((?!https?:)([^)#]+)\)/g)].map((match) => join(folder, match[1]));
    const named = [...text.matchAll(/`((?:src|converter|native|test|bench|demo|docs|bin)\/[\w./-]*)`/g)];
    const paths = [...links, ...named.map((match) => match[1])];
    t.strictSame(
      paths.filter((path) => !existsSync(join(REPOSITORY, path)) && !/\.pi2$|node_modules/.test(path)),
      [],
      `paths in ${document}`,
    );
    const scripts = [...text.matchAll(/\bnpm run ([\w:]+)/g)];
    const unknown = scripts.map((match) => match[1]).filter((name) => !(name in packageJson.scripts));
    t.strictSame(unknown, [], `npm scripts in ${document}`);
    const called = [...text.matchAll(/^(?:\$ )?(?:npx )?powerinfer2 ([a-z]+)/gm)].map((match) => match[1]);
    t.strictSame(
      called.filter((name) => !commands.some((command) => command.name() === name)),
      [],
      `commands in ${document}`,
    );
  }
  const readme = read('README.md');
  for (const command of commands) t.ok(readme.includes(`powerinfer2 ${command.name()} `), `README: ${command.name()}`);
  const documented = documents.map(read).join('\n');
  const isMentioned = (flag: string | undefined) =>
    flag !== undefined && new RegExp(`(^|[\\s\`(])${flag}(?![\\w-])`, 'm').test(documented);
  const silent = commands.flatMap((command: Command) =>
    command.options.filter(({ long, short }) => !isMentioned(long) && !isMentioned(short)).map(({ flags }) => flags),
  );
  t.strictSame(silent, [], 'options that no document mentions');
  const ci = [...read('.ci/run').matchAll(/\blimited (npm(?: run)? \w+)/g)].map((match) => match[1]);
  t.strictSame(
    ci.filter((command) => !readme.includes(command)),
    [],
    'CI runs commands of the README',
  );
  t.ok(ci.length >= 4, 'CI installs, checks, tests and runs the demo');
});

t.test('every error and every exit status is documented', async (t) => {
  const troubleshooting = read('docs/TROUBLESHOOTING.md');
  const codes = Object.keys(ERROR_CODES);
  const mentioned = new Set(troubleshooting.match(/\bE_[A-Z_]+/g));
  t.strictSame([...mentioned].sort(), [...codes].sort());
  const table = read('README.md').match(/\| exit status \|[\s\S]*?\n\n/)?.[0] ?? '';
  const statuses = [...table.matchAll(/^\| (\d+) /gm)].map((match) => Number(match[1]));
  t.strictSame(statuses, Object.values(EXIT));
  // Messages that are quoted with a code are the program's: their parts between what varies stand in some source.
  const sources = files.filter((file) => /^(src|converter|native)\//.test(file)).map(read);
  const constants = new Map(
    [...sources.join('\n').matchAll(/const ([A-Z_]+) = '([^']*)'/g)].map(([, name, value]) => [name, value]),
  );
  const literals = sources.join('\n').replaceAll(/\$\{([^{}]*)\}/g, (_, name) => constants.get(name) ?? '…');
  const symptoms = [...troubleshooting.matchAll(/^\| (.*\(E_[A-Z_]+\).*?) \| /gm)].map((match) => match[1]);
  const quotes = symptoms.flatMap((symptom) => [...symptom.matchAll(/`([^`]+)`/g)].map((match) => match[1]));
  const parts = quotes.flatMap((quote) => quote.split(/[…":]|, /)).map((part) => part.trim());
  t.strictSame(
    parts.filter((part) => !literals.includes(part)),
    [],
    'quoted messages',
  );
  t.ok(parts.length > codes.length);
});
