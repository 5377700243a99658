// What the tool embedded, the five answers, the summary. The page's scripts run one after the other in one function.
const runs = JSON.parse(document.getElementById('data').textContent);
const $ = (id) => document.getElementById(id);
// Okabe and Ito's palette: told apart by every common kind of colour vision, on light and dark.
const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00'];
const colour = (r) => COLOURS[r % COLOURS.length];
const LIMITS = new Set(['rate', 'range', 'reach', 'oscillation']);
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
  if (typeof v !== 'number') return String(v);  // a log's config holds what its writer wrote
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
const policyOf = (run, actuator) => run.sections?.[actuator]?.policies.join(', ');
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

// The definition of balance is the tool's (health.h); so is the judgement of the last hundred steps.
const BALANCED = runs[0].now.bound;
const imbalanced = (run) => run.now.known && !run.now.balanced;

const answerBalanced = (run, r) => {
  const {now} = run;
  if (!now.known) return answer('balanced', r, 'No data.');
  const times = (v) => (v === null ? '∞' : number(v)) + '×';
  const floor = now.floor === 'mixed floors' ? 'its floors (of some layers the sampling floor, of others the noise floor)' : `the ${now.floor}`;
  answer('balanced', r, verdict(now.balanced, now.balanced ? 'Yes' : 'No'),
         ` – MaxVio is ${times(now.max_vio_over_floor)} ${floor}, CV ${times(now.cv_over_floor)}` +
         (run.layers.length > 1 ? `; worst: layer ${now.worst_layer}, ${times(now.worst)}` : '') + '.');
};

// Stretches of columns in which the mean over layers of MaxVio or of CV was not.
// Single steps leave the floor by chance, where few experts or one with a small target decide it: the median of five says
// more, as it does of settling. Columns of three steps and more are means as they are.
const medians = (row) => row.map((v, c) => {
  const known = row.slice(Math.max(0, c - 2), c + 3).filter((x) => x !== null).sort((a, b) => a - b);
  return v === null ? null : known[Math.floor((known.length - 1) / 2)];
});
const stretches = (run) => {
  const pairs = ['max_vio', 'cv'].map((name) => {
    const means = run.series[name]?.mean ?? [];
    return [run.width < 3 ? medians(means) : means, run.series[`${name}_floor`]?.mean ?? []];
  });
  const out = [];
  let open = null;
  for (let c = 0; c < run.columns; ++c) {
    const above = pairs.some(([row, floor]) => row[c] > 0 && floor[c] !== null && row[c] > BALANCED * floor[c]);
    if (above && open === null) open = c;
    if (!above && open !== null) { out.push([open, c - 1]); open = null; }
  }
  if (open !== null) out.push([open, run.columns - 1]);
  return out;
};
const answerWhen = (run, r) => {
  const parts = stretches(run).map(([a, b]) => ({from: stepOf(run, a), to: Math.min(run.last, stepOf(run, b + 1) - 1)}));
  const total = parts.reduce((sum, s) => sum + s.to - s.from + 1, 0);
  const all = run.last - run.first + 1;
  if (total === 0) return answer('unbalanced', r, verdict(true, 'Never'), `, in the mean over layers, above ${BALANCED} times the ${run.floor}.`);
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
const WHY = new Map([
  ['sign_bias', 'each expert by a fixed step towards the mean load'],
  ['adaptive_bias', 'each expert by its load error over the slope of its load, as much as the filter believes it'],
]);
const whyOf = (run, actuator) => {
  if (!decides(run, actuator)) return 'by the guard or a roll-back alone';
  const {policy, policies, options} = run.sections[actuator];
  if (policies.length > 1) return 'as the policy of each layer decides';
  if (options?.metric && options.target !== undefined) return `towards ${options.metric} = ${number(options.target)}`;
  return (WHY.get(policy) ?? `as ${policy} decides`).replace('the mean load', run.targets ? 'its target load' : 'the mean load');
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

const FIGURES = {steps: 'steps', settle: 'settle', max_vio: 'MaxVio', max_vio_over_floor: 'MaxVio / floor', max_vio_global: 'MaxVio of summed counts', cv: 'CV',
                 cv_over_floor: 'CV / floor', excess_cv: 'excess CV', excess_area: 'excess area',
                 end_over_floor: 'MaxVio / floor, end', dead_experts: 'dead experts',
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
// One line for what is said of several runs.
const advice = () => {
  const said = new Map();
  runs.forEach((run, r) => run.advice.forEach((text) => said.set(text, [...(said.get(text) ?? []), r])));
  for (const [text, who] of said) {
    const names = runs.length > 1 && who.length === runs.length ? ['All runs'] : who.flatMap((r, i) => [i ? ', ' : '', key(r), shortNames[r]]);
    $('advice').append(element('li', {}, ...names, `: ${text}.`));
  }
};
