/**
 * What keeps a graph from running on an NPU, found where it is made and where it is checked, not on the phone. Allowed is what
 * both providers take: ONNX Runtime's CPU provider from 1.20 on, and its QNN provider for Hexagon (HTP) from 2.4.0 on, as
 * documented in "Supported ONNX operators" of the QNN provider's page, for MatMulNBits in the checks of its op builder (4 bits
 * with blocks of 32, rows of whole blocks, three dimensions, no group index and no bias). HTP runs static shapes alone. A zero
 * point, weights per row or blocks of another length would be other numbers than those of the bundles.
 *
 * A file is untrusted bytes: everything is checked before it is used, and nothing is read that the graph does not name.
 */
import onnxProto from 'onnx-proto';
import { BLOCK } from '../../src/format/encoding.js';
import { CONTRIB_DOMAIN, CONTRIB_VERSION, IR_VERSION, OPSET_VERSION, WEIGHT_BITS } from './onnx.js';

const { onnx } = onnxProto;
const { FLOAT, UINT8, BOOL, INT64 } = onnx.TensorProto.DataType;

/** Ops of the standard domain. */
const OPS = new Set(['Add', 'Mul', 'Relu', 'Sigmoid', 'GreaterOrEqual', 'Where', 'Reshape']);
const CONTRIB_OPS = new Set(['MatMulNBits']);
/** Domains that ops may be of, and the newest version of each. */
const DOMAINS = new Map([
  ['', OPSET_VERSION],
  ['ai.onnx', OPSET_VERSION],
  [CONTRIB_DOMAIN, CONTRIB_VERSION],
]);
/** Types of tensors. INT64 is for the shapes that Reshape has as constants. */
const TYPES = new Map<number, string>([
  [FLOAT, 'float'],
  [UINT8, 'uint8'],
  [BOOL, 'bool'],
  [INT64, 'int64'],
]);
const TYPE_BYTES = new Map<number, number>([
  [FLOAT, 4],
  [UINT8, 1],
]);
/** Dimensions of what HTP multiplies, and the most of anything here. */
const PRODUCT_RANK = 3;
/** A graph of more weights does not load on HTP. */
const WEIGHTS_BYTES_MAX = 2 * 1024 ** 3;
/** A graph holds no weights: this is far more than any. */
export const GRAPH_BYTES_MAX = 1024 * 1024;
/** Problems named; a file that is not ours can have any number. */
const PROBLEMS_MAX = 20;

/** What the lint finds out on the way, for people. */
export interface GraphFacts {
  /** Of the first input: its first dimension. */
  tokens: number;
  nodes: number;
  /** Bytes of external weights that it names. */
  weightBytes: number;
}

/** The files beside a graph, by name, with their sizes. */
export type Neighbours = ReadonlyMap<string, number>;

/** Checks the bytes of an `.onnx` file. Never throws: what is wrong is in `problems`, in words, and then `facts` is null. */
export function lintGraph(bytes: Uint8Array, neighbours: Neighbours): { problems: string[]; facts: GraphFacts | null } {
  if (bytes.length > GRAPH_BYTES_MAX)
    return { problems: [`it has ${bytes.length} bytes, more than any graph`], facts: null };
  let model: onnxProto.onnx.ModelProto;
  try {
    model = onnx.ModelProto.decode(bytes);
  } catch (error) {
    return { problems: [`it is not an ONNX model: ${(error as Error).message}`], facts: null };
  }
  const lint = new GraphLint(model, neighbours);
  const problems = lint.run();
  const more = problems.length - PROBLEMS_MAX;
  if (more > 0) return { problems: [...problems.slice(0, PROBLEMS_MAX), `and ${more} more`], facts: null };
  return { problems, facts: problems.length === 0 ? lint.facts() : null };
}

type Tensor = onnxProto.onnx.ITensorProto;
type Node = onnxProto.onnx.INodeProto;
type ValueInfo = onnxProto.onnx.IValueInfoProto;

class GraphLint {
  readonly #problems: string[] = [];
  readonly #constants = new Map<string, Tensor>();
  /** Shapes of everything that has one. */
  readonly #dims = new Map<string, number[]>();
  #weightBytes = 0;

  constructor(
    private readonly model: onnxProto.onnx.IModelProto,
    private readonly neighbours: Neighbours,
  ) {}

  run(): string[] {
    const { graph } = this.model;
    this.#versions();
    if (!graph) {
      this.#add('it has no graph');
      return this.#problems;
    }
    if (this.model.functions?.length) this.#add('it defines functions of its own');
    if (graph.sparseInitializer?.length) this.#add('it has sparse tensors');
    for (const tensor of graph.initializer ?? []) this.#constant(tensor);
    const [inputs, outputs, others] = [graph.input ?? [], graph.output ?? [], graph.valueInfo ?? []];
    if (inputs.length !== 1 || outputs.length !== 1) {
      this.#add(`it has ${inputs.length} inputs and ${outputs.length} outputs, not one of each`);
    }
    for (const value of [...inputs, ...outputs, ...others]) this.#value(value);
    this.#nodes(graph.node ?? [], inputs, outputs);
    if (this.#weightBytes > WEIGHTS_BYTES_MAX)
      this.#add(`it has ${this.#weightBytes} bytes of weights, more than 2 GiB`);
    return this.#problems;
  }

  facts(): GraphFacts {
    const { graph } = this.model;
    const tokens = this.#dims.get(graph?.input?.[0].name ?? '')?.[0] ?? 0;
    return { tokens, nodes: graph?.node?.length ?? 0, weightBytes: this.#weightBytes };
  }

  #add(problem: string): void {
    this.#problems.push(problem);
  }

  #versions(): void {
    const { irVersion, opsetImport } = this.model;
    if (Number(irVersion) > IR_VERSION) this.#add(`its IR version ${irVersion} is above ${IR_VERSION}`);
    if (!opsetImport?.length) this.#add('it does not say what versions of ops it is made of');
    for (const { domain, version } of opsetImport ?? []) {
      const most = DOMAINS.get(domain ?? '');
      if (most === undefined) this.#add(`it imports the foreign domain ${quote(domain)}`);
      else if (Number(version) > most) this.#add(`it imports version ${version} of ${quote(domain)}, above ${most}`);
    }
  }

  /** An input, an output or what lies between: of a type that HTP has, every dimension a number. */
  #value({ name, type }: ValueInfo): void {
    const tensor = type?.tensorType;
    if (!tensor) {
      this.#add(`${quote(name)} is no tensor`);
      return;
    }
    this.#type(name, tensor.elemType);
    if (!tensor.shape) {
      this.#add(`${quote(name)} has no shape`);
      return;
    }
    const dims = (tensor.shape.dim ?? []).map(({ dimParam, dimValue }, i) => {
      const size = Number(dimValue ?? 0);
      if (dimParam) this.#add(`${quote(name)}: dimension ${i} is dynamic (${quote(dimParam)})`);
      else if (!Number.isSafeInteger(size) || size < 1) this.#add(`${quote(name)}: dimension ${i} is dynamic`);
      return size;
    });
    this.#dims.set(name ?? '', dims);
  }

  #type(name: string | null | undefined, type: number | null | undefined): void {
    if (!TYPES.has(type ?? 0)) this.#add(`${quote(name)} has the foreign type ${typeName(type)}`);
  }

  #constant(tensor: Tensor): void {
    const { name, dataType, dims, dataLocation } = tensor;
    if (this.#constants.has(name ?? '')) this.#add(`the tensor ${quote(name)} is there twice`);
    this.#constants.set(name ?? '', tensor);
    this.#type(name, dataType);
    const sizes = (dims ?? []).map(Number);
    this.#dims.set(name ?? '', sizes);
    if (dataLocation === onnx.TensorProto.DataLocation.EXTERNAL) this.#external(tensor, sizes);
  }

  /** Weights in a file beside the graph, inside of it, and as many bytes as the shape takes. */
  #external({ name, dataType, externalData }: Tensor, sizes: number[]): void {
    const entries = new Map((externalData ?? []).map(({ key, value }) => [key ?? '', value ?? '']));
    const location = entries.get('location') ?? '';
    const [offset, length] = ['offset', 'length'].map((key) => Number(entries.get(key) || Number.NaN));
    const size = this.neighbours.get(location);
    const wanted = sizes.reduce((product, dim) => product * dim, TYPE_BYTES.get(dataType ?? 0) ?? Number.NaN);
    if (!/^[\w.-]+$/.test(location) || location.startsWith('..')) {
      this.#add(`the weights of ${quote(name)} leave the directory: ${quote(location)}`);
    } else if (size === undefined) {
      this.#add(`the weights of ${quote(name)} are in ${quote(location)}, which is not beside the graph`);
    } else if (!isSize(offset) || !isSize(length) || length > size - offset) {
      const where = `bytes ${entries.get('offset')} and ${entries.get('length')} more`;
      this.#add(`the weights of ${quote(name)} lie outside of ${location}, which has ${size} bytes: ${where}`);
    } else if (length !== wanted) {
      this.#add(`the weights of ${quote(name)} have ${length} bytes, their shape takes ${wanted}`);
    } else {
      this.#weightBytes += length;
    }
  }

  #nodes(nodes: Node[], inputs: ValueInfo[], outputs: ValueInfo[]): void {
    const known = new Set([...inputs.map(({ name }) => name ?? ''), ...this.#constants.keys()]);
    for (const node of nodes) {
      const { opType, domain, input, output, attribute } = node;
      const isStandard = !domain || domain === 'ai.onnx';
      if (!isStandard && domain !== CONTRIB_DOMAIN) {
        this.#add(`the node ${quote(node.name)} is of the foreign domain ${quote(domain)}`);
      } else if (!(isStandard ? OPS : CONTRIB_OPS).has(opType ?? '')) {
        this.#add(`the node ${quote(node.name)} is the foreign op ${quote(opType)}`);
      } else if (opType === 'MatMulNBits') {
        this.#product(node);
      } else if (attribute?.length) {
        this.#add(`the node ${quote(node.name)} has attributes, which ${opType} takes none of here`);
      } else if (opType === 'Reshape' && !this.#constants.has(input?.[1] ?? '')) {
        this.#add(`the node ${quote(node.name)} has a shape that is computed`);
      }
      for (const name of input ?? []) {
        if (name !== '' && !known.has(name))
          this.#add(`the node ${quote(node.name)} reads ${quote(name)}, which is not there`);
      }
      for (const name of output ?? []) {
        if (known.has(name)) this.#add(`${quote(name)} is written twice`);
        known.add(name);
        if (!this.#dims.has(name)) this.#add(`${quote(name)} has no shape`);
      }
    }
    for (const { name } of outputs) if (!known.has(name ?? '')) this.#add(`the output ${quote(name)} is not computed`);
  }

  /** A product: 4 bits, blocks of 32, symmetric, of the shapes that it says. */
  #product({ name, input, output, attribute }: Node): void {
    const numbers = new Map((attribute ?? []).map(({ name: key, i }) => [key ?? '', Number(i)]));
    const { K = 0, N = 0, bits = 0, block_size = 0 } = Object.fromEntries(numbers);
    const [x = '', weights = '', scales = '', ...more] = input ?? [];
    const where = `the product ${quote(name)}`;
    if (bits !== WEIGHT_BITS) this.#add(`${where} has weights of ${bits} bits, not ${WEIGHT_BITS}`);
    if (block_size !== BLOCK) this.#add(`${where} has blocks of ${block_size} weights, not ${BLOCK}`);
    if (more[0]) this.#add(`${where} has zero points: it is not symmetric`);
    if (more.slice(1).some((text) => text !== '')) this.#add(`${where} has a group index or a bias`);
    if (!isSize(N) || N === 0 || !isSize(K) || K === 0 || K % BLOCK !== 0) {
      this.#add(`${where} is of ${N} rows of ${K} weights, which are no whole blocks`);
      return;
    }
    const rank = this.#dims.get(x)?.length;
    if (rank !== PRODUCT_RANK) this.#add(`${where} multiplies ${rank ?? 'no known'} dimensions, not ${PRODUCT_RANK}`);
    const want = (value: string, what: string, type: number, dims: number[]) => {
      const tensor = this.#constants.get(value);
      if (tensor?.dataLocation !== onnx.TensorProto.DataLocation.EXTERNAL)
        this.#add(`${where}: its ${what} are not in a file`);
      const found = this.#dims.get(value) ?? [];
      if (tensor?.dataType !== type || found.join() !== dims.join()) {
        this.#add(
          `${where}: its ${what} are ${typeName(tensor?.dataType)} [${found}], not ${TYPES.get(type)} [${dims}]`,
        );
      }
    };
    want(weights, 'weights', UINT8, [N, K / BLOCK, BLOCK / 2]);
    want(scales, 'scales', FLOAT, [N, K / BLOCK]);
    const ends = [this.#dims.get(x)?.at(-1), this.#dims.get(output?.[0] ?? '')?.at(-1)];
    if (ends[0] !== K || ends[1] !== N)
      this.#add(`${where} makes ${ends[1]} of ${ends[0]} numbers, its weights ${N} of ${K}`);
  }
}

function isSize(number: number): boolean {
  return Number.isSafeInteger(number) && number >= 0;
}

/** A name out of a file that can hold anything. */
function quote(name: string | null | undefined): string {
  return JSON.stringify((name ?? '').slice(0, 80));
}

function typeName(type: number | null | undefined): string {
  return TYPES.get(type ?? 0) ?? onnx.TensorProto.DataType[type ?? 0]?.toLowerCase() ?? String(type);
}
