import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import ts from 'typescript';
import { REPOSITORY } from './shared.js';

/**
 * Compiles `src/` and `converter/` into a directory of its own inside the repository (ignored by git, removed when the test
 * ends), for tests that start the program as a process: without the test runner's loaders it is as small and as killable as
 * the real one. Returns the directory.
 */
export function compileProgram(): string {
  const target = join(REPOSITORY, '.tap', `compiled-${process.pid}`);
  for (const folder of ['src', 'converter']) {
    for (const file of readdirSync(join(REPOSITORY, folder), { recursive: true, encoding: 'utf8' })) {
      if (!/\.tsx?$/.test(file)) continue;
      const source = readFileSync(join(REPOSITORY, folder, file), 'utf8');
      const { outputText } = ts.transpileModule(source, {
        fileName: file,
        compilerOptions: {
          target: ts.ScriptTarget.ES2022,
          module: ts.ModuleKind.ESNext,
          jsx: ts.JsxEmit.ReactJSX,
          verbatimModuleSyntax: false,
        },
      });
      const path = join(target, folder, file.replace(/\.tsx?$/, '.js'));
      mkdirSync(dirname(path), { recursive: true });
      writeFileSync(path, outputText);
    }
  }
  process.once('exit', () => rmSync(target, { recursive: true, force: true }));
  return target;
}
