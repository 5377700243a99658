// Curves over the steps: balance against the floor, loss, actuators between their limits.
const style = () => getComputedStyle(document.documentElement);
const ink = (name) => style().getPropertyValue(name).trim();
const charts = [];
const points = (run, row) => (row ?? []).map((y, c) => ({x: stepOf(run, c), y, column: c}));
const shade = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, '0');

const uprights = {
  id: 'uprights',
  afterDatasetsDraw(chart, _, options) {
    const {ctx, chartArea: area, scales: {x}} = chart;
    for (const step of options.steps ?? []) {
      const at = x.getPixelForValue(step);
      if (at < area.left || at > area.right) continue;
      ctx.save();
      ctx.setLineDash([2, 3]);
      ctx.strokeStyle = ink('--soft');
      ctx.beginPath(); ctx.moveTo(at, area.top); ctx.lineTo(at, area.bottom); ctx.stroke();
      ctx.restore();
    }
  },
};
const shifts = [...new Set(runs.map((run) => run.shift).filter((s) => s !== null))];

// Left and right walk through the points of a chart that has the focus.
const walkable = (chart, label) => {
  const canvas = chart.canvas;
  canvas.tabIndex = 0;
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', label);
  let at = -1;
  canvas.addEventListener('keydown', (event) => {
    const by = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9}[event.key];
    const d = chart.data.datasets.findIndex((set) => set.walk && set.data.length);
    if (!by || d < 0) return;
    event.preventDefault();
    const n = chart.data.datasets[d].data.length;
    at = Math.max(0, Math.min(n - 1, at + by));
    const active = [{datasetIndex: d, index: at}];
    const marks = chart.data.datasets.findIndex((set) => set.marks);
    const same = marks < 0 ? -1 : chart.data.datasets[marks].data.findIndex((m) => m.column === chart.data.datasets[d].data[at].column);
    if (same >= 0) active.push({datasetIndex: marks, index: same});
    const where = chart.getDatasetMeta(d).data[at];
    chart.setActiveElements(active);
    chart.tooltip.setActiveElements(active, {x: where.x, y: where.y});
    chart.update('none');
  });
};

// As many round values as have room: twelve to a decade, or one to several decades.
const logTicks = (axis) => {
  const height = 0.75 * axis.chart.height, from = Math.log10(axis.min), to = Math.log10(axis.max);
  const room = (values) => values.every((v, i) => !i || Math.log10(v / values[i - 1]) / (to - from) * height >= 20);
  const decades = (digits, every = 1) => {
    const values = [];
    for (let e = Math.floor(from); e <= to; ++e) {
      if (e % every === 0) values.push(...digits.map((d) => Number((d * 10 ** e).toPrecision(3))));
    }
    return values.filter((v) => v >= axis.min && v <= axis.max);
  };
  let values = [];
  for (const digits of [[1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 4, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3]]) {
    values = decades(digits);
    if (room(values)) break;
  }
  for (let every = 1; !room(values) && every < 20; ++every) values = decades([1], every);
  axis.ticks = values.map((value) => ({value}));
};

const chart = (canvas, datasets, label, {log = false, min, max} = {}) => {
  const c = new Chart(canvas, {
    type: 'line',
    data: {datasets},
    plugins: [uprights],
    options: {
      animation: false, parsing: false, normalized: true, maintainAspectRatio: false, spanGaps: false,
      interaction: {mode: 'nearest', axis: 'xy', intersect: false},
      elements: {point: {radius: 0, hitRadius: 6}, line: {borderWidth: 1.5}},
      scales: {
        x: {type: 'linear', title: {display: true, text: 'step'}, ticks: {maxRotation: 0, includeBounds: false}, bounds: 'data',
            afterBuildTicks: (axis) => {
              // The last step gets a tick of its own, which may lie on the regular one before it.
              const t = axis.ticks.map((tick) => tick.value), n = t.length;
              if (n > 2 && t[n - 1] - t[n - 2] < 0.6 * (t[1] - t[0])) axis.ticks.pop();
            }},
        y: log ? {type: 'logarithmic', min, max, afterBuildTicks: logTicks, ticks: {autoSkip: false, callback: (v) => number(v)}}
               : {type: 'linear', min, max, ticks: {maxTicksLimit: 8, includeBounds: false, callback: (v) => number(v)}},
      },
      plugins: {
        legend: {display: false},
        uprights: {steps: shifts},
        tooltip: {
          filter: (item) => !item.dataset.silent,
          callbacks: {
            title: (items) => (items.length ? stepsOf(items[0].dataset.run, items[0].raw.column, items[0].raw.each) : ''),
            label: (item) => (item.dataset.marks ? item.raw.reasons : `${item.dataset.label}: ${number(item.raw.below ?? item.raw.y, 4)}`),
          },
        },
      },
    },
  });
  walkable(c, label);
  charts.push(c);
  return c;
};

const withBand = (run, r, row, label, more = {}) => {
  const sets = [];
  if (row?.min && row?.max) {
    sets.push({data: points(run, row.max), borderWidth: 0, fill: '+1', backgroundColor: shade(colour(r), 0.16), silent: true, run, label: ''},
              {data: points(run, row.min), borderWidth: 0, silent: true, run, label: ''});
  }
  sets.push({data: points(run, row?.mean), label, borderColor: colour(r), backgroundColor: colour(r), run, walk: true, ...more});
  return sets;
};
const named = (r, what) => (runs.length > 1 ? `${shortNames[r]}, ${what}` : what);

const balanceChart = (id, series, floor, label) => {
  const datasets = runs.flatMap((run, r) => [
    ...withBand(run, r, run.series[series], named(r, label)),
    {data: points(run, run.series[floor]?.mean), label: named(r, run.floor || 'floor'), borderColor: colour(r), borderDash: [5, 4], borderWidth: 1, run},
  ]);
  // A logarithm has no zero: a balance far under the floor is drawn at the lower edge, and said as it is.
  const floors = runs.flatMap((run) => run.series[floor]?.mean ?? []).filter((v) => v > 1e-12);
  const edge = floors.length ? 0.2 * floors.reduce((a, v) => Math.min(a, v)) : 1e-3;
  let low = Infinity, high = edge;
  for (const set of datasets) {
    for (const p of set.data) {
      if (p.y === null) continue;
      if (p.y < edge) [p.below, p.y] = [p.y, edge];
      low = Math.min(low, p.y);
      high = Math.max(high, p.y);
    }
  }
  chart($(id), datasets, `${label} of ${runs.length} runs against the floor`, {log: true, min: 0.9 * Math.min(low, high), max: 1.1 * high});
};
balanceChart('chart-max-vio', 'max_vio', 'max_vio_floor', 'MaxVio');
balanceChart('chart-cv', 'cv', 'cv_floor', 'CV');
$('loss-figure').hidden = !runs.some((run) => run.series.loss || run.validation.length);
if (!$('loss-figure').hidden) chart($('chart-loss'), runs.flatMap((run, r) => [
  ...withBand(run, r, run.series.loss, named(r, 'loss')),
  {data: run.validation.map(([x, y]) => ({x, y, column: Math.floor((x - run.first) / run.width)})), label: named(r, 'validation loss'),
   borderColor: colour(r), backgroundColor: colour(r), showLine: false, pointRadius: 4, pointStyle: 'rectRot', run},
]), 'Loss');

// ---- Actuators: limits as bands, marks with their reasons. ----

const kindOf = (reasons) => {
  const words = Object.keys(reasons);
  if (words.some((w) => OVERRIDES.has(w))) return 'crossRot';
  if (words.some((w) => LIMITS.has(w))) return 'triangle';
  return 'circle';
};
const actuatorChart = (name) => {
  const figure = element('figure', {}, element('figcaption', {}, name));
  const canvas = element('canvas', {id: `chart-${name}`});
  figure.append(element('div', {class: 'plot'}, canvas));
  $('actuators').append(figure);
  const shown = runs.map((run, r) => [run, r]).filter(([run]) => moves(run).includes(name));
  let low = Infinity, high = -Infinity;
  const datasets = [];
  for (const [run, r] of shown) {
    const track = run.actuators[name];
    const lows = track.value.min ?? track.value.mean, highs = track.value.max ?? track.value.mean;
    for (const v of [...lows, ...highs]) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
    datasets.push(...withBand(run, r, track.value, named(r, name)));
    const marks = track.marks.map(([c, reasons]) => [c, Object.fromEntries(Object.entries(reasons).filter(([w]) => !QUIET.has(w)))])
                      .filter(([c, reasons]) => Object.keys(reasons).length && (highs[c] ?? null) !== null);
    datasets.push({
      marks: true, run, label: named(r, 'marks'), showLine: false, borderColor: colour(r), backgroundColor: colour(r),
      pointRadius: 3.5, pointBorderWidth: 1.5, pointStyle: marks.map(([, reasons]) => kindOf(reasons)),
      data: marks.map(([c, reasons]) => ({
        x: stepOf(run, c), y: highs[c], column: c,
        reasons: Object.entries(reasons).map(([w, n]) => `${w} ×${n}`).join(', '),
      })),
    });
  }
  const multiplicative = name !== 'expert_bias' && low > 0;
  const pad = multiplicative ? 1.25 : Math.max((high - low) * 0.12, 1e-9);
  let min = multiplicative ? low / pad : low - pad, max = multiplicative ? high * pad : high + pad;
  // Limits far outside what was used would flatten it; they are drawn where they come into view. As a band where all
  // runs have the same, else as lines in each run's colour.
  const limitsOf = (run) => {
    const limits = run.sections?.[name]?.limits;
    return Number.isFinite(limits?.min) && Number.isFinite(limits.max) ? limits : undefined;
  };
  const limited = shown.filter(([run]) => limitsOf(run));
  const textOf = (l) => `limits ${number(l.min)} to ${number(l.max)}, rate ${number(l.rate)} a step`;
  const alike = new Set(limited.map(([run]) => textOf(limitsOf(run)))).size === 1;
  const near = (edge, used) => (multiplicative ? Math.abs(Math.log(edge / used)) < 0.7 : Math.abs(edge - used) < (high - low) * 0.5);
  for (const [run, r] of alike ? limited.slice(0, 1) : limited) {
    const limits = limitsOf(run);
    const [first, last] = alike ? [Math.min(...shown.map(([s]) => s.first)), Math.max(...shown.map(([s]) => s.last))] : [run.first, run.last];
    const ends = [first, last].map((x) => ({x, column: Math.floor((x - run.first) / run.width)}));
    const side = (from, to, what) => [
      {data: ends.map((e) => ({...e, y: from})), borderColor: alike ? ink('--soft') : colour(r), borderWidth: 1, borderDash: [1, 2], run,
       label: alike ? what : named(r, what), frame: true, ...(alike ? {fill: '+1', backgroundColor: shade('#808080', 0.22)} : {})},
      ...(alike ? [{data: ends.map((e) => ({...e, y: to})), borderWidth: 0, run, silent: true, label: ''}] : [])];
    datasets.push(...side(limits.max, limits.max + 1e6, 'limits.max'));
    datasets.push(...side(limits.min, multiplicative ? limits.min / 1e6 : limits.min - 1e6, 'limits.min'));
    if (limits.max > 0 && near(limits.max, high)) max = Math.max(max, multiplicative ? limits.max * pad : limits.max + pad);
    if ((limits.min > 0 || !multiplicative) && near(limits.min, low)) min = Math.min(min, multiplicative ? limits.min / pad : limits.min - pad);
  }
  if (limited.length) figure.querySelector('figcaption').append(` – ${alike ? textOf(limitsOf(limited[0][0])) : 'limits dotted, they differ'}`);
  chart(canvas, datasets, `${name} as applied, with limits and marks`, {log: multiplicative, min, max});
};
const controlled = [...new Set(runs.flatMap(moves))];
for (const name of ['expert_bias', 'aux_loss_weight', 'router_temperature']) if (controlled.includes(name)) actuatorChart(name);
if (!controlled.length) $('actuators').append(element('p', {class: 'note'}, 'All actuators stayed fixed.'));
