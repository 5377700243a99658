// The report page in a real browser: it renders, its charts have data, a mark says its reason, its figures are those of
// `moectl compare`. Needs Chromium and, once, `npm install` in this directory. Screenshots go to $SCREENSHOTS if set.
//   MOECTL=…/moectl npm test
import assert from 'node:assert/strict';
import {execFileSync} from 'node:child_process';
import {mkdtempSync, rmSync, writeFileSync} from 'node:fs';
import {tmpdir} from 'node:os';
import {join} from 'node:path';
import {after, before, test} from 'node:test';
import {fileURLToPath} from 'node:url';
import {chromium} from 'playwright-core';

const tool = process.env.MOECTL ?? fileURLToPath(new URL('../../build/release/moectl', import.meta.url));
const dir = mkdtempSync(join(tmpdir(), 'moectl-browser-'));
let browser;

// A trace that a controller answers: one expert takes too much, then another.
const trace = () => {
  const lines = ['{"format":"moectl-trace","version":1,"layers":2,"experts":4,"top_k":1,"shift":150}'];
  for (let step = 0; step < 260; ++step) {
    for (let layer = 0; layer < 2; ++layer) {
      const counts = [20, 25, 25, 30];
      if (step < 40) counts[layer] += 100;
      if (step >= 150 && step < 170) counts[3] += 60;
      const tokens = counts.reduce((a, b) => a + b);
      lines.push(JSON.stringify({step, layer, tokens, top_k: 1, counts, loss: 3 - step / 260,
                                 expert_loss: [1, 2, 3, 4], domain_counts: {prose: counts.map((c) => c - 10), code: [10, 10, 10, 10]}}));
    }
  }
  return lines.join('\n') + '\n';
};
const config = (policy) => `version: 1
model: {layers: 2, experts: 4, top_k: 1, tokens_per_step: 100, domains: [code, prose]}
expert_bias: {policy: ${policy}, limits: {max: 0.05, min: -0.05, rate: 0.004, warmup: 5, center: false}}
collect: {losses: true}
`;

before(async () => {
  writeFileSync(join(dir, 'trace.jsonl'), trace());
  for (const [name, policy] of [['free', 'fixed'], ['held', 'sign_bias, options: {step: 0.005, centred: false}']]) {
    writeFileSync(join(dir, `${name}.yaml`), config(policy));
    execFileSync(tool, ['replay', `${name}.yaml`, 'trace.jsonl', '-o', `${name}.jsonl`], {cwd: dir});
  }
  execFileSync(tool, ['report', 'free.jsonl', 'held.jsonl', '-o', 'report.html'], {cwd: dir});
  browser = await chromium.launch({executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ['--no-sandbox']});
});
after(async () => {
  await browser?.close();
  rmSync(dir, {recursive: true});
});

const open = async (options = {}) => {
  const page = await browser.newPage({viewport: {width: 1280, height: 900}, ...options});
  const complaints = [];
  page.on('console', (m) => complaints.push(m.text()));
  page.on('pageerror', (e) => complaints.push(e.message));
  page.on('request', (r) => { if (!/^(file|data):/.test(r.url())) complaints.push(`asks for ${r.url()}`); });
  await page.goto('file://' + join(dir, 'report.html'));
  await page.waitForTimeout(100);
  return [page, complaints];
};

for (const [name, width, colorScheme] of [['desktop-light', 1280, 'light'], ['desktop-dark', 1280, 'dark'],
                                          ['phone-light', 390, 'light'], ['phone-dark', 390, 'dark']]) {
  test(`renders without complaint: ${name}`, async () => {
    const [page, complaints] = await open({viewport: {width, height: 900}, colorScheme});
    for (const id of ['domains-section', 'loss-section']) await page.click(`#${id} > summary`);
    await page.waitForTimeout(100);
    assert.deepEqual(complaints, []);
    assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), width, 'no sideways scrolling');
    assert.equal(await page.evaluate(() => document.documentElement.classList.contains('dark')), colorScheme === 'dark');
    if (process.env.SCREENSHOTS) await page.screenshot({path: join(process.env.SCREENSHOTS, `${name}.png`), fullPage: true});
    await page.close();
  });
}

test('the five answers stand on the first screen, for both runs', async () => {
  const [page] = await open();
  for (const id of ['balanced', 'unbalanced', 'moved', 'held', 'cost']) {
    const card = page.locator(`#${id}`);
    const box = await card.boundingBox();
    assert.ok(box.y + box.height <= 900, `${id} ends at ${box.y + box.height}`);
    assert.ok(await card.locator('p').count() >= 2, id);
  }
  assert.match(await page.locator('#moved').innerText(), /held: expert_bias \(sign_bias\)/);
  assert.match(await page.locator('#held').innerText(), /expert_bias: range ×\d+/);
  await page.close();
});

test('charts have data', async () => {
  const [page] = await open();
  for (const id of ['chart-max-vio', 'chart-cv', 'chart-loss', 'chart-expert_bias']) {
    const counts = await page.evaluate((i) => Chart.getChart(i).data.datasets.map((d) => d.data.filter((p) => p.y !== null).length), id);
    assert.ok(Math.max(...counts) >= 100, `${id}: ${counts}`);
  }
  for (const id of ['map-layers', 'map-load', 'map-bias']) {
    const colours = await page.evaluate((i) => {
      const c = document.getElementById(i);
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      const seen = new Set();
      for (let p = 0; p < d.length; p += 4) seen.add(`${d[p]},${d[p + 1]},${d[p + 2]}`);
      return seen.size;
    }, id);
    assert.ok(colours >= 3, `${id}: ${colours} colours`);
  }
  await page.close();
});

test('pointing at a mark says the reason; keys do too', async () => {
  const [page] = await open();
  const at = await page.evaluate(() => {
    const chart = Chart.getChart('chart-expert_bias');
    chart.canvas.scrollIntoView();
    const d = chart.data.datasets.findIndex((set) => set.marks && set.data.length);
    const i = chart.data.datasets[d].data.findIndex((m) => m.reasons.includes('range'));
    const point = chart.getDatasetMeta(d).data[i], box = chart.canvas.getBoundingClientRect();
    return {x: box.left + point.x, y: box.top + point.y};
  });
  const says = () => page.evaluate(() => Chart.getChart('chart-expert_bias').tooltip.body?.flatMap((b) => b.lines).join(' ') ?? '');
  await page.mouse.move(at.x, at.y);
  await page.waitForTimeout(100);
  assert.match(await says(), /range ×\d/);
  await page.mouse.move(0, 0);
  await page.focus('#chart-expert_bias');
  await page.keyboard.press('Home');
  assert.match(await says(), /warmup ×\d/);
  await page.focus('#map-load');
  await page.keyboard.press('ArrowDown');
  assert.match(await page.locator('#map-load ~ .readout').innerText(), /^expert 1, step.*× the mean load$/);
  await page.close();
});

test("the table's figures are those of moectl compare", async () => {
  const [page] = await open();
  const rows = JSON.parse(execFileSync(tool, ['compare', 'free.jsonl', 'held.jsonl', '--format', 'json'], {cwd: dir}));
  const shown = await page.evaluate(() => [...document.querySelectorAll('#summary tbody tr')].map(
      (tr) => Object.fromEntries([...tr.querySelectorAll('td')].map((td) => [td.dataset.figure, [td.dataset.value, td.textContent]]))));
  rows.forEach((row, r) => {
    for (const [figure, [value, text]] of Object.entries(shown[r])) {
      if (row[figure] === null) {
        assert.equal(text, figure === 'settle' ? 'never' : '–');
        continue;
      }
      assert.equal(Number(value), row[figure], figure);
      assert.ok(Math.abs(Number(text) - row[figure]) <= 1e-3 * Math.abs(row[figure]) + 1e-12, `${figure}: ${text}`);
    }
  });
  await page.close();
});

test('the theme can be switched', async () => {
  const [page] = await open({colorScheme: 'light'});
  await page.click('#theme');
  assert.equal(await page.evaluate(() => getComputedStyle(document.body).backgroundColor), 'rgb(20, 22, 26)');
  await page.close();
});
