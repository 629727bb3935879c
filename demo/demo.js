// Converts the small trained checkpoint beside this file and lets it tell a story. `npm run demo` runs it.
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

const here = fileURLToPath(new URL('.', import.meta.url));
const program = fileURLToPath(new URL('../bin/powerinfer2.js', import.meta.url));
const model = `${here}stories-drelu.pi2`;

powerinfer2('convert', `${here}stories-drelu`, '-o', model, '--quant', 'q8', '--force');
powerinfer2('run', '-m', model, '-p', 'Once upon a time, there was a little fox who', '-n', '300', '--seed', '7');

function powerinfer2(...args) {
  console.error(`\n$ powerinfer2 ${args.map((arg) => (/\s/.test(arg) ? `"${arg}"` : arg)).join(' ')}`);
  const { status } = spawnSync(process.execPath, [program, ...args], { stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}
