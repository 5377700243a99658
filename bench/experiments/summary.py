"""The figures of one finished run, from its log. What `moectl compare` computes is taken from there."""
import json
import math
import statistics
import subprocess

import early
from early import mean, present

END = 60        # steps at the end of a run
WINDOW = 100    # steps before the shift, and at the end of the run
SETTLED = 1.6   # floors
DEVICES = (4, 8, 16, 64)
CAPACITY = (1.0, 1.25)


def read(log):
    """(shift, training records by step and layer, records of the last validation by tag and layer, validation losses).
    Actuators of the whole model, in a record of their own, are given to each layer's."""
    shift, steps, validations, losses, whole = None, {}, {}, {}, {}
    with open(log) as file:
        for line in file:
            record = json.loads(line)
            if 'format' in record:
                shift = record.get('shift', shift)
            elif record.get('layer', 0) is None:
                whole[record['step']] = record.get('actuators', {})
            elif 'metrics' in record:
                if record.get('tag', 'train') == 'train':
                    steps.setdefault(record['step'], {})[record['layer']] = record
                else:
                    validations.setdefault(record['tag'], {})[record['layer']] = record
                    if record['tag'] == 'validation':
                        losses[record['step']] = record.get('loss')
    for step, actuators in whole.items():
        for record in steps.get(step, {}).values():
            record['actuators'] = {**actuators, **record['actuators']}
    return shift, [steps[step] for step in sorted(steps)], validations, sorted(losses.items())


def floor(record):
    metrics = record['metrics']
    return metrics['sampling_floor_max_vio'] or metrics['noise_floor_max_vio']


def over_layers(step, figure):
    return mean(figure(record) for record in step.values())


def ratio(a, b):
    """Absent where the run has diverged: its metrics are."""
    return a / b if a is not None and b else None


def median(values):
    values = present(values)
    return statistics.median(values) if values else None


def deviation(values):
    values = present(values)
    return statistics.pstdev(values) if values else None


def settle(vio, floor):
    """As `moectl compare`: the step from which the five-step median of MaxVio stays under 1.6 floors for 20 steps."""
    settled = 0
    for t in range(4, len(vio)):
        known = None not in vio[t - 4:t + 1] and floor is not None
        settled = settled + 1 if known and statistics.median(vio[t - 4:t + 1]) <= SETTLED * floor else 0
        if settled == 20:
            return t - 19
    return None


def overflow(counts, factor):
    """Share of the assignments above the capacity of their expert."""
    total = sum(counts)
    capacity = math.ceil(factor * total / len(counts))
    return sum(max(0, c - capacity) for c in counts) / total


def straggler(counts, devices):
    """The fullest device over the mean device: the factor by which the layer's experts take longer than they need, if
    time is proportional to the tokens of a device and devices hold runs of consecutive experts."""
    if len(counts) % devices:
        return None
    each = len(counts) // devices
    loads = [sum(counts[d * each:(d + 1) * each]) for d in range(devices)]
    return max(loads) * devices / sum(loads)


def moves(before, after, layer):
    """Mean move of a bias, in mean gaps of the layer's scores."""
    old, new = (record['actuators'].get('expert_bias') for record in (before[layer], after[layer]))
    gap = after[layer].get('gap_sum')
    if not old or not new or not gap:
        return None
    unit = after[layer]['top_k'] * gap / after[layer]['tokens']
    return sum(abs(a - b) for a, b in zip(old['applied'], new['applied'])) / len(new['applied']) / unit


def rounded(value):
    return value if value is None or isinstance(value, int) else float(f'{value:.5g}')


def figures(log, moectl, warns=False):
    """warns: with the figures of early.py."""
    shift, steps, validations, losses = read(log)
    end = len(steps)
    at = shift if shift is not None and shift < end else end
    window = steps[max(0, at - WINDOW):at]
    last = steps[-WINDOW:]
    vio = [over_layers(step, lambda r: r['metrics']['max_vio']) for step in steps]
    floors = [over_layers(step, floor) for step in steps]
    ratios = [ratio(v, f) for v, f in zip(vio, floors)]
    layers = sorted(steps[0])

    def metric(name, over=window):
        return mean(over_layers(step, lambda r: r['metrics'].get(name)) for step in over)

    compared = json.loads(subprocess.run([moectl, 'compare', '--format', 'json', log], check=True,
                                         capture_output=True, text=True).stdout)[0]
    result = {name: compared[name] for name in (
        'settle', 'max_vio', 'max_vio_over_floor', 'cv', 'cv_over_floor', 'excess_area', 'end_over_floor', 'dead_experts',
        'limit_hits', 'loss', 'validation_loss')}
    result['settle_after_shift'] = settle(vio[at:], mean(floors[-WINDOW:])) if at < end else None
    # From step to step, of single layers: what is left of MaxVio's mean.
    result['max_vio_deviation'] = mean(
        deviation(step[layer]['metrics']['max_vio'] for step in window) for layer in layers)
    result['drops'] = {str(f): mean(over_layers(step, lambda r: overflow(r['counts'], f)) for step in window)
                       for f in CAPACITY}
    result['straggler'] = {str(d): mean(over_layers(step, lambda r: straggler(r['counts'], d)) for step in window)
                           for d in DEVICES if len(window[0][layers[0]]['counts']) % d == 0}
    result['domain_information'] = metric('domain_information', last)
    result['fsi'] = metric('fsi')
    result['moves'] = mean(moves(a, b, layer) for a, b in zip(window, window[1:]) for layer in layers)
    result['aux_loss_weight'] = mean(over_layers(
        step, lambda r: mean(r['actuators']['aux_loss_weight']['applied'])) for step in window)
    deployed = validations.get('validation', {})
    if deployed:
        result['deployed_max_vio_global'] = over_layers(deployed, lambda r: r['metrics']['max_vio'])
        result['deployed_floor'] = over_layers(deployed, floor)

    # For recoveries: MaxVio of each layer at the end, and when the mean over layers came down.
    result['end_max_vio'] = [mean(step[layer]['metrics']['max_vio'] for step in steps[-END:]) for layer in layers]

    if warns:
        result['early'] = early.figures(steps, losses, floor)

    def finish(value):
        if isinstance(value, list):
            return [finish(v) for v in value]
        return {k: finish(v) for k, v in value.items()} if isinstance(value, dict) else rounded(value)

    result = {name: finish(value) for name, value in result.items()}
    result['series_max_vio'] = [rounded(median(vio[t:t + 5])) for t in range(0, end, 5)]
    result['series'] = [rounded(median(ratios[t:t + 5])) for t in range(0, end, 5)]
    return result
