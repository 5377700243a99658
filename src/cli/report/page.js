'use strict';
// The report page: reads what the tool embedded, draws it, answers five questions. No framework but Chart.js.
(() => {
  const runs = JSON.parse(document.getElementById('data').textContent);
  const $ = (id) => document.getElementById(id);
  // Okabe and Ito's palette: told apart by every common kind of colour vision, on light and dark.
  const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00'];
  const colour = (r) => COLOURS[r % COLOURS.length];
  const LIMITS = new Set(['rate', 'range', 'oscillation']);
  const OVERRIDES = new Set(['guard', 'rollback', 'fallback']);
  const QUIET = new Set(['cadence']);  // between decisions nothing is decided: no mark

  const element = (tag, attributes = {}, ...children) => {
    const e = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
    e.append(...children);
    return e;
  };
  const number = (v, digits = 3) => {
    if (v === null || v === undefined) return '–';
    if (Number.isInteger(v)) return String(v);
    return Number(v.toPrecision(digits)).toString();
  };
  const stepOf = (run, column) => run.first + column * run.width;
  const stepsOf = (run, column, each = 1) => {
    const from = stepOf(run, column), to = Math.min(run.last, from + run.width * each - 1);
    return from === to ? `step ${from}` : `steps ${from}–${to}`;
  };
  // Paths share most of their letters; what tells them apart is enough.
  const shortNames = (() => {
    const names = runs.map((r) => r.name.replace(/^.*\//, '').replace(/\.jsonl(\.gz)?$/, ''));
    if (new Set(names).size < names.length) return runs.map((r) => r.name);
    let shared = names.length > 1 ? names[0].length : 0;
    for (const n of names) while (!n.startsWith(names[0].slice(0, shared))) --shared;
    const words = names[0].slice(0, shared).search(/[-_.][^-_.]*$/) + 1;
    return names.map((n) => (names.every((other) => other.length > words) ? n.slice(words) : n));
  })();
  const key = (r) => element('span', {class: 'key', style: `background:${colour(r)}`, 'aria-hidden': 'true'});
  const policyOf = (run, actuator) => run.config?.[actuator]?.policy;
  // What a policy moves, and what the guard or a roll-back moved all the same.
  const overridden = (run, a) => run.actuators[a].marks.some(([, reasons]) => Object.keys(reasons).some((w) => OVERRIDES.has(w)));
  const decides = (run, a) => policyOf(run, a) && policyOf(run, a) !== 'fixed';
  const moves = (run) => Object.keys(run.actuators).filter((a) => decides(run, a) || overridden(run, a));
  const isController = (run) => moves(run).length > 0;

  runs.forEach((run, r) => $('legend').append(element('li', {title: run.name}, key(r), shortNames[r])));

  // ---- Answers. ----

  const answer = (id, r, ...parts) => {
    const p = element('p');
    if (runs.length > 1) p.append(key(r), element('strong', {}, shortNames[r] + ': '));
    p.append(...parts);
    $(id).append(p);
  };
  const verdict = (good, text) => element('span', {class: good ? 'good' : 'bad'}, text);

  const BALANCED = 1.6;  // times the floor; where moectl compare says that a run has settled
  const endRatio = (run) => {
    // The last hundred steps, shift or not: "now".
    const vio = run.series.max_vio?.mean, floor = run.series.max_vio_floor?.mean;
    if (!vio || !floor) return null;
    const columns = Math.max(1, Math.ceil(100 / run.width));
    const mean = (row) => {
      const known = row.slice(-columns).filter((v) => v !== null);
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    };
    const v = mean(vio), f = mean(floor);
    return v !== null && f > 0 ? {vio: v, floor: f, ratio: v / f} : null;
  };
  const floorName = (run) => (run.sampled ? 'sampling floor' : 'floor');

  const answerBalanced = (run, r) => {
    const now = endRatio(run);
    if (!now) return answer('balanced', r, 'No data.');
    const good = now.ratio < BALANCED;
    answer('balanced', r, verdict(good, good ? 'Yes' : 'No'),
           ` – MaxVio ${number(now.vio)} is ${number(now.ratio)}× its ${floorName(run)} (${number(now.floor)}).`);
  };

  // Stretches of columns in which the mean MaxVio was not.
  const stretches = (run) => {
    const vio = run.series.max_vio?.mean ?? [], floor = run.series.max_vio_floor?.mean ?? [];
    const out = [];
    let open = null;
    vio.forEach((v, c) => {
      const above = v !== null && floor[c] > 0 && v > BALANCED * floor[c];
      if (above && open === null) open = c;
      if (!above && open !== null) { out.push([open, c - 1]); open = null; }
    });
    if (open !== null) out.push([open, vio.length - 1]);
    return out;
  };
  const answerWhen = (run, r) => {
    const parts = stretches(run).map(([a, b]) => ({from: stepOf(run, a), to: Math.min(run.last, stepOf(run, b + 1) - 1)}));
    const total = parts.reduce((sum, s) => sum + s.to - s.from + 1, 0);
    const all = run.last - run.first + 1;
    if (total === 0) return answer('unbalanced', r, verdict(true, 'Never'), ` above ${BALANCED} floors.`);
    const longest = [...parts].sort((a, b) => b.to - b.from - (a.to - a.from)).slice(0, 2).sort((a, b) => a.from - b.from);
    const settle = run.figures.settle;
    answer('unbalanced', r, `${number(100 * total / all, 2)} % of steps, longest ` +
           longest.map((s) => (s.from === s.to ? `${s.from}` : `${s.from}–${s.to}`)).join(', ') + '. ' +
           (settle === null ? 'It never settled.' : `It first settled at step ${settle}.`) +
           (run.figures.excess_area === null ? '' : ` Excess area after the shift, over the run's own end: ${number(run.figures.excess_area)}.`));
  };

  const ends = (row) => {
    const known = row.filter((v) => v !== null);
    return [known[0], known[known.length - 1]];
  };
  // The value furthest from where an actuator began.
  const reach = ({value}) => {
    const all = [...(value.min ?? []), ...(value.max ?? []), ...value.mean].filter((v) => v !== null);
    const start = value.mean.find((v) => v !== null);
    return all.reduce((far, v) => (Math.abs(v - start) > Math.abs(far - start) ? v : far), start);
  };
  const WHY = {
    sign_bias: 'each expert by a fixed step towards the mean load',
    adaptive_bias: 'each expert by its load error, in units of the score gap',
  };
  const whyOf = (run, actuator) => {
    if (!decides(run, actuator)) return 'by the guard or a roll-back alone';
    const {policy, options} = run.config[actuator];
    if (options?.metric && options.target !== undefined) return `towards ${options.metric} = ${number(options.target)}`;
    return WHY[policy] ?? `as ${policy} decides`;
  };
  const answerMoved = (run, r) => {
    if (!isController(run)) {
      return answer('moved', r, run.config ? 'Nothing: all actuators stayed fixed.' : 'Nothing: this is a trace.');
    }
    for (const a of moves(run)) {
      const track = run.actuators[a];
      const lows = ends(track.value.min ?? track.value.mean), highs = ends(track.value.max ?? track.value.mean);
      answer('moved', r, `${a} (${policyOf(run, a) ?? 'no policy'}), ${whyOf(run, a)}: now ` +
             (lows[1] === highs[1] ? number(lows[1]) : `${number(lows[1])} to ${number(highs[1])}`) +
             (decides(run, a) ? '.' : `, at most ${number(reach(track))}.`));
    }
  };
  const answerHeld = (run, r) => {
    const count = {};
    for (const a of moves(run)) {
      for (const [, reasons] of run.actuators[a].marks) {
        for (const [reason, n] of Object.entries(reasons)) {
          if (!QUIET.has(reason)) count[`${a}: ${reason}`] = (count[`${a}: ${reason}`] ?? 0) + n;
        }
      }
    }
    const rows = Object.entries(count).sort((a, b) => b[1] - a[1]);
    answer('held', r, rows.length ? rows.slice(0, 4).map(([what, n]) => `${what} ×${n}`).join(', ') + '.'
                                  : isController(run) ? 'Nothing: every proposal was applied.' : 'There was nothing to hold.');
  };
  const lossOf = (run) => run.figures.validation_loss ?? run.figures.loss;
  const answerCost = (run, r) => {
    const loss = lossOf(run);
    if (loss === null) return answer('cost', r, 'No loss was logged.');
    const kind = run.figures.validation_loss !== null ? 'Validation loss' : 'Loss of the last 100 steps';
    // Against the first run that nothing controlled.
    const base = runs.find((other) => !isController(other) && lossOf(other) !== null &&
                           (other.figures.validation_loss === null) === (run.figures.validation_loss === null));
    const parts = [`${kind} ${number(loss, 5)}`];
    if (base && base !== run) {
      const d = loss - lossOf(base);
      parts.push(', ', verdict(d <= 0.02, `${d >= 0 ? '+' : '−'}${number(Math.abs(d))}`), ' against the uncontrolled run');
    } else if (isController(run)) {
      parts.push('; what control cost is shown beside an uncontrolled run');
    }
    answer('cost', r, ...parts, '.');
  };
  runs.forEach((run, r) => {
    answerBalanced(run, r); answerWhen(run, r); answerMoved(run, r); answerHeld(run, r); answerCost(run, r);
  });

  // ---- Summary. ----

  const FIGURES = {steps: 'steps', settle: 'settle', max_vio: 'MaxVio', max_vio_over_floor: 'MaxVio / floor', cv: 'CV',
                   cv_over_floor: 'CV / floor', excess_cv: 'excess CV', excess_area: 'excess area', dead_experts: 'dead experts',
                   limit_hits: 'limit hits', loss: 'loss', validation_loss: 'validation loss'};
  const summarise = () => {
    const names = Object.keys(FIGURES).filter((f) => f === 'settle' || runs.some((run) => run.figures[f] !== null));
    const head = element('tr', {}, element('th', {scope: 'col'}, 'run'),
                         ...names.map((f) => element('th', {scope: 'col'}, FIGURES[f])));
    $('summary').append(element('thead', {}, head));
    const body = element('tbody');
    runs.forEach((run, r) => {
      const row = element('tr', {}, element('th', {scope: 'row'}, key(r), shortNames[r]));
      for (const f of names) {
        const v = run.figures[f];
        row.append(element('td', {'data-figure': f, 'data-value': v ?? '', 'data-label': FIGURES[f]}, f === 'settle' && v === null ? 'never' : number(v, 4)));
      }
      body.append(row);
    });
    $('summary').append(body);
  };
  const advise = (run) => {
    const says = [];
    const now = endRatio(run);
    const hits = (a, reason) => run.actuators[a].marks.reduce((n, [, reasons]) => n + (reasons[reason] ? 1 : 0), 0) /
                                Math.max(1, run.columns);
    if (now && now.ratio >= BALANCED && !isController(run)) says.push('nothing controls this run: try policies/adaptive_bias.yaml');
    for (const a of moves(run)) {
      if (hits(a, 'range') > 0.2) says.push(`${a} sat on its range for long: widen limits.min/max, or set a target that can be reached`);
      if (hits(a, 'rate') > 0.5 && now && now.ratio >= BALANCED) says.push(`${a} was held back by limits.rate most of the time: raise it`);
      if (hits(a, 'no_data') + hits(a, 'invalid') > 0.05) says.push(`${a} was often held for lack of usable data: look at the host's records`);
    }
    if ((run.figures.dead_experts ?? 0) > 0.5) says.push(`about ${number(run.figures.dead_experts, 2)} experts are dead: a bias policy brings them back`);
    if (now && !run.sampled) says.push('only the noise floor is known: collect sequences for the sampling floor of real text');
    return says.length ? says : ['nothing to change'];
  };
  // One line for what is said of several runs.
  const advice = () => {
    const said = new Map();
    runs.forEach((run, r) => advise(run).forEach((text) => said.set(text, [...(said.get(text) ?? []), r])));
    for (const [text, who] of said) {
      const names = runs.length > 1 && who.length === runs.length ? ['All runs'] : who.flatMap((r, i) => [i ? ', ' : '', key(r), shortNames[r]]);
      $('advice').append(element('li', {}, ...names, `: ${text}.`));
    }
  };

  // ---- Charts. ----

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
      const d = chart.data.datasets.findIndex((set) => set.walk);
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
      {data: points(run, run.series[floor]?.mean), label: named(r, 'floor'), borderColor: colour(r), borderDash: [5, 4], borderWidth: 1, run},
    ]);
    // A logarithm has no zero: a balance far under the floor is drawn at the lower edge, and said as it is.
    const floors = runs.flatMap((run) => run.series[floor]?.mean ?? []).filter((v) => v > 0);
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
                        .filter(([, reasons]) => Object.keys(reasons).length);
      datasets.push({
        marks: true, run, label: named(r, 'marks'), showLine: false, borderColor: colour(r), backgroundColor: colour(r),
        pointRadius: 3.5, pointBorderWidth: 1.5, pointStyle: marks.map(([, reasons]) => kindOf(reasons)),
        data: marks.map(([c, reasons]) => ({
          x: stepOf(run, c), y: highs[c] ?? null, column: c,
          reasons: Object.entries(reasons).map(([w, n]) => `${w} ×${n}`).join(', '),
        })).filter((p) => p.y !== null),
      });
    }
    const multiplicative = name !== 'expert_bias' && low > 0;
    const pad = multiplicative ? 1.25 : Math.max((high - low) * 0.12, 1e-9);
    let min = multiplicative ? low / pad : low - pad, max = multiplicative ? high * pad : high + pad;
    // Limits far outside what was used would flatten it; they are drawn where they come into view. As a band where all
    // runs have the same, else as lines in each run's colour.
    const limitsOf = (run) => run.config?.[name]?.limits;
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

  // ---- Maps. ----

  // Blue – white – orange for ratios; black – purple – yellow (after cividis) for amounts. Both even in lightness.
  const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
  const ramp = (stops) => (t) => {
    const at = Math.max(0, Math.min(1, t)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at));
    return mix(stops[i], stops[i + 1], at - i);
  };
  const DIVERGING = ramp([[8, 64, 129], [67, 147, 195], [247, 247, 247], [230, 150, 60], [140, 60, 0]]);
  const SEQUENTIAL = ramp([[0, 32, 76], [60, 77, 110], [124, 123, 120], [186, 174, 108], [255, 233, 69]]);
  const HEALTH = [[200, 200, 200], [0, 158, 115], [86, 180, 233], [0, 114, 178], [204, 121, 167], [230, 159, 0], [213, 94, 0], [60, 0, 0]];

  // Draws cells and answers to pointer and arrow keys with the words for the cell.
  const drawMap = (canvas, rows, columns, cell, words, out = canvas.parentElement.querySelector('.readout')) => {
    canvas.width = Math.max(1, columns);
    canvas.height = Math.max(1, rows);
    const context = canvas.getContext('2d');
    const image = context.createImageData(canvas.width, canvas.height);
    for (let y = 0; y < rows; ++y) {
      for (let x = 0; x < columns; ++x) {
        const c = cell(x, y);
        image.data.set(c ? [...c, 255] : [128, 128, 128, 60], 4 * (y * columns + x));
      }
    }
    context.putImageData(image, 0, 0);
    out.textContent = rows ? 'Point at a cell, or use the arrow keys.' : 'Not logged.';
    let at = [0, 0];
    const say = (x, y) => {
      if (!rows || !columns) return;
      at = [Math.max(0, Math.min(columns - 1, x)), Math.max(0, Math.min(rows - 1, y))];
      out.textContent = words(...at);
    };
    canvas.onpointermove = (e) => {
      const box = canvas.getBoundingClientRect();
      say(Math.floor((e.clientX - box.left) / box.width * columns), Math.floor((e.clientY - box.top) / box.height * rows));
    };
    canvas.onkeydown = (e) => {
      const by = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[e.key];
      if (!by) return;
      e.preventDefault();
      say(at[0] + by[0], at[1] + by[1]);
    };
    canvas.setAttribute('role', 'img');
  };
  const stepAxis = (run) => [element('span', {}, `step ${run.first}`), element('span', {}, String(run.last))];
  const axisUnder = (canvas, run) => {
    canvas.parentElement.querySelector('.axis')?.remove();
    canvas.after(element('p', {class: 'axis', 'aria-hidden': 'true'}, ...stepAxis(run)));
  };
  const rampKey = (figure, colours, low, high) => {
    figure.querySelector('.ramp')?.remove();
    const stops = [0, 0.25, 0.5, 0.75, 1].map((t) => `rgb(${colours(t)})`).join(',');
    figure.append(element('p', {class: 'ramp'}, low, element('i', {style: `background:linear-gradient(90deg,${stops})`}), high));
  };

  const layerMap = (run) => {
    const all = run.layers.flatMap((l) => l.max_vio).filter((v) => v !== null);
    // The extent without spreading the array: logs can have millions of cells.
    let top = 0;
    for (const v of all) top = Math.max(top, v);
    const scaled = (v) => Math.log1p(v * 10) / Math.log1p(top * 10 || 1);
    drawMap($('map-layers'), run.layers.length, run.columns,
            (x, y) => (run.layers[y].max_vio[x] == null ? null : SEQUENTIAL(scaled(run.layers[y].max_vio[x]))),
            (x, y) => `layer ${run.layers[y].layer}, ${stepsOf(run, x)}: MaxVio up to ${number(run.layers[y].max_vio[x] ?? null)}`);
    axisUnder($('map-layers'), run);
    rampKey($('map-layers').parentElement, SEQUENTIAL, '0', `${number(top)} (log scale)`);
  };
  const expertMap = (id, run, layer, map, words, low, high) => {
    const bytes = map ? Uint8Array.from(atob(map.data), (c) => c.charCodeAt(0)) : new Uint8Array();
    const rows = map ? map.rows : 0, columns = rows ? bytes.length / rows : 0;
    drawMap($(id), rows, columns,
            (x, y) => (bytes[y * columns + x] === 255 ? null : DIVERGING(bytes[y * columns + x] / 254)),
            (x, y) => {
              const b = bytes[y * columns + x];
              const where = `expert ${y}, ${stepsOf(run, x * map.each, map.each)}: `;
              return where + (b === 255 ? 'no data' : words((b / 127 - 1) * map.scale));
            });
    $(id).setAttribute('aria-label', `${id === 'map-load' ? 'Load' : 'Bias'} of each expert of layer ${layer.layer} over the steps`);
    if (!rows) return;
    axisUnder($(id), run);
    rampKey($(id).parentElement, DIVERGING, low, high);
  };
  const drawMaps = () => {
    const run = runs[$('map-run').value], layer = run.layers[$('map-layer').value];
    layerMap(run);
    $('map-layers').setAttribute('aria-label', 'MaxVio of each layer over the steps');
    if (!layer) return;
    expertMap('map-load', run, layer, layer.load, (v) => `${number(2 ** v)}× the mean load`, '⅛ of the mean', '8×');
    const scale = layer.bias ? number(layer.bias.scale) : '';
    expertMap('map-bias', run, layer, layer.bias, (v) => `bias ${number(v)}`, `−${scale}`, `+${scale}`);
  };
  runs.forEach((_, r) => $('map-run').append(element('option', {value: r}, shortNames[r])));
  const fillLayers = () => {
    $('map-layer').replaceChildren(...runs[$('map-run').value].layers.map((l, i) => element('option', {value: i}, String(l.layer))));
  };
  $('map-run').value = String(Math.max(0, runs.findIndex(isController)));
  $('map-run').addEventListener('change', () => { fillLayers(); drawMaps(); });
  $('map-layer').addEventListener('change', drawMaps);
  fillLayers();
  drawMaps();

  // ---- Health, domains, expert losses, what could not be read. ----

  const healthOf = (run, r) => {
    const layers = run.layers.filter((l) => l.health);
    if (!layers.length) return;
    const canvas = element('canvas', {class: 'map', tabindex: '0', style: `height:${Math.max(18, Math.min(120, 16 * layers.length))}px`,
                                      'aria-label': `Worst state of each layer of ${shortNames[r]} over the steps`});
    $('health').append(element('figure', {'data-run': r}, element('figcaption', {}, key(r), `${shortNames[r]}: worst state, layer × step`), canvas,
                               element('p', {class: 'readout', 'aria-live': 'polite'})));
    drawMap(canvas, layers.length, run.columns, (x, y) => (layers[y].health[x] == null ? null : HEALTH[layers[y].health[x]]),
            (x, y) => `layer ${layers[y].layer}, ${stepsOf(run, x)}: ${run.health_names[layers[y].health[x] ?? 0]}`);
    axisUnder(canvas, run);
    const seen = new Set(layers.flatMap((l) => l.health));
    canvas.parentElement.append(element('p', {class: 'ramp'}, ...[...seen].filter((s) => s !== null).sort((a, b) => a - b).flatMap(
        (s) => [element('span', {class: 'key', style: `background:rgb(${HEALTH[s]})`}), run.health_names[s]])));
  };
  runs.forEach(healthOf);

  // A row an alert: its name, a strip on the time axis, and the same in words.
  const ALERT = ramp([[247, 215, 178], [213, 94, 0], [110, 30, 0]]);
  const alertsOf = (run, r) => {
    if (!run.alerts.length) return;
    const out = element('p', {class: 'readout', 'aria-live': 'polite'});
    const body = element('tbody');
    const table = element('table', {class: 'alerts'},
                          element('thead', {}, element('tr', {}, element('th', {scope: 'col'}, 'alert'),
                                                                element('th', {scope: 'col', class: 'when', 'aria-label': 'when'},
                                                                        element('span', {class: 'axis'}, ...stepAxis(run))),
                                                                ...['from', 'to', 'steps', 'layers'].map((t) => element('th', {scope: 'col'}, t)))), body);
    const figure = $('health').querySelector(`[data-run="${r}"]`) ?? element('figure', {}, element('figcaption', {}, key(r), `${shortNames[r]}: alerts`));
    figure.append(element('div', {class: 'scroll'}, table), out);
    if (!figure.isConnected) $('health').append(figure);
    for (const alert of run.alerts) {
      const strip = element('canvas', {class: 'strip', tabindex: '0', 'aria-label': `When ${alert.name} stood`});
      body.append(element('tr', {'data-alert': alert.name}, element('th', {scope: 'row'}, alert.name), element('td', {class: 'when'}, strip),
                          ...[alert.first, alert.last, alert.steps, alert.layers].map((v) => element('td', {}, String(v)))));
      const at = new Map(alert.columns.map(([c, n, layers]) => [c, [n, layers]]));
      drawMap(strip, 1, run.columns,
              (x) => (at.has(x) ? ALERT(run.layers.length > 1 ? (at.get(x)[0] - 1) / (run.layers.length - 1) : 1) : null),
              (x) => {
                if (!at.has(x)) return `${stepsOf(run, x)}: no ${alert.name}`;
                const [n, layers] = at.get(x);
                const whole = layers.includes(-1);
                const where = whole ? 'the whole model' : `layer${n > 1 ? 's' : ''} ${layers.join(', ')}${n > layers.length ? ', …' : ''}`;
                return `${stepsOf(run, x)}: ${alert.name} in ${where}`;
              }, out);
    }
    if (run.alert_names > run.alerts.length) out.after(element('p', {class: 'note'}, `${run.alert_names - run.alerts.length} more names are not drawn.`));
  };
  runs.forEach(alertsOf);
  if (!$('health').children.length) $('health-section').hidden = true;

  const layerOf = (run, select) => run.layers.find((l) => String(l.layer) === $(select).value);
  const domainsOf = (run, r) => {
    const layer = layerOf(run, 'domains-layer');
    if (!layer?.domains) return;
    const names = Object.keys(layer.domains), n = layer.domains[names[0]].length;
    const total = names.map((d) => layer.domains[d].reduce((a, b) => a + b, 0));
    const canvas = element('canvas', {class: 'map', tabindex: '0', style: 'height:120px',
                                      'aria-label': `Use of the experts of layer ${layer.layer} by each domain`});
    $('domains').append(element('figure', {}, element('figcaption', {}, key(r), `${shortNames[r]}, layer ${layer.layer}: domain × expert, whole run`),
                                element('p', {class: 'note'}, `From the top: ${names.join(', ')}.`), canvas,
                                element('p', {class: 'readout', 'aria-live': 'polite'})));
    const ratio = (x, y) => (total[y] ? layer.domains[names[y]][x] / total[y] * n : null);
    drawMap(canvas, names.length, n, (x, y) => (ratio(x, y) === null ? null : DIVERGING((Math.log2(Math.max(ratio(x, y), 1e-9)) / 3 + 1) / 2)),
            (x, y) => `${names[y]}, expert ${x}: ${number(ratio(x, y))}× its even share of the domain`);
    rampKey(canvas.parentElement, DIVERGING, '⅛ of an even share', '8×');
  };
  const lossesOf = (run, r) => {
    const layer = layerOf(run, 'loss-layer');
    if (!layer?.loss) return;
    const canvas = element('canvas');
    $('expert-loss').append(element('figure', {}, element('figcaption', {}, key(r), `${shortNames[r]}, layer ${layer.layer}`),
                                    element('div', {class: 'plot'}, canvas)));
    const each = layer.loss.each;
    chart(canvas, layer.loss.lines.map((row, e) => ({
      data: row.map((y, c) => ({x: stepOf(run, c * each), y, column: c * each, each})), label: `expert ${e}`,
      borderColor: COLOURS[e % COLOURS.length], borderWidth: 1, run, walk: e === 0,
      borderDash: [[], [4, 3], [1, 2]][Math.floor(e / COLOURS.length) % 3],
    })), `Loss of each expert of layer ${layer.layer}`);
  };
  // Drawn when opened: a chart in a closed section has no size. One layer at a time: there may be a hundred.
  const oneLayer = (what, has, draw) => {
    const section = $(`${what}-section`), select = $(`${what}-layer`), place = section.querySelector('.grid');
    const layers = [...new Set(runs.flatMap((run) => run.layers.filter(has).map((l) => l.layer)))].sort((a, b) => a - b);
    section.hidden = !layers.length;
    select.append(...layers.map((l) => element('option', {value: l}, String(l))));
    const redraw = () => {
      if (!section.open) return;
      for (const canvas of place.querySelectorAll('.plot canvas')) {
        const old = Chart.getChart(canvas);
        charts.splice(charts.indexOf(old), 1);
        old.destroy();
      }
      place.replaceChildren();
      runs.forEach(draw);
      dress();
    };
    section.addEventListener('toggle', redraw);
    select.addEventListener('change', redraw);
  };
  oneLayer('domains', (l) => l.domains, domainsOf);
  oneLayer('loss', (l) => l.loss, lossesOf);
  runs.forEach((run) => run.faults.forEach((f) => $('faults').append(element('li', {}, f))));
  const faults = runs.reduce((n, run) => n + run.fault_count, 0);
  $('faults-section').hidden = faults === 0;
  $('faults-section').querySelector('summary').append(` (${faults})`);
  runs.forEach((run, r) => {
    if (!run.config) return;
    $('configs').append(element('h3', {}, shortNames[r]), element('pre', {}, JSON.stringify(run.config, null, 2)));
  });
  $('config-section').hidden = !$('configs').children.length;
  summarise();
  advice();

  // ---- Light and dark. ----

  function dress() {
    Chart.defaults.color = ink('--soft');
    Chart.defaults.borderColor = ink('--line');
    for (const c of charts) {
      for (const scale of Object.values(c.options.scales)) {
        scale.grid = {...scale.grid, color: ink('--line')};
        scale.ticks = {...scale.ticks, color: ink('--soft')};
        if (scale.title) scale.title.color = ink('--soft');
      }
      c.update('none');
    }
  }
  const wear = (dark) => {
    document.documentElement.classList.toggle('dark', dark);
    $('theme').setAttribute('aria-pressed', String(dark));
    $('theme').textContent = dark ? 'Light' : 'Dark';
    dress();
  };
  const wish = matchMedia('(prefers-color-scheme: dark)');
  wish.addEventListener('change', (e) => wear(e.matches));
  $('theme').addEventListener('click', () => wear(!document.documentElement.classList.contains('dark')));
  wear(wish.matches);
  // The paper's width is not known to a script: charts are drawn for half a page, and scaled to what there is.
  addEventListener('beforeprint', () => { document.documentElement.classList.remove('dark'); charts.forEach((c) => c.resize(480, 260)); dress(); });
  addEventListener('afterprint', () => { wear($('theme').getAttribute('aria-pressed') === 'true'); charts.forEach((c) => c.resize()); });
})();
