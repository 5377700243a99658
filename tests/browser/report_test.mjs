// The report page in a real browser: it renders, its charts have data, a mark says its reason, its figures are those of
// `moectl compare`. `./dev test-browser` runs it; so does CTest where Chromium, node and npm are installed. Screenshots go
// to $SCREENSHOTS if set.
import assert from 'node:assert/strict';
import {execFileSync} from 'node:child_process';
import {mkdtempSync, readFileSync, rmSync, writeFileSync} from 'node:fs';
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
health: {alerts: [{metric: max_vio, above: 1, for: 2, name: peaked}]}
`;

before(async () => {
  writeFileSync(join(dir, 'trace.jsonl'), trace());
  for (const [name, policy] of [['free', 'fixed'], ['held', 'sign_bias, options: {step: 0.005, zero_mean_move: false}']]) {
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

const open = async (options = {}, report = 'report.html') => {
  const page = await browser.newPage({viewport: {width: 1280, height: 900}, ...options});
  const complaints = [];
  page.on('console', (m) => complaints.push(m.text()));
  page.on('pageerror', (e) => complaints.push(e.message));
  page.on('request', (r) => { if (!/^(file|data):/.test(r.url())) complaints.push(`asks for ${r.url()}`); });
  await page.goto('file://' + join(dir, report));
  await page.waitForTimeout(100);
  return [page, complaints];
};

for (const [name, width, colorScheme] of [['desktop-light', 1280, 'light'], ['desktop-dark', 1280, 'dark'],
                                          ['phone-light', 390, 'light'], ['phone-dark', 390, 'dark']]) {
  test(`renders without complaint: ${name}`, async () => {
    const [page, complaints] = await open({viewport: {width, height: 900}, colorScheme});
    for (const id of ['domains-section', 'loss-section']) await page.click(`#${id} > summary`);
    await page.selectOption('#loss-layer', '1');
    await page.waitForTimeout(100);
    assert.match(await page.locator('#expert-loss figcaption').first().innerText(), /layer 1/);
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

test('health and alerts stand on a timeline, in words too', async () => {
  const [page] = await open();
  assert.match(await page.locator('#health').innerText(), /free: worst state/);
  // Layer 0 and layer 1 are peaked for the first 40 steps, alerts come after two and stay for their dwell.
  const rows = page.locator('tr[data-alert="peaked"]');
  assert.equal(await rows.count(), 2);
  const [from, to, steps, layers] = (await rows.first().locator('td:not(.when)').allInnerTexts()).map(Number);
  const log = readFileSync(join(dir, 'free.jsonl'), 'utf8').trim().split('\n').slice(1).map((l) => JSON.parse(l));
  const stood = log.filter((r) => r.alerts?.includes('peaked'));
  assert.ok(stood.length > 10);
  assert.deepEqual([from, to, steps, layers], [stood[0].step, stood.at(-1).step, new Set(stood.map((r) => r.step)).size,
                                               new Set(stood.map((r) => r.layer)).size]);
  await rows.first().locator('canvas').focus();
  for (let step = 0; step < from; ++step) await page.keyboard.press('ArrowRight');
  const says = page.locator('#health .alerts').first().locator('xpath=ancestor::figure').locator('.readout').last();
  assert.match(await says.innerText(), new RegExp(`^step ${from}: peaked in layer`));
  await page.close();
});

test('limits are bands, the shift is marked, and a roll-back is crossed out', async () => {
  const [page] = await open();
  const band = await page.evaluate(() => Chart.getChart('chart-expert_bias').data.datasets.filter((d) => d.frame).map((d) => [d.label, d.data[0].y]));
  assert.deepEqual(band, [['limits.max', 0.05], ['limits.min', -0.05]]);
  assert.deepEqual(await page.evaluate(() => Chart.getChart('chart-max-vio').options.plugins.uprights.steps), [150]);
  // A log as the controller writes it, with a step taken back.
  const log = readFileSync(join(dir, 'held.jsonl'), 'utf8').trim().split('\n').map((l) => JSON.parse(l));
  for (const r of log) if (r.step === 80) r.actuators.expert_bias.reasons = ['rollback'];
  writeFileSync(join(dir, 'back.jsonl'), log.map((r) => JSON.stringify(r)).join('\n') + '\n');
  execFileSync(tool, ['report', 'back.jsonl', '-o', 'back.html'], {cwd: dir});
  await page.goto('file://' + join(dir, 'back.html'));
  const mark = await page.evaluate(() => {
    const set = Chart.getChart('chart-expert_bias').data.datasets.find((d) => d.marks);
    const i = set.data.findIndex((m) => m.column === 80);
    return [set.pointStyle[i], set.data[i].reasons];
  });
  assert.deepEqual(mark, ['crossRot', 'rollback ×2']);
  assert.match(await page.locator('#held').innerText(), /rollback ×2/);
  await page.close();
});

test('what the guard moved is not called fixed', async () => {
  const [page] = await open();
  // All policies are fixed; the guard pushed a bias and gave it back.
  const log = readFileSync(join(dir, 'free.jsonl'), 'utf8').trim().split('\n').map((l) => JSON.parse(l));
  for (const r of log) {
    if (r.metrics) r.metrics.max_vio = 1.8;
    if (r.layer !== 0 || r.step < 80 || r.step >= 90) continue;
    r.actuators = {expert_bias: {proposed: [0, 0, 0, 0], applied: [0.04, 0, 0, -0.01], reasons: ['guard']}};
  }
  writeFileSync(join(dir, 'guard.jsonl'), log.map((r) => JSON.stringify(r)).join('\n') + '\n');
  execFileSync(tool, ['report', 'guard.jsonl', '-o', 'guard.html'], {cwd: dir});
  await page.goto('file://' + join(dir, 'guard.html'));
  assert.match(await page.locator('#moved').innerText(), /expert_bias \(fixed\), by the guard or a roll-back alone.*at most 0\.04/);
  assert.match(await page.locator('#held').innerText(), /expert_bias: guard ×10/);
  assert.match(await page.locator('#advice').innerText(), /no policy controls this run: try policies\/adaptive_bias\.yaml/);
  const crossed = await page.evaluate(() => {
    const set = Chart.getChart('chart-expert_bias').data.datasets.find((d) => d.marks);
    return set.data.filter((_, i) => set.pointStyle[i] === 'crossRot').map((m) => m.column);
  });
  assert.deepEqual(crossed, Array.from({length: 10}, (_, i) => 80 + i));
  await page.close();
});

test('a mark keeps its form where an earlier one has no value to stand at, and keys pass a run without the curve', async () => {
  const [page, complaints] = await open();
  const log = readFileSync(join(dir, 'held.jsonl'), 'utf8').trim().split('\n').map((l) => JSON.parse(l));
  for (const r of log.slice(1)) {
    const bias = r.actuators.expert_bias;
    if (r.step < 5) r.actuators = {expert_bias: {reasons: ['warmup']}};
    else bias.reasons = r.step < 10 ? ['rate'] : [];
  }
  writeFileSync(join(dir, 'marks.jsonl'), log.map((r) => JSON.stringify(r)).join('\n') + '\n');
  for (const r of log) delete r.loss;
  writeFileSync(join(dir, 'no-loss.jsonl'), log.map((r) => JSON.stringify(r)).join('\n') + '\n');
  execFileSync(tool, ['report', 'no-loss.jsonl', 'marks.jsonl', '-o', 'marks.html'], {cwd: dir});
  await page.goto('file://' + join(dir, 'marks.html'));
  const marks = await page.evaluate(() => {
    const set = Chart.getChart('chart-expert_bias').data.datasets.find((d) => d.marks);
    return [set.data.map((m) => m.column), set.pointStyle];
  });
  assert.deepEqual(marks, [[5, 6, 7, 8, 9], Array(5).fill('triangle')]);
  await page.focus('#chart-loss');
  await page.keyboard.press('Home');
  assert.match(await page.evaluate(() => Chart.getChart('chart-loss').tooltip.body?.flatMap((b) => b.lines).join(' ') ?? ''), /loss: 3/);
  assert.deepEqual(complaints, []);
  await page.close();
});

test('limits that differ are lines in the colour of their run', async () => {
  const [page] = await open();
  writeFileSync(join(dir, 'loose.yaml'), config('sign_bias, options: {step: 0.005, zero_mean_move: false}').replace('max: 0.05', 'max: 0.08'));
  execFileSync(tool, ['replay', 'loose.yaml', 'trace.jsonl', '-o', 'loose.jsonl'], {cwd: dir});
  execFileSync(tool, ['report', 'held.jsonl', 'loose.jsonl', '-o', 'loose.html'], {cwd: dir});
  await page.goto('file://' + join(dir, 'loose.html'));
  const lines = await page.evaluate(() => Chart.getChart('chart-expert_bias').data.datasets.filter((d) => d.frame).map(
      (d) => [d.label, d.data[0].y, d.borderColor, 'fill' in d]));
  assert.deepEqual(lines, [['held, limits.max', 0.05, '#0072b2', false], ['held, limits.min', -0.05, '#0072b2', false],
                           ['loose, limits.max', 0.08, '#e69f00', false], ['loose, limits.min', -0.05, '#e69f00', false]]);
  await page.close();
});

for (const width of [1280, 390]) {
  test(`ticks of log axes have room and the data fill the axis, ${width} wide`, async () => {
    const [page] = await open({viewport: {width, height: 900}});
    for (const id of ['chart-max-vio', 'chart-cv']) {
      const {at, values, min, lowest} = await page.evaluate((i) => {
        const c = Chart.getChart(i), y = c.scales.y;
        const all = c.data.datasets.flatMap((d) => d.data.map((p) => p.y)).filter((v) => v !== null);
        return {at: y.ticks.map((t) => y.getPixelForValue(t.value)), values: y.ticks.map((t) => t.label), min: y.min, lowest: Math.min(...all)};
      }, id);
      assert.ok(at.length >= 3, `${id}: ${values}`);
      for (let i = 1; i < at.length; ++i) assert.ok(at[i - 1] - at[i] >= 16, `${id}: ${values} at ${at}`);
      assert.ok(min > 0.8 * lowest, `${id} begins at ${min}, its data at ${lowest}`);
    }
    await page.close();
  });
}

test('on a phone the whole table can be seen', async () => {
  const [page] = await open({viewport: {width: 390, height: 900}});
  for (const figure of ['excess_cv', 'loss']) {
    const cell = page.locator(`#summary td[data-figure="${figure}"]`).first(), box = await cell.boundingBox();
    assert.ok(box.x >= 0 && box.x + box.width <= 390, `${figure} ends at ${box.x + box.width}`);
  }
  assert.match(await page.evaluate(() => getComputedStyle(document.querySelector('#summary td[data-figure="excess_cv"]'), '::before').content),
               /excess CV/);
  await page.close();
});

test('what is damaged is said on the page', async () => {
  const [page] = await open();
  const log = readFileSync(join(dir, 'held.jsonl'), 'utf8').trim().split('\n');
  writeFileSync(join(dir, 'torn.jsonl'), [...log.slice(0, 101), ...log.slice(161, 300), log[301].slice(0, 40)].join('\n'));
  execFileSync(tool, ['report', 'torn.jsonl', '-o', 'torn.html'], {cwd: dir, stdio: 'ignore'});
  await page.goto('file://' + join(dir, 'torn.html'));
  await page.click('#faults-section > summary');
  const said = await page.locator('#faults').innerText();
  assert.match(said, /missing: torn\.jsonl:102: steps 50 to 79/);
  assert.match(said, /the file ends within this line/);
  // The hole is a gap, not a line through it.
  const gap = await page.evaluate(() => Chart.getChart('chart-max-vio').data.datasets.find((d) => d.walk).data.slice(48, 82).map((p) => p.y !== null));
  assert.deepEqual(gap, Array.from({length: 34}, (_, i) => i < 2 || i >= 32));
  await page.close();
});

// What a log may hold though no controller writes it: each once stopped the page's script, or never ended.
const bias = (policy, limits) => ({model: {layers: 1, experts: 4, top_k: 2}, expert_bias: {policy, limits}});
const moved = (step) => ({counts: [5, 4, 4, 3], top_k: 2, actuators: {expert_bias: {applied: [0.1 * step, 0, 0, -0.1 * step], reasons: ['rate']}}});
for (const [name, header, record] of [
  ['a policy named as a property of every object', bias('constructor', {min: -1, max: 1, rate: 1}), moved],
  ['a policy named __proto__', bias('__proto__', {min: -1, max: 1, rate: 1}), moved],
  ['a limit that is no number', bias('sign_bias', {min: 'a', max: 1, rate: 'b'}), moved],
  ['a floor next to zero', bias('fixed', {}), () => ({metrics: {max_vio: 0, load_cv: 0.1, noise_floor_max_vio: 5e-324, noise_floor_cv: 0.1}})],
  ['a negative MaxVio', bias('fixed', {}), () => ({metrics: {max_vio: -1, load_cv: 0.1, noise_floor_max_vio: 0.1, noise_floor_cv: 0.1}})]]) {
  test(`the page stands with ${name}`, async () => {
    const lines = [{format: 'moectl-run', version: 1, config: header}];
    for (let step = 0; step < 6; ++step) lines.push({step, layer: 0, tokens: 8, ...record(step)});
    writeFileSync(join(dir, 'odd.jsonl'), lines.map((l) => JSON.stringify(l) + '\n').join(''));
    execFileSync(tool, ['report', 'odd.jsonl', '-o', 'odd.html'], {cwd: dir, stdio: 'ignore'});
    const [page, complaints] = await open({}, 'odd.html');
    assert.deepEqual(complaints, []);
    await page.close();
  });
}

test('it prints in light colours without controls', async () => {
  const [page] = await open({colorScheme: 'dark'});
  await page.emulateMedia({media: 'print'});
  assert.equal(await page.evaluate(() => getComputedStyle(document.body).backgroundColor), 'rgb(255, 255, 255)');
  assert.equal(await page.locator('#theme').isVisible(), false);
  // On paper nothing reaches over the edge of its card.
  await page.setViewportSize({width: 740, height: 1000});
  await page.evaluate(() => dispatchEvent(new Event('beforeprint')));
  const over = await page.evaluate(() => [...document.querySelectorAll('canvas')].filter((c) => c.offsetParent).map((c) => [
    c.id, c.getBoundingClientRect().right - c.closest('figure').getBoundingClientRect().right]).filter(([, by]) => by > 0));
  assert.deepEqual(over, []);
  assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 740);
  assert.ok((await page.pdf({format: 'A4'})).length > 20000);
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

test('loads are shown over unequal targets', async () => {
  const yaml = config('fixed').replace('domains:', 'targets: [0.5, 0.25, 0.25, 0], domains:');
  writeFileSync(join(dir, 'aimed.yaml'), yaml);
  const line = (step, counts) => JSON.stringify({step, layer: 0, tokens: 100, top_k: 1, counts,
                                                 domain_counts: {prose: counts, code: [0, 0, 0, 0]}}) + '\n';
  writeFileSync(join(dir, 'aimed-trace.jsonl'), line(0, [50, 25, 25, 0]) + line(1, [40, 25, 25, 10]));
  execFileSync(tool, ['replay', 'aimed.yaml', 'aimed-trace.jsonl', '-o', 'aimed.jsonl'], {cwd: dir});
  execFileSync(tool, ['report', 'aimed.jsonl', '-o', 'aimed.html'], {cwd: dir});
  const [page, complaints] = await open({}, 'aimed.html');
  assert.equal(await page.locator('#load-caption').innerText(), 'Load over its target, expert × step');
  const says = () => page.locator('#map-load ~ .readout').innerText();
  await page.focus('#map-load');
  await page.keyboard.press('ArrowRight');
  assert.match(await says(), /^expert 0, step 1: 0\.795× its target of 50 %$/);
  for (let i = 0; i < 3; ++i) await page.keyboard.press('ArrowDown');
  assert.match(await says(), /^expert 3, step 1: 0\.299× the mean target; this expert should receive no tokens$/);
  await page.keyboard.press('ArrowLeft');
  assert.equal(await says(), 'expert 3, step 0: about 0× the mean target; this expert should receive no tokens');
  await page.click('#domains-section > summary');
  await page.focus('#domains canvas');
  for (let i = 0; i < 3; ++i) await page.keyboard.press('ArrowRight');
  assert.match(await page.locator('#domains .readout').innerText(), /, expert 3: \d+ choices, and none are wanted$/);
  assert.deepEqual(complaints, []);
  await page.close();
});

test('every metric that has a value stands in a table', async () => {
  const [page, complaints] = await open();
  await page.click('#metrics-section > summary');
  const row = page.locator('#metrics tr[data-metric="load_p50"]').first();
  assert.match(await row.innerText(), /^load_p50\s+[\d.]+\s+[\d.]+ \(\d\)\s+([\d.]+\s+){5}[\d.]+ \(\d\)\s+mean loads/);
  assert.equal(await page.locator('#metrics tr[data-metric="z_loss"]').count(), 0, 'what nobody reported is not there');
  assert.deepEqual(complaints, []);
  if (process.env.SCREENSHOTS) await page.screenshot({path: join(process.env.SCREENSHOTS, 'metrics.png'), fullPage: true});
  await page.close();
});

test('the picture of a placement shows whole bars and their numbers', async () => {
  execFileSync(tool, ['placement', 'trace.jsonl', '--devices', '2', '--slots', '6', '--svg', 'placement.svg'], {cwd: dir});
  writeFileSync(join(dir, 'placement.html'), `<!DOCTYPE html><meta charset="utf-8">${readFileSync(join(dir, 'placement.svg'), 'utf8')}`);
  for (const colorScheme of ['light', 'dark']) {
    const [page, complaints] = await open({viewport: {width: 1000, height: 560}, colorScheme}, 'placement.html');
    const outside = await page.evaluate(() => {
      const view = document.querySelector('svg').viewBox.baseVal;
      return [...document.querySelectorAll('rect, text')].map((e) => e.getBBox())
          .filter((b) => b.x < 0 || b.y < 0 || b.x + b.width > view.width || b.y + b.height > view.height).length;
    });
    assert.equal(outside, 0, 'nothing lies outside');
    assert.equal(await page.evaluate(() => document.querySelectorAll('rect > title').length), 20, 'two layers: four copies today, six as planned');
    assert.deepEqual(complaints, []);
    if (process.env.SCREENSHOTS) await page.screenshot({path: join(process.env.SCREENSHOTS, `placement-${colorScheme}.png`), fullPage: true});
    await page.close();
  }
});
