// Health, alerts, domains, experts' losses, what could not be read; then what is to be done last: light and dark, print.
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

// What the controller found, in its own words.
const noticesOf = (run, r) => {
  if (!run.notices.length) return;
  const row = (n) => element('tr', {'data-notice': n.kind}, element('th', {scope: 'row'}, n.kind),
                             ...[n.layer ?? 'model', n.first, n.count, n.text].map((v) => element('td', {}, String(v))));
  const head = ['notice', 'layer', 'from step', 'times', 'the first'].map((t) => element('th', {scope: 'col'}, t));
  $('health').append(element('figure', {}, element('figcaption', {}, key(r), `${shortNames[r]}: notices`),
                             element('div', {class: 'scroll'},
                                     element('table', {class: 'notices'}, element('thead', {}, element('tr', {}, ...head)),
                                             element('tbody', {}, ...run.notices.map(row))))));
};
runs.forEach(noticesOf);

// Whether the load of each layer answers its biases, and the token entropy the temperature.
const responsesOf = (run, r) => {
  if (!run.responses.length) return;
  const row = (found) => element('tr', {'data-response': found.layer ?? 'model'}, element('th', {scope: 'row'}, String(found.layer ?? 'model')),
      ...[found.actuator, found.state, found.gain === undefined ? 'not known' : `${number(found.gain)} ± ${number(found.error)}`,
          found.slope ?? '', found.late, found.held, found.held ? found.first_held : '']
          .map((v) => element('td', {}, String(v))));
  const head = ['layer', 'actuator', 'answer', 'gain', 'slope', 'late by', 'steps held', 'from step'].map((t) => element('th', {scope: 'col'}, t));
  $('health').append(element('figure', {}, element('figcaption', {}, key(r), `${shortNames[r]}: does the load answer the biases, the token entropy the temperature? At the end`),
                             element('p', {class: 'note'}, 'Gain: change seen over the change expected. 1: as expected; 0: the load does not respond; negative: wrong sign. With an assumed slope only the sign counts.'),
                             element('div', {class: 'scroll'},
                                     element('table', {class: 'responses'}, element('thead', {}, element('tr', {}, ...head)),
                                             element('tbody', {}, ...run.responses.map(row))))));
};
runs.forEach(responsesOf);
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
  // Of its target, as of the whole load; where nothing is wanted, there is nothing to hold it against.
  const ratio = (x, y) => {
    const target = run.targets ? run.targets[x] : 1 / n;
    return total[y] && target > 0 ? layer.domains[names[y]][x] / total[y] / target : null;
  };
  const even = run.targets ? 'its target share' : 'an even share';
  drawMap(canvas, names.length, n, (x, y) => (ratio(x, y) === null ? null : DIVERGING((Math.log2(Math.max(ratio(x, y), 1e-9)) / 3 + 1) / 2)),
          (x, y) => (run.targets?.[x] === 0 ? `${names[y]}, expert ${x}: ${layer.domains[names[y]][x]} choices, and none are wanted`
                     : `${names[y]}, expert ${x}: ${number(ratio(x, y))}× ${run.targets ? 'its target share' : 'its even share'} of the domain`));
  rampKey(canvas.parentElement, DIVERGING, `⅛ of ${even}`, '8×');
};
const pairsOf = (run, r) => {
  const layer = layerOf(run, 'pairs-layer');
  if (!layer?.pairs?.length) return;
  const head = ['experts', 'tokens that chose both', 'lift'].map((t) => element('th', {scope: 'col'}, t));
  const row = ([a, b, tokens, lift]) => element('tr', {'data-pair': `${a} ${b}`}, element('th', {scope: 'row'}, `${a} and ${b}`),
                                                ...[String(tokens), number(lift)].map((v) => element('td', {}, v)));
  $('pairs').append(element('figure', {}, element('figcaption', {}, key(r), `${shortNames[r]}, layer ${layer.layer}: the largest lifts`),
                            element('div', {class: 'scroll'}, element('table', {}, element('thead', {}, element('tr', {}, ...head)),
                                                                      element('tbody', {}, ...layer.pairs.map(row))))));
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
oneLayer('pairs', (l) => l.pairs?.length, pairsOf);
oneLayer('loss', (l) => l.loss, lossesOf);
// A row a metric that has a value; percentiles are those over layers.
runs.forEach((run, r) => {
  if (!run.metrics.length) return;
  const head = ['metric', 'mean', 'lowest layer', 'p5', 'p25', 'p50', 'p75', 'p95', 'highest layer', 'unit'].map((t) => element('th', {scope: 'col'}, t));
  const row = (m) => element('tr', {'data-metric': m.name}, element('th', {scope: 'row', title: m.formula}, m.name),
                             ...[number(m.mean), `${number(m.low)} (${m.low_layer})`, ...m.over_layers.map((v) => number(v)), `${number(m.high)} (${m.high_layer})`, m.unit]
                                 .map((v) => element('td', {}, v)));
  $('metrics').append(element('h3', {}, shortNames[r]),
                      element('div', {class: 'scroll'}, element('table', {}, element('thead', {}, element('tr', {}, ...head)),
                                                                element('tbody', {}, ...run.metrics.map(row)))));
});
$('metrics-section').hidden = !$('metrics').children.length;
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
