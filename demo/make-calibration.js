// Writes calibration.txt beside this file: stories that the demo's model tells, each sampled with a prompt and a seed of its
// own. The file is in the repository, so this need not be run: it says where the text comes from.
import { spawnSync } from 'node:child_process';
import { rmSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const here = fileURLToPath(new URL('.', import.meta.url));
const program = fileURLToPath(new URL('../bin/powerinfer2.js', import.meta.url));
const model = `${here}calibration-maker.pi2`;
const STORIES = 96;
/** With the prompt they fit the model's 512 positions. */
const TOKENS_MOST = 460;

const BEGINNINGS = [
  'Once upon a time, there was',
  'One day,',
  'In a small town near the sea lived',
  'Every morning,',
  'Long ago, in a big forest,',
  'It was raining, and',
];
const SUBJECTS = [
  'a little girl who wanted to',
  'an old man with a dog that could',
  'two brothers who found',
  'a brave rabbit who was afraid of',
  'a boy named Sam and his new',
  'a bird that did not know how to',
  'the teacher and a very quiet',
  'a cat that lost its',
];

const stories = [];
powerinfer2('convert', `${here}stories-drelu`, '-o', model, '--quant', 'f16', '--force');
for (let seed = 1; seed <= STORIES; seed++) {
  const beginning = BEGINNINGS[seed % BEGINNINGS.length];
  const subject = SUBJECTS[Math.floor(seed / BEGINNINGS.length) % SUBJECTS.length];
  const sampling = ['--temp', '0.9', '--seed', String(seed), '-n', String(TOKENS_MOST)];
  stories.push(powerinfer2('run', '-m', model, '-p', `${beginning} ${subject}`, ...sampling).trim());
}
rmSync(model, { recursive: true });
writeFileSync(`${here}calibration.txt`, `${stories.join('\n\n')}\n`);

function powerinfer2(...args) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [program, ...args], { encoding: 'utf8' });
  if (status === 0) return stdout;
  console.error(stderr);
  process.exit(status ?? 1);
}
