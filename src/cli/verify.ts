import { Command } from 'commander';
import { checkGraphs } from '../../converter/graph/check.js';
import { formatBytes } from '../base/bytes.js';
import { EXIT } from '../base/error.js';
import { loadAddon } from '../engine/addon.js';
import { verifyModel } from '../engine/verify.js';
import { openModelDirectory } from '../format/model-directory.js';
import { ExitWith, Progress, throwIfInterrupted, withInterrupt, writeJson, writeOut } from './output.js';

/** `verify`: every checksum of a model directory. */
export function verifyCommand(): Command {
  return new Command('verify')
    .description('check every byte of a model directory against its checksums, and graphs for what a dense unit takes')
    .argument('<NAME.pi2>', 'model directory')
    .option('--json', 'one JSON object a line: each wrong extent, then the result')
    .addHelpText('after', '\nExamples:\n  powerinfer2 verify bamboo.pi2')
    .action(verify);
}

async function verify(directory: string, flags: { json?: boolean }): Promise<void> {
  const model = await openModelDirectory(directory);
  const addon = loadAddon();
  const { extents } = model.manifest;
  const total = extents.reduce((sum, extent) => sum + extent.bytes, 0);
  const start = performance.now();
  const wrong = await withInterrupt(async (signal) => {
    const line = new Progress();
    const progress = (bytes: number) => {
      throwIfInterrupted(signal);
      line.show(`${formatBytes(bytes)} of ${formatBytes(total)}`);
    };
    try {
      return await verifyModel(model, addon, { threads: addon.cpu().cores, progress });
    } finally {
      line.end();
    }
  });
  const graphs = await checkGraphs(model);
  for (const { file, problems } of graphs) if (problems.length > 0) wrong.push({ extent: 'graph', file, problems });
  const seconds = (performance.now() - start) / 1000;
  for (const { extent, file, problems } of wrong) {
    if (flags.json) await writeJson({ type: 'wrong_extent', extent, file, problems });
    else await writeOut(`wrong: ${extent} (${file})\n${problems.map((problem) => `  ${problem}\n`).join('')}`);
  }
  const counts = {
    ok: wrong.length === 0,
    extents: extents.length,
    graphs: graphs.length,
    wrong_extents: wrong.length,
    bytes: total,
  };
  if (flags.json) {
    await writeJson({ type: 'verify', ...counts });
  } else if (counts.ok) {
    const and = graphs.length > 0 ? ` and ${graphs.length} graphs` : '';
    await writeOut(`ok: ${extents.length} extents${and}, ${formatBytes(total)}, ${seconds.toFixed(1)} s\n`);
  } else {
    await writeOut(`${wrong.length} of ${extents.length} extents are wrong: convert the checkpoint again\n`);
  }
  if (!counts.ok) throw new ExitWith(EXIT.failed);
}
