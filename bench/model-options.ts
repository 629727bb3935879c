import { type Command, Option } from 'commander';
import { nearestName, Pi2Error } from '../src/base/error.js';
import { QUANTIZATIONS, type QuantizationName } from '../src/format/manifest.js';
import { SETTINGS, type Setting } from './activation-settings.js';
import type { ModelRequest } from './models.js';
import { SHAPES, type Shape, shapeOf } from './shapes.js';

/** Options that say which synthetic model is wanted. */
export interface ModelFlags {
  shape: Shape;
  statistics?: Setting;
  quant: QuantizationName;
  npu?: boolean;
  checkpoint?: boolean;
  large?: boolean;
}

/** Adds the options of `ModelFlags`. */
export function addModelOptions(command: Command): Command {
  const shape = new Option('--shape <name>', `synthetic model: ${SHAPES.map(({ name }) => name).join(', ')}`);
  const statistics = `how neurons of a -drelu shape fire: ${SETTINGS.join(' (the default), ')}`;
  return command
    .addOption(shape.argParser(shapeOf).default(SHAPES[0], SHAPES[0].name))
    .option('--statistics <name>', statistics, parseSetting)
    .addOption(new Option('--quant <kind>', 'how weights are stored').choices(QUANTIZATIONS).default('q4'))
    .option('--npu', 'with graphs and weights for a dense unit')
    .option('--checkpoint', 'through a checkpoint on disk (14.5 GB for 7B), so that conversion is measured')
    .option('--large', 'allow shapes of tens of gigabytes');
}

/** What the options ask for. */
export function requestOf({ shape, statistics, quant, npu, checkpoint, large }: ModelFlags): ModelRequest {
  return {
    shape,
    setting: statistics,
    quantization: quant,
    withGraphs: npu === true,
    withCheckpoint: checkpoint === true,
    isLargeAllowed: large === true,
  };
}

function parseSetting(text: string): Setting {
  const found = SETTINGS.find((setting) => setting === text);
  if (found) return found;
  const nearest = nearestName(text, SETTINGS);
  const known = `known: ${SETTINGS.join(', ')}`;
  throw new Pi2Error(
    'E_USAGE',
    `--statistics ${text} is unknown`,
    nearest ? `did you mean ${nearest}? ${known}` : known,
  );
}
