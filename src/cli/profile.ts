import { basename, resolve } from 'node:path';
import { Command, Option } from 'commander';
import { mergeProfiles } from '../../converter/activation/profile.js';
import { readProfile, requireReplaceable, writeProfile } from '../../converter/activation/profile-file.js';
import { cutText, PROFILE_CONTEXT, profileWindows } from '../../converter/activation/profiler.js';
import { profileStatistics } from '../../converter/activation/statistics.js';
import { Pi2Error } from '../base/error.js';
import { chooseContext, Engine } from '../engine/engine.js';
import { openModelDirectory } from '../format/model-directory.js';
import { describeProfile } from '../report/profile-table.js';
import { readTextFile } from '../text/text-file.js';
import { addEngineOptions, type EngineFlags, engineOptions, parseInteger } from './options.js';
import { log, Progress, withInterrupt, writeJson, writeOut } from './output.js';

interface ProfileFlags extends EngineFlags {
  model?: string;
  file?: string;
  output?: string;
  chunks: number;
  saveEvery: number;
  merge?: string[];
  show?: string;
  json?: boolean;
}

const CHUNKS_MAX = 1 << 30;
const SAVE_SECONDS_MAX = 86400;
const SAVE_SECONDS_DEFAULT = 30;

/** `profile`: counts which neurons fire on a text, merges such counts, shows them. */
export function profileCommand(): Command {
  const command = new Command('profile')
    .description('count which neurons fire on a text; merge and show such activation profiles')
    .option('-m, --model <NAME.pi2>', 'model directory that convert made')
    .option('-f, --file <file>', 'a UTF-8 text file to count on')
    .option('-o, --output <FILE>', 'profile to write (default: NAME.profile in this directory)')
    .addOption(
      new Option('--chunks <n>', 'windows to count at most; 0 is the whole text')
        .argParser(parseInteger(0, CHUNKS_MAX))
        .default(0),
    )
    .addOption(
      new Option('--save-every <seconds>', 'how often what is counted so far is saved')
        .argParser(parseInteger(1, SAVE_SECONDS_MAX))
        .default(SAVE_SECONDS_DEFAULT),
    )
    .option('--merge <FILE...>', 'add up profiles of one checkpoint into -o, without counting')
    .option('--show <FILE>', 'show the statistics of a profile, without counting');
  addEngineOptions(command, `tokens in a window; 0 is ${PROFILE_CONTEXT} or the model’s own if that is shorter`);
  command.option('--json', 'the statistics as one JSON object on stdout').addHelpText(
    'after',
    `
The text is tokenized once and cut into windows of CTX tokens, BOS included, without overlap. The model is run
over them exactly, and every neuron that fires is counted, for single tokens and for 2, 3 and 4 in a row. The
profile is saved now and then, and on Ctrl-C; an unfinished one is a valid profile of what was read. As with
llama-imatrix there is no resuming: count other texts, or other parts, into other files and merge them.

A profile is of a checkpoint: however it is quantized and in whatever order its neurons lie, it fits.
convert --profile FILE sorts neurons by it, the hottest first.

Examples:
  powerinfer2 profile -m bamboo.pi2 -f calibration.txt -o bamboo.profile
  powerinfer2 profile --merge stories.profile code.profile -o both.profile
  powerinfer2 profile --show both.profile`,
  );
  return command.action(profile);
}

async function profile(flags: ProfileFlags): Promise<void> {
  const given = [
    flags.model === undefined && flags.file === undefined ? null : 'count',
    flags.merge ? 'merge' : null,
    flags.show === undefined ? null : 'show',
  ].filter((what) => what !== null);
  const usage = 'give -m NAME.pi2 -f TEXT to count, --merge A B -o OUT to merge, or --show FILE';
  if (given.length !== 1) {
    throw new Pi2Error('E_USAGE', given.length === 0 ? 'nothing to do' : `${given.join(' and ')} at once`, usage);
  }
  if (flags.merge) return merge(flags.merge, flags);
  if (flags.show !== undefined) {
    if (flags.output !== undefined) throw new Pi2Error('E_USAGE', '--show writes no -o', usage);
    return show(flags.show, flags.json);
  }
  if (flags.model === undefined || flags.file === undefined) {
    throw new Pi2Error('E_USAGE', `${flags.model === undefined ? '-m' : '-f'} is not given`, usage);
  }
  return count(flags.model, flags.file, flags);
}

async function show(path: string, json?: boolean): Promise<void> {
  const found = await readProfile(path);
  const statistics = profileStatistics(found);
  const { shape, checkpoint, texts } = found;
  if (json) await writeJson({ type: 'profile', file: path, ...shape, checkpoint, texts, statistics });
  else await writeOut(describeProfile(statistics));
}

async function merge(paths: readonly string[], flags: ProfileFlags): Promise<void> {
  if (flags.output === undefined) throw new Pi2Error('E_USAGE', '--merge needs -o FILE', 'say where the sum goes');
  await requireReplaceable(flags.output);
  const profiles = [];
  for (const path of paths) profiles.push(await readProfile(path));
  const merged = mergeProfiles(profiles, paths);
  await writeProfile(flags.output, merged);
  log(`saved ${flags.output}: ${merged.batches[0]} tokens of ${merged.texts.length} texts, from ${paths.length} files`);
  await show(flags.output, flags.json);
}

async function count(modelPath: string, textPath: string, flags: ProfileFlags): Promise<void> {
  const output = flags.output ?? `${basename(resolve(modelPath)).replace(/\.pi2$/, '')}.profile`;
  await requireReplaceable(output);
  const text = await readTextFile(textPath);
  const model = await openModelDirectory(modelPath);
  const { context_length, ffn } = model.manifest.hyperparameters;
  const context = chooseContext(model, flags.ctxSize || Math.min(PROFILE_CONTEXT, context_length));
  const calibration = await cutText(model, text, context, flags.chunks);
  const total = calibration.windows.reduce((sum, window) => sum + window.length, 0);
  log(`${total} tokens in ${calibration.windows.length} windows of ${context}`);
  if (ffn.activation === 'silu') log('warning: the neurons of this model never rest (silu): all will count as fired');
  const isWhole = await withInterrupt(async (signal) => {
    const engine = await Engine.open(model, { ...engineOptions(flags), context, exact: true });
    const progress = new Progress();
    let savedAt = performance.now();
    try {
      const counted = await profileWindows(model, engine, calibration, async (run) => {
        progress.show(`${run.tokens} of ${total} tokens`);
        if (performance.now() - savedAt > 1000 * flags.saveEvery) {
          await writeProfile(output, run.profile());
          savedAt = performance.now();
        }
        return !signal.aborted;
      });
      await writeProfile(output, counted);
      progress.end();
      log(`saved ${output}: ${counted.batches[0]} tokens`);
      return counted.batches[0] === total;
    } finally {
      progress.end();
      await engine.close();
    }
  });
  if (!isWhole) {
    throw new Pi2Error(
      'E_INTERRUPTED',
      `stopped before the end of the text; ${output} is a valid profile of what was read`,
      'count the rest of the text into another file and --merge them',
    );
  }
  await show(output, flags.json);
}
