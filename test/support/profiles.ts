import { checkpointDigest, emptyProfile } from '../../converter/activation/profile.js';
import { writeProfile } from '../../converter/activation/profile-file.js';
import { openModelDirectory } from '../../src/format/model-directory.js';
import { profileShape } from '../../src/format/profile-header.js';
import { Random } from './numbers.js';

/** Writes a profile of a model's checkpoint whose counts are random: it sorts neurons at random. Resolves with its path. */
export async function writeRandomProfile(modelPath: string, path: string, seed: number): Promise<string> {
  const { hyperparameters: h, provenance } = (await openModelDirectory(modelPath)).manifest;
  const profile = emptyProfile(profileShape(h), checkpointDigest(h, provenance.sources));
  const random = new Random(seed);
  profile.batches = [100, 100, 100, 100];
  profile.texts = [{ sha256: '0'.repeat(64), tokens: 100 }];
  for (let i = 0; i < profile.fired.length; i++) profile.fired[i] = Math.floor(100 * random.uniform());
  await writeProfile(path, profile);
  return path;
}
