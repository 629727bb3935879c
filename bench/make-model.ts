import { Command } from 'commander';
import { addModelOptions, type ModelFlags, requestOf } from './model-options.js';
import { prepareSynthetic } from './models.js';
import { log, runProgram } from './program.js';

/** `npm run bench:models`: makes a synthetic model of a real one's shape and leaves it in bench/cache. */
function buildProgram(): Command {
  const command = new Command('bench:models').description(
    'make a synthetic model of a real one’s shape in bench/cache',
  );
  return addModelOptions(command).action(make);
}

async function make(flags: ModelFlags): Promise<void> {
  const { path, made, conversion } = await prepareSynthetic(requestOf(flags), log);
  if (conversion)
    log(`converted in ${conversion.seconds.toFixed(1)} s, peak memory ${conversion.peakMemoryBytes} bytes`);
  if (made.length === 0) log('it is there already');
  process.stdout.write(`${path}\n`);
}

await runProgram(buildProgram());
