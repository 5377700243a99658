// Event files that the tool wrote from a log, read by programs of others and held against the log:
//   - tfrecord (npm): its own framing and checksums of TensorFlow's record files; protobufjs decodes the records, by the
//     field numbers of TensorFlow's event.proto and summary.proto;
//   - TensorBoard's own EventAccumulator, where `python3` can import tensorboard.
import assert from 'node:assert/strict';
import {execFileSync, spawnSync} from 'node:child_process';
import {mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync} from 'node:fs';
import {tmpdir} from 'node:os';
import {join} from 'node:path';
import {after, before, test} from 'node:test';
import protobuf from 'protobufjs';
import tfrecord from 'tfrecord';

const tool = process.env.MOECTL, policies = process.env.POLICIES;
const dir = mkdtempSync(join(tmpdir(), 'moectl-readers-'));
const folder = join(dir, 'board', 'run');
let records;

before(() => {
  execFileSync(tool, ['simulate', join(policies, 'sign_bias.yaml'), '--scenario', 'shift', '--steps', '45', '--layers', '2',
                      '--experts', '8', '--top-k', '2', '--tokens', '1024', '-o', 'run.jsonl'], {cwd: dir});
  execFileSync(tool, ['tensorboard', 'run.jsonl', '-o', 'board', '--histogram-every', '10'], {cwd: dir});
  records = readFileSync(join(dir, 'run.jsonl'), 'utf8').trim().split('\n').slice(1).map((l) => JSON.parse(l));
  assert.equal(records.length, 90);
});
after(() => rmSync(dir, {recursive: true}));

const {root} = protobuf.parse(`syntax = "proto3";
message Event { double wall_time = 1; int64 step = 2; oneof what { string file_version = 3; Summary summary = 5; } }
message Summary { repeated Value value = 1; }
message Value { string tag = 1; oneof value { float simple_value = 2; HistogramProto histo = 5; } }
message HistogramProto { double min = 1; double max = 2; double num = 3; double sum = 4; double sum_squares = 5;
  repeated double bucket_limit = 6 [packed = true]; repeated double bucket = 7 [packed = true]; }`, {keepCase: true});
const Event = root.lookupType('Event');

const readByNpm = async () => {
  const found = {scalars: {}, histograms: {}};
  const [name, ...more] = readdirSync(folder);
  assert.deepEqual(more, []);
  const reader = await tfrecord.RecordReader.create(join(folder, name));
  try {
    for (let record, n = 0; (record = await reader.readRecord()) !== null; ++n) {
      const event = Event.decode(record);
      if (n === 0) assert.equal(event.file_version, 'brain.Event:2');
      for (const value of event.summary?.value ?? []) {
        const h = value.histo;
        const into = h ? found.histograms : found.scalars;
        (into[value.tag] ??= []).push([Number(event.step), h ? {min: h.min, max: h.max, num: h.num, sum: h.sum,
                                       filled: h.bucket.reduce((a, b) => a + b, 0)} : value.simple_value]);
      }
    }
  } finally {
    await reader.close();
  }
  return found;
};

const close = (a, b, what) => assert.ok(Math.abs(a - b) <= 1e-9 * Math.max(1, Math.abs(b)), `${what}: ${a}, not ${b}`);
const compare = ({scalars, histograms}) => {
  for (const layer of [0, 1]) {
    const of = records.filter((r) => r.layer === layer);
    for (const metric of ['max_vio', 'load_cv', 'entropy_normalized', 'max_load', 'dead_experts']) {
      assert.deepEqual(scalars[`${metric}/layer_${layer}`], of.map((r) => [r.step, Math.fround(r.metrics[metric])]), metric);
    }
    const load = histograms[`load/layer_${layer}`], bias = histograms[`expert_bias/layer_${layer}`];
    assert.deepEqual(load.map(([step]) => step), [0, 10, 20, 30, 40]);
    for (const [i, step] of [0, 10, 20, 30, 40].entries()) {
      const record = of.find((r) => r.step === step), mean = record.counts.reduce((a, b) => a + b) / 8;
      const {applied} = record.actuators.expert_bias;
      for (const [h, values] of [[load[i][1], record.counts.map((c) => c / mean)], [bias[i][1], applied]]) {
        close(h.min, Math.min(...values), 'min');
        close(h.max, Math.max(...values), 'max');
        close(h.sum, values.reduce((a, b) => a + b), 'sum');
        assert.deepEqual([h.num, h.filled], [8, 8]);
      }
    }
  }
};

test('read by the npm package tfrecord', async () => compare(await readByNpm()));

test('read by TensorBoard itself', (t) => {
  if (spawnSync('python3', ['-c', 'import tensorboard.backend.event_processing.event_accumulator']).status !== 0) {
    return t.skip('python3 has no tensorboard');
  }
  compare(JSON.parse(execFileSync('python3', ['read_tensorboard.py', folder], {maxBuffer: 1 << 26, stdio: ['ignore', 'pipe', 'ignore']})));
});

// The readers do check: a file that was cut is not read to its end.
test('the npm reader refuses a file that was cut', async () => {
  const file = join(folder, readdirSync(folder)[0]);
  truncateSync(file, readFileSync(file).length - 5);
  await assert.rejects(readByNpm(), /Incomplete read/);
});
