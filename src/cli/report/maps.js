// Heat maps: layer × step, expert × step.
// Blue – white – orange for ratios; black – purple – yellow (after cividis) for amounts. Both even in lightness.
const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
const ramp = (stops) => (t) => {
  const at = Math.max(0, Math.min(1, t || 0)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at));
  return mix(stops[i], stops[i + 1], at - i);
};
const DIVERGING = ramp([[8, 64, 129], [67, 147, 195], [247, 247, 247], [230, 150, 60], [140, 60, 0]]);
const SEQUENTIAL = ramp([[0, 32, 76], [60, 77, 110], [124, 123, 120], [186, 174, 108], [255, 233, 69]]);
const HEALTH = [[200, 200, 200], [0, 158, 115], [86, 180, 233], [0, 114, 178], [230, 159, 0], [204, 121, 167], [213, 94, 0], [60, 0, 0]];

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
            return where + (b === 255 ? 'no data' : words((b / 127 - 1) * map.scale, y));
          });
  $(id).setAttribute('aria-label', `${id === 'map-load' ? 'Load' : 'Bias'} of each expert of layer ${layer.layer} over the steps`);
  if (!rows) return;
  axisUnder($(id), run);
  rampKey($(id).parentElement, DIVERGING, low, high);
};
// `load`: relative. That of an expert with target 0 is 1 + its load / the mean target.
const loadWords = (run, load, expert) => {
  if (!run.targets) return `${number(load)}× the mean load`;
  const target = run.targets[expert];
  if (target > 0) return `${number(load)}× its target of ${number(100 * target)} %`;
  return `${load > 1 ? number(load - 1) : 'about 0'}× the mean target; this expert should receive no tokens`;
};
const drawMaps = () => {
  const run = runs[$('map-run').value], layer = run.layers[$('map-layer').value];
  layerMap(run);
  $('map-layers').setAttribute('aria-label', 'MaxVio of each layer over the steps');
  if (!layer) return;
  $('load-caption').textContent = `Load over ${run.targets ? 'its target' : 'the mean'}, expert × step`;
  expertMap('map-load', run, layer, layer.load, (v, expert) => loadWords(run, 2 ** v, expert),
            `⅛ of ${run.targets ? 'the target' : 'the mean'}`, '8×');
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
