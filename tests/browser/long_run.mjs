// A run of 100k steps × 58 layers, as long as runs get: makes its log, has the tool read it from a pipe, and says how
// large the page is and how long a browser takes to show it. Then checks that an extreme of one step survived.
//   MOECTL=…/moectl node long_run.mjs [STEPS [LAYERS [EXPERTS]]]
import assert from 'node:assert/strict';
import {spawn} from 'node:child_process';
import {once} from 'node:events';
import {mkdtempSync, rmSync, statSync} from 'node:fs';
import {tmpdir} from 'node:os';
import {join} from 'node:path';
import {fileURLToPath} from 'node:url';
import {chromium} from 'playwright-core';

const [steps, layers, experts] = [100000, 58, 16].map((d, i) => Number(process.argv[2 + i] ?? d));
const tool = process.env.MOECTL ?? fileURLToPath(new URL('../../build/release/moectl', import.meta.url));
const dir = mkdtempSync(join(tmpdir(), 'moectl-long-'));
const page = join(dir, 'report.html');
const seconds = (since) => ((performance.now() - since) / 1000).toFixed(1);

let state = 1;
const random = () => (state = (state * 1103515245 + 12345) % 2147483648) / 2147483648;
const spike = Math.floor(steps * 0.7) + 3;
let peak = 0;  // MaxVio of the one step that stands out
const lines = function* () {
  yield JSON.stringify({format: 'moectl-run', version: 1, config: {
    model: {layers, experts, top_k: 1}, expert_bias: {policy: 'sign_bias', limits: {min: -1, max: 1, rate: 0.01}}}});
  for (let step = 0; step < steps; ++step) {
    for (let layer = 0; layer < layers; ++layer) {
      const counts = [], bias = [];
      let tokens = 0;
      for (let e = 0; e < experts; ++e) {
        const c = 50 + Math.floor(20 * random()) + (step === spike && layer === 7 && e === 3 ? 1000 : 0);
        counts.push(c);
        tokens += c;
        bias.push(((e * 7 + layer) % experts) / experts - 0.5);
      }
      if (step === spike && layer === 7) peak = experts * Math.max(...counts) / tokens - 1;
      yield `{"step":${step},"layer":${layer},"tokens":${tokens},"top_k":1,"counts":[${counts}],"loss":${(4 - step / steps).toFixed(4)},` +
          `"health":"healthy","alerts":${step % 997 < 40 ? '["peaked"]' : '[]'},` +
          `"actuators":{"expert_bias":{"applied":[${bias}],"reasons":${step % 5 ? '[]' : '["rate"]'}}}}`;
    }
  }
};

try {
  const start = performance.now();
  const report = spawn(tool, ['report', '-', '-o', page], {stdio: ['pipe', 'inherit', 'inherit']});
  const done = once(report, 'exit');
  let part = [], size = 0, bytes = 0;
  for (const line of lines()) {
    part.push(line);
    size += line.length + 1;
    if (size < 1 << 20) continue;
    bytes += size;
    if (!report.stdin.write(part.join('\n') + '\n')) await once(report.stdin, 'drain');
    part = [];
    size = 0;
  }
  report.stdin.end(part.join('\n') + '\n');
  assert.deepEqual(await done, [0, null]);
  console.log(`${steps} steps × ${layers} layers × ${experts} experts: ${((bytes + size) / 1e6).toFixed(0)} MB made and read in ${seconds(start)} s`);
  console.log(`page: ${(statSync(page).size / 1e6).toFixed(2)} MB`);
  const browser = await chromium.launch({executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ['--no-sandbox']});
  const tab = await browser.newPage({viewport: {width: 1280, height: 900}});
  const opened = performance.now();
  await tab.goto('file://' + page);
  await tab.evaluate(() => new Promise((shown) => requestAnimationFrame(() => requestAnimationFrame(shown))));
  console.log(`opened and painted in ${seconds(opened)} s`);
  const most = await tab.evaluate(() => Math.max(...JSON.parse(document.getElementById('data').textContent)[0].layers[7].max_vio));
  assert.ok(Math.abs(most / peak - 1) < 1e-4, `the largest MaxVio of layer 7 is ${most}: that of step ${spike}, ${peak}, is lost`);
  console.log(`the extreme of step ${spike} is kept: MaxVio ${most}`);
  await browser.close();
} finally {
  rmSync(dir, {recursive: true});
}
