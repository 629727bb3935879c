import { TRACE_RECORDS, TraceFile } from '../trace/trace-file.js';
import { log } from './output.js';

/** Runs `work` with the file of `--trace`, or with null if none is wanted; afterwards the file is whole. */
export async function withTrace<T>(
  path: string | undefined,
  work: (trace: TraceFile | null) => Promise<T>,
): Promise<T> {
  if (path === undefined) return work(null);
  const trace = TraceFile.open(path);
  try {
    return await work(trace);
  } finally {
    trace.close();
    if (trace.dropped > 0) log(`trace: ${trace.dropped} events did not fit, the oldest of their steps are left out`);
  }
}

/** What an engine is opened with to be traced. */
export function traceOptions(trace: TraceFile | null): { traceRecords?: number } {
  return trace === null ? {} : { traceRecords: TRACE_RECORDS };
}
