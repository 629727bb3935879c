import { Command } from 'commander';
import { readModelProfile } from '../../converter/activation/profile-file.js';
import { profileStatistics } from '../../converter/activation/statistics.js';
import { type CheckedGraph, checkGraphs } from '../../converter/graph/check.js';
import { formatBytes } from '../base/bytes.js';
import { isSplit, wasteShare } from '../format/layout.js';
import type { Manifest, PredictorEntry } from '../format/manifest.js';
import { openModelDirectory } from '../format/model-directory.js';
import { bankLayout } from '../format/npu.js';
import { type PartSize, partSizes } from '../format/sizes.js';
import { formatShare, formatTable } from '../report/format.js';
import { describeCurve, predictorFacts, rankText } from '../report/predictor-table.js';
import { describeSummary, type ProfileSummary, profileSummary } from '../report/profile-table.js';
import { writeJson, writeOut } from './output.js';

/** `inspect`: what a model directory holds, from its manifest. */
export function inspectCommand(): Command {
  return new Command('inspect')
    .description('show what a model directory holds: shape, sizes by part, quantization, provenance')
    .argument('<NAME.pi2>', 'model directory')
    .option('--json', 'one JSON object on stdout')
    .addHelpText('after', '\nExamples:\n  powerinfer2 inspect bamboo.pi2')
    .action(inspect);
}

async function inspect(directory: string, flags: { json?: boolean }): Promise<void> {
  const model = await openModelDirectory(directory);
  const { manifest } = model;
  const sizes = partSizes(manifest);
  const counted = await readModelProfile(model);
  const profile = counted && profileSummary(profileStatistics(counted));
  const graphs = await checkGraphs(model);
  if (flags.json) await writeJson(inspection(manifest, sizes, profile, graphs));
  else await writeOut(describe(manifest, sizes, profile, graphs));
}

function inspection(
  manifest: Manifest,
  sizes: PartSize[],
  profile: ProfileSummary | null,
  graphs: CheckedGraph[],
): object {
  const { format, name, hyperparameters, quantization, layout, heat_order, predictor, provenance } = manifest;
  const total = totals(sizes);
  const parts = sizes.map(({ part, weights, bytes }) => ({
    part,
    weights,
    bytes,
    bits_per_weight: bitsPerWeight(weights, bytes),
    share: bytes / total.bytes,
  }));
  return {
    type: 'model',
    name,
    format_version: format.version,
    hyperparameters,
    quantization,
    weights: total.weights,
    bytes: total.bytes,
    parts,
    layout: { ...layout, waste_share: wasteShare(layout) },
    heat_order,
    profile,
    predictor: predictor === undefined ? null : predictorFacts(predictor),
    npu: npuFacts(manifest, graphs),
    provenance,
  };
}

function describe(
  manifest: Manifest,
  sizes: PartSize[],
  profile: ProfileSummary | null,
  graphs: CheckedGraph[],
): string {
  const { hyperparameters: h, quantization: q, layout, provenance } = manifest;
  const total = totals(sizes);
  const heads = `${h.head_count} heads of ${h.head_dim}, ${h.kv_head_count} for keys and values`;
  const { position } = h;
  const rotary = position.kind === 'rope' && `rotary, theta ${position.theta}${scalingText(position.scaling)}`;
  const experts = h.experts ? `${h.experts.count} experts, ${h.experts.used_per_token} a token, each of ` : '';
  const windows = h.attention.windows.filter((window) => window > 0);
  const shape: [string, string][] = [
    ['family', `${h.family}, ${(total.weights / 1e6).toFixed(1)} M weights`],
    ['layers', `${h.layer_count}, hidden size ${h.hidden_size}`],
    ['attention', windows.length > 0 ? `${heads}; sliding windows in ${windows.length} layers` : heads],
    ['ffn', `${experts}${h.neuron_count} neurons, ${h.ffn.activation}${h.ffn.gated ? '' : ', no gate'}`],
    ['positions', `${h.context_length}, ${rotary || 'learned'}`],
    ['vocabulary', `${h.vocab_size}${h.tied_embeddings ? ', head tied to the embedding' : ''}`],
    [
      'quantization',
      `${q.name}: ffn ${q.ffn}, attention ${q.attention}, embedding ${q.embedding}, head ${q.head}${q.down_tiles === undefined ? '' : ', Down in tiles'}`,
    ],
  ];
  const parts = [...sizes, { part: 'total', ...total }].map(({ part, weights, bytes }): [string, string] => {
    const bits = bitsPerWeight(weights, bytes);
    const share = formatShare(bytes / total.bytes).padStart(7);
    return [
      part,
      `${formatBytes(bytes).padStart(10)} ${share}${bits === null ? '' : `  ${bits.toFixed(2)} bits a weight`}`,
    ];
  });
  const bundles: [string, string][] = [
    ['part 1, part 2', `${layout.part1_bytes} and ${layout.part2_bytes} bytes, ${isSplit(layout) ? 'split' : 'joint'}`],
    ['unit', `${layout.neurons_per_unit} neurons in ${layout.unit_bytes} bytes`],
    ['waste', formatShare(wasteShare(layout))],
    ['heat order', profile === null ? 'none: as in the checkpoint' : `by profile: ${describeSummary(profile)}`],
  ];
  const { predictor } = manifest;
  const predictors: [string, string][] = predictor
    ? [
        ['source', predictor.source === 'trained' ? 'trained by the converter' : 'the checkpoint'],
        ['input', predictor.input === 'ffn_norm' ? 'what the FFN gets' : 'the residual stream after attention'],
        ['shape', `${rankText(predictor.ranks)}; fc1 ${predictor.fc1}, fc2 ${predictor.fc2}`],
        ['quality', qualityText(predictor.quality)],
      ]
    : [];
  const calibration = (provenance.calibration ?? []).map(({ sha256, tokens }): [string, string] => [
    'calibration',
    `${String(tokens).padStart(10)} tokens of the text with sha256 ${sha256}`,
  ]);
  const sources = provenance.sources.map(({ file, bytes, sha256 }): [string, string] => [
    file,
    `${formatBytes(bytes).padStart(10)}  sha256 ${sha256}`,
  ]);
  return [
    `${manifest.name}, format ${manifest.format.version}`,
    formatTable(shape),
    'Sizes by part',
    formatTable(parts),
    'Neuron bundles',
    formatTable(bundles),
    ...(predictor ? ['Predictor', formatTable(predictors), describeCurve(predictor)] : []),
    ...(graphs.length > 0 ? [describeBanks(manifest), formatTable(graphs.map(graphRow))] : []),
    `Provenance: made by ${provenance.converter} from`,
    formatTable([...sources, ...calibration]),
  ].join('\n');
}

/** What there is for a dense unit; null for nothing. */
function npuFacts({ npu, hyperparameters }: Manifest, graphs: CheckedGraph[]): object | null {
  if (npu === undefined) return null;
  return {
    cluster_neurons: npu.cluster_neurons,
    bank_bytes: bankLayout(hyperparameters).bytes,
    graphs: graphs.map(({ facts, ...graph }) => ({
      ...graph,
      nodes: facts?.nodes ?? null,
      weight_bytes: facts?.weightBytes ?? null,
    })),
  };
}

function describeBanks({ hyperparameters }: Manifest): string {
  const { clusters, bytes } = bankLayout(hyperparameters);
  const most = clusters[0].neurons;
  const cut = `${clusters.length} of ${most} neurons${clusters.length > 1 ? ' or fewer' : ''}`;
  return `Graphs for a dense unit: clusters ${cut}, ${formatBytes(bytes)} of weights a bank`;
}

function graphRow({ file, tokens, clusters, bytes, facts, problems }: CheckedGraph): [string, string] {
  if (facts === null) return [file, `no unit would take it: ${problems.join('; ')}`];
  const shape = `tokens ${String(tokens).padStart(3)}, clusters ${clusters}, nodes ${String(facts.nodes).padStart(2)}`;
  return [file, `${shape}, ${formatBytes(bytes).padStart(8)}, weights ${formatBytes(facts.weightBytes)}`];
}

function qualityText({ budget, tokens, exact_perplexity }: PredictorEntry['quality']): string {
  const most = `perplexity may grow by ${formatShare(budget)}`;
  return `${most}; judged on ${tokens} tokens, perplexity ${exact_perplexity.toFixed(3)} in exact mode`;
}

function scalingText(scaling: { kind: string; factor: number } | null): string {
  return scaling === null ? '' : `, ${scaling.kind} scaling by ${scaling.factor}`;
}

function totals(sizes: PartSize[]): { weights: number; bytes: number } {
  return sizes.reduce((sum, size) => ({ weights: sum.weights + size.weights, bytes: sum.bytes + size.bytes }), {
    weights: 0,
    bytes: 0,
  });
}

function bitsPerWeight(weights: number, bytes: number): number | null {
  return weights === 0 ? null : (8 * bytes) / weights;
}
