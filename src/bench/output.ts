import { describeRoofline } from '../report/roofline.js';
import type { BenchRow } from './row.js';
import { testName } from './runner.js';

/** Forms of a result. */
export const BENCH_OUTPUTS = ['md', 'csv', 'json', 'jsonl'] as const;
export type BenchOutput = (typeof BENCH_OUTPUTS)[number];

/** Text around rows and of each of them, so that rows can be shown as they finish. Every piece ends its line. */
export interface BenchPrinter {
  begin(): string;
  row(row: BenchRow): string;
  end(): string;
}

/** The printer of a form. `options`: columns of options that were given, beside those that are always there. */
export function benchPrinter(output: BenchOutput, options: readonly OptionColumn[]): BenchPrinter {
  switch (output) {
    case 'md':
      return new MarkdownPrinter(options);
    case 'csv':
      return new CsvPrinter();
    case 'json':
      return new JsonPrinter();
    case 'jsonl':
      return { begin: () => '', row: (row) => `${JSON.stringify(row)}\n`, end: () => '' };
  }
}

interface Column {
  title: string;
  width: number;
  cell(row: BenchRow): string;
  left?: boolean;
}

const MEBIBYTE = 2 ** 20;
const fixed = (value: number | null, digits: number, factor = 1) =>
  value === null ? '-' : (factor * value).toFixed(digits);

/** llama-bench's columns and widths, left and right of `test`. */
const MODEL_COLUMNS: readonly Column[] = [
  { title: 'model', width: 30, cell: (row) => row.model_type, left: true },
  { title: 'size', width: 10, cell: (row) => scaled(row.model_size, MEBIBYTE, 1024, ['MiB', 'GiB']) },
  { title: 'params', width: 10, cell: (row) => scaled(row.model_n_params, 1e6, 1000, ['M', 'B']) },
  { title: 'backend', width: 10, cell: (row) => row.backends, left: true },
  { title: 'threads', width: 7, cell: (row) => String(row.n_threads) },
];
const RESULT_COLUMNS: readonly Column[] = [
  { title: 'test', width: 15, cell: (row) => nameOf(row) },
  { title: 't/s', width: 18, cell: (row) => `${row.avg_ts.toFixed(2)} ± ${row.stddev_ts.toFixed(2)}` },
  { title: 'cache MiB', width: 9, cell: (row) => fixed(row.cache_bytes, 1, 1 / MEBIBYTE) },
  { title: 'hit %', width: 5, cell: (row) => fixed(row.hit_share, 1, 100) },
  { title: 'read MiB/t', width: 10, cell: (row) => fixed(row.flash_read_bytes_per_token, 2, 1 / MEBIBYTE) },
  { title: 'stall %', width: 7, cell: (row) => fixed(row.stall_share, 1, 100) },
  { title: 'I/O %', width: 5, cell: (row) => fixed(row.flash_bandwidth_share, 1, 100) },
  { title: 'RAM %', width: 5, cell: (row) => fixed(row.memory_bandwidth_share, 1, 100) },
  { title: 'peak MiB', width: 8, cell: (row) => fixed(row.peak_memory_bytes, 1, 1 / MEBIBYTE) },
  { title: 'load mode', width: 9, cell: (row) => row.load_mode },
];
/** Columns of options that show when they were given. */
const OPTION_COLUMNS = {
  memory: { title: 'memory', width: 8, cell: (row: BenchRow) => row.memory ?? '-' },
  exact: { title: 'exact', width: 5, cell: (row: BenchRow) => (row.predicted ? '0' : '1') },
  engine: { title: 'engine', width: 8, cell: (row: BenchRow) => row.engine },
  npu: { title: 'npu', width: 26, cell: (row: BenchRow) => row.npu },
  hotRatio: { title: 'hot', width: 5, cell: (row: BenchRow) => fixed(hotRatio(row), 2) },
  cpu: { title: 'kernels', width: 7, cell: (row: BenchRow) => row.kernel_set },
  npl: { title: 'n_pl', width: 4, cell: (row: BenchRow) => String(row.n_pl) },
} as const satisfies Record<string, Column>;
export type OptionColumn = keyof typeof OPTION_COLUMNS;

/** The ratio of what the test is about: of the tokens decoded together, or of a chunk of a prompt. */
function hotRatio({ npu_hot_ratios: ratios, n_gen, n_pl }: BenchRow): number | null {
  if (ratios === null) return null;
  const batches = ratios.length - 1;
  return (n_gen === 0 ? ratios[batches] : n_pl > batches ? null : ratios[n_pl - 1]) ?? null;
}

class MarkdownPrinter implements BenchPrinter {
  readonly #columns: readonly Column[];
  readonly #options: readonly Column[];
  readonly #rows: BenchRow[] = [];

  constructor(options: readonly OptionColumn[]) {
    this.#options = options.map((name) => OPTION_COLUMNS[name]);
    this.#columns = [...MODEL_COLUMNS, ...this.#options, ...RESULT_COLUMNS];
  }

  begin(): string {
    const rules = this.#columns.map(({ width, left }) => (left ? '-'.repeat(width) : `${'-'.repeat(width - 1)}:`));
    return line(this.#pad(({ title }) => title)) + line(rules);
  }

  row(row: BenchRow): string {
    this.#rows.push(row);
    return line(this.#pad((column) => column.cell(row)));
  }

  end(): string {
    const rooflines = this.#rows
      .map((row) => ({ name: [nameOf(row), ...this.#settings(row)].join(', '), text: describeRoofline(row) }))
      .filter(({ text }) => text !== '')
      .map(({ name, text }) => `roofline ${name}: ${text}\n`);
    const build =
      this.#rows[0] && `build: ${this.#rows[0].build_commit.slice(0, 12)} (${this.#rows[0].build_version})\n`;
    return `\n${rooflines.join('')}${build ?? ''}`;
  }

  #settings(row: BenchRow): string[] {
    return this.#options.map((column) => `${column.title} ${column.cell(row)}`);
  }

  #pad(text: (column: Column) => string): string[] {
    return this.#columns.map((column) =>
      column.left ? text(column).padEnd(column.width) : text(column).padStart(column.width),
    );
  }
}

function line(cells: readonly string[]): string {
  return `| ${cells.join(' | ')} |\n`;
}

/** Every field but the samples, all of them in quotes, as llama-bench does. */
class CsvPrinter implements BenchPrinter {
  #isFirst = true;

  begin(): string {
    return '';
  }

  row(row: BenchRow): string {
    const { samples_ns, samples_ts, ...fields } = row;
    const header = this.#isFirst ? `${Object.keys(fields).join(',')}\n` : '';
    this.#isFirst = false;
    return `${header}${Object.values(fields).map(quoted).join(',')}\n`;
  }

  end(): string {
    return '';
  }
}

function quoted(value: unknown): string {
  return `"${String(value ?? '').replaceAll('"', '""')}"`;
}

class JsonPrinter implements BenchPrinter {
  #isFirst = true;

  begin(): string {
    return '[\n';
  }

  row(row: BenchRow): string {
    const separator = this.#isFirst ? '' : ',\n';
    this.#isFirst = false;
    // The line is ended by what follows: a comma or the bracket.
    return `${separator}${JSON.stringify(row, null, 2).replace(/^/gm, '  ')}`;
  }

  end(): string {
    return this.#isFirst ? ']\n' : '\n]\n';
  }
}

function nameOf(row: BenchRow): string {
  return testName({ promptTokens: row.n_prompt, generatedTokens: row.n_gen, depth: row.n_depth });
}

/** Two decimals in the smaller or the larger unit. */
function scaled(value: number, unit: number, step: number, [small, large]: readonly [string, string]): string {
  const count = value / unit;
  return count < step ? `${count.toFixed(2)} ${small}` : `${(count / step).toFixed(2)} ${large}`;
}
