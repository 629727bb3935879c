import { render, Text } from 'ink';
import { formatBytes } from '../base/bytes.js';
import { formatDuration } from '../base/duration.js';

/** How far a long job has come. */
export interface ProgressState {
  step: string;
  bytesDone: number;
  bytesTotal: number;
  bytesPerSecond: number;
  secondsLeft: number | null;
}

const BAR_WIDTH = 30;

/** One line: bar, share, bytes, rate, time left, step. */
export function ProgressLine({ state }: { state: ProgressState }) {
  const share = state.bytesTotal > 0 ? state.bytesDone / state.bytesTotal : 1;
  const full = Math.floor(share * BAR_WIDTH);
  return (
    <Text wrap="truncate">
      <Text color="cyan">{'█'.repeat(full)}</Text>
      <Text dimColor>{'░'.repeat(BAR_WIDTH - full)}</Text>
      {` ${String(Math.floor(100 * share)).padStart(3)} %  ${formatBytes(state.bytesDone)} of ${formatBytes(state.bytesTotal)}`}
      {`  ${formatBytes(Math.round(state.bytesPerSecond))}/s`}
      {state.secondsLeft === null ? '' : `  ${formatDuration(state.secondsLeft)} left`}
      {`  ${state.step}`}
    </Text>
  );
}

/** A live progress line on a terminal. */
export interface ProgressView {
  update(state: ProgressState): void;
  /** Prints a line above the bar. */
  note(text: string): void;
  /** Takes the bar away. */
  close(): void;
}

/** Shows a progress line on stderr, which must be a terminal. */
export function showProgress(): ProgressView {
  const options = { stdout: process.stderr, exitOnCtrlC: false, patchConsole: false };
  const instance = render(<Text dimColor>reading the checkpoint</Text>, options);
  return {
    update: (state) => instance.rerender(<ProgressLine state={state} />),
    note: (text) => {
      instance.clear();
      process.stderr.write(`${text}\n`);
    },
    close: () => {
      instance.clear();
      instance.unmount();
    },
  };
}
