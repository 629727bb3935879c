// Builds the addon with the node-gyp that npm brings. Node's headers are taken from the installation beside `node` when it
// has them (distribution packages, nvm), so that nothing is downloaded; otherwise node-gyp fetches them once.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';

const prefix = path.resolve(process.execPath, '..', '..');
const args = ['rebuild', '--jobs=max', ...process.argv.slice(2)];
if (existsSync(path.join(prefix, 'include', 'node', 'node_api.h'))) args.push(`--nodedir=${prefix}`);

// npm sets npm_config_node_gyp for scripts it runs; without npm, find npm's own copy.
const nodeGyp = process.env.npm_config_node_gyp ?? findNodeGyp();
const result = spawnSync(process.execPath, [nodeGyp, ...args], { stdio: 'inherit' });
process.exit(result.status ?? 1);

function findNodeGyp() {
  const npm = path.join(prefix, 'lib', 'node_modules', 'npm', 'package.json');
  return createRequire(npm).resolve('node-gyp/bin/node-gyp.js');
}
