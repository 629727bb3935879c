import { readFileSync, writeFileSync } from 'node:fs';

/** A tensor to be written: bytes as they stand in the file. */
export interface RawTensor {
  name: string;
  dtype: string;
  shape: number[];
  bytes: Uint8Array;
}

/** A header as JSON has it; tests put anything in it. */
// biome-ignore lint/suspicious/noExplicitAny: tests write wrong values on purpose.
export type Header = Record<string, any>;

/** The bytes of a safetensors file. */
export function safetensors(tensors: RawTensor[]): Buffer {
  const header: Header = { __metadata__: { format: 'pt' } };
  let offset = 0;
  for (const { name, dtype, shape, bytes } of tensors) {
    header[name] = { dtype, shape, data_offsets: [offset, offset + bytes.length] };
    offset += bytes.length;
  }
  return withHeader(JSON.stringify(header), Buffer.concat(tensors.map(({ bytes }) => bytes)));
}

/** A file with this header text, padded with spaces to a multiple of 8 as the format's own writer does. */
export function withHeader(header: string, data: Uint8Array): Buffer {
  const text = Buffer.from(header.padEnd(Math.ceil(Buffer.byteLength(header) / 8) * 8));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text, data]);
}

/** Splits a safetensors file into its header and the data behind. */
export function splitFile(path: string): { header: Header; data: Buffer } {
  const file = readFileSync(path);
  const dataOffset = 8 + Number(file.readBigUInt64LE());
  return { header: JSON.parse(file.toString('utf8', 8, dataOffset)), data: file.subarray(dataOffset) };
}

/** Rewrites the header of a safetensors file after `edit` has changed it, leaving the data as they are. */
export function editHeader(path: string, edit: (header: Header) => void): void {
  const { header, data } = splitFile(path);
  edit(header);
  writeFileSync(path, withHeader(JSON.stringify(header), data));
}

/** Rewrites the first numbers of a tensor in place, e.g. with a NaN. */
export function editTensor(path: string, name: string, edit: (bytes: Buffer) => void): void {
  const { header, data } = splitFile(path);
  const [begin, end] = header[name].data_offsets;
  edit(data.subarray(begin, end));
  writeFileSync(path, withHeader(JSON.stringify(header), data));
}
