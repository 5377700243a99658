#!/usr/bin/env python3
"""Tables (Markdown) and pictures (SVG) of the summaries that run.py kept.

    tables.py [NAME...] [--results FOLDER] [--check]

Writes FOLDER/NAME.md and FOLDER/NAME.svg; --check: compares with what stands there instead, for a test.
"""
import argparse
import json
import math
import os
import statistics
import sys

import early
import plans

HERE = os.path.dirname(os.path.abspath(__file__))


def load(results, plan):
    """Summaries by label, then by seed; variants in the plan's order. Those of another config than today's are left out."""
    found = {}
    for variant in plan.variants:
        by_seed = {}
        folder = os.path.join(results, plans.trained_in(plan, variant))
        prefix, expected = variant.label + '-s', [*variant.arguments, *plan.arguments]
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if name.startswith(prefix) and name.endswith('.json') and name[len(prefix):-5].isdigit():
                with open(os.path.join(folder, name)) as file:
                    summary = json.load(file)
                # Quick ones have other steps, and those on other texts other domains.
                given = summary['arguments'][2:]
                if summary['config'] == variant.config and given[:len(expected)] == expected:
                    by_seed[summary['seed']] = summary['figures']
        if by_seed:
            found[variant.label] = by_seed
    return found


def mean_and_error(values):
    values = early.present(values)
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def number(value, digits=3):
    if value is None:
        return '–'
    text = f'{value:.{digits}f}'
    return text.replace('0.', '.', 1) if text.lstrip('-').startswith('0.') else text


def percent(share):
    return None if share is None else 100 * share


def with_error(values, digits=3, sign=False):
    mean, error = mean_and_error(values)
    if mean is None:
        return '–'
    text = ('+' if sign and mean >= 0 else '') + number(mean, digits)
    return text if error is None else f'{text} ± {number(error, digits)}'


def middle(values):
    """The median, 'never' being beyond every number; and how many never."""
    values = list(values)
    never = sum(v is None for v in values)
    ordered = sorted(math.inf if v is None else v for v in values)
    at = statistics.median_low(ordered)
    text = 'never' if at == math.inf else str(int(at))
    return text if never == 0 or at == math.inf else f'{text} ({never} never)'


def paired(a, b, figure):
    both = [(figure(a[seed]), figure(b[seed])) for seed in sorted(set(a) & set(b))]
    return [x - y for x, y in both if x is not None and y is not None]


def deployed(f):
    vio, floor = f.get('deployed_max_vio_global'), f.get('deployed_floor')
    return vio / floor if vio is not None and floor else None


def loss(f):
    return f['validation_loss']


def best_peer(plan, found):
    """The published law with the lowest mean validation loss over the seeds that all of them finished."""
    peers = [v.label for v in plan.variants if not v.ours and v.label != plan.base and v.label in found]
    if not peers:
        return None
    seeds = set.intersection(*(set(found[p]) for p in peers))
    whole = [p for p in peers if all(loss(found[p][s]) is not None for s in seeds)]
    return min(whole, key=lambda p: sum(loss(found[p][s]) for s in seeds)) if seeds and whole else None


def table(header, rows):
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [header, ['---'] * len(header), *rows]) + '\n'


def balance(plan, found):
    base, peer = found.get(plan.base, {}), best_peer(plan, found)
    rows = []
    for variant in plan.variants:
        runs = found.get(variant.label)
        if not runs:
            continue
        f = list(runs.values())
        compared = ['–' if variant.label == other or not other or not paired(runs, found[other], loss)
                    else with_error(paired(runs, found[other], loss), 4, sign=True)
                    for other in (plan.base if base else None, peer)]
        rows.append([
            f'**{variant.title}**' if variant.ours else variant.title, str(len(f)),
            with_error([x['max_vio_over_floor'] for x in f]), number(mean_and_error(x['max_vio_deviation'] for x in f)[0]),
            number(mean_and_error(deployed(x) for x in f)[0], 1),
            with_error([x['cv_over_floor'] for x in f]),
            middle(x['settle'] for x in f), middle(x['settle_after_shift'] for x in f),
            number(mean_and_error(x['excess_area'] for x in f)[0], 1),
            number(mean_and_error(x['dead_experts'] for x in f)[0], 1),
            number(mean_and_error(x['loss'] for x in f)[0]), *compared])
    header = ['law', 'seeds', 'MaxVio ÷ floor', 'its deviation', 'deployed MaxVio_global ÷ floor', 'CV ÷ floor', 'settle',
              'settle after the shift', 'excess area', 'dead experts', 'training loss',
              f'validation loss − {plan.variant(plan.base).title}',
              f'− {plan.variant(peer).title} (best peer)' if peer else '− best peer']
    text = table(header, rows)
    devices = sorted({int(d) for runs in found.values() for x in runs.values() for d in x['straggler']})
    rows = []
    for variant in plan.variants:
        f = list(found.get(variant.label, {}).values())
        if f:
            rows.append([f'**{variant.title}**' if variant.ours else variant.title,
                         *(number(mean_and_error(x['straggler'][str(d)] for x in f)[0], 2) for d in devices),
                         *(number(percent(mean_and_error(x['drops'][c] for x in f)[0]), 1) for c in ('1.0', '1.25')),
                         number(mean_and_error(x['domain_information'] for x in f)[0]),
                         number(mean_and_error(x['fsi'] for x in f)[0]),
                         number(mean_and_error(x['moves'] for x in f if x['moves'] is not None)[0])])
    text += '\n' + table(['law', *(f'slowdown, {d} devices' for d in devices), 'dropped at capacity 1.0, %', 'at 1.25, %',
                          'domain information, nats', 'FSI', 'move of a bias, gaps'], rows)
    return text


def recovered(run, twin):
    return all(v is not None and v <= max(1.0, 1.25 * t) for v, t in zip(run['end_max_vio'], twin['end_max_vio']))


def steps_to(run, twin, fault_at):
    """Steps from the fault until MaxVio, the mean over layers, stays within the bound to the end."""
    bound = max(1.0, 1.25 * mean_and_error(twin['end_max_vio'])[0])
    series, place = run['series_max_vio'], fault_at // 5
    out = [i for i in range(place, len(series)) if series[i] is None or series[i] > bound]
    return 5 * (out[-1] + 1 - place) if out else 0


def wilson(count, of):
    """A 95 % interval of a share, in percent."""
    z, p = 1.96, count / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return [100 * (middle + sign * half) / (1 + z * z / of) for sign in (-1, 1)]


def recovery(plan, found):
    laws = dict.fromkeys(v.label[:-len('-healthy')] for v in plan.variants if v.label.endswith('-healthy'))
    rows = []
    for law in laws:
        twins = found.get(f'{law}-healthy', {})
        every = []
        for fault in (*plans.FAULTS, 'all'):
            pairs = every if fault == 'all' else [(run, twins[seed]) for seed, run in found.get(f'{law}-{fault}', {}).items()
                                                  if seed in twins]
            if fault != 'all':
                every += pairs
            if not pairs:
                continue
            good = [(r, t) for r, t in pairs if recovered(r, t)]
            low, high = wilson(len(good), len(pairs))
            title = plan.variant(f'{law}-healthy').title
            rows.append([law, title, fault, f'{len(good)} of {len(pairs)}', f'{low:.0f} to {high:.0f} %',
                         middle(steps_to(r, t, plans.FAULT_AT) for r, t in good) if good else '–',
                         with_error([loss(r) - loss(t) for r, t in pairs if None not in (loss(r), loss(t))], 3, sign=True)])
    return table(['', 'law', 'collapse', 'recovered', '95 % interval', 'steps (median)', 'validation loss − twin\'s'], rows)


RECOVERY_NOTE = '''Routers are broken before step 200 of 600 (`train_moe_lm --fault`): favourite, every token prefers one expert; sunk-third, no token
wants a third of them; flat, the router forgets all; biases, the first k experts take every token. The twin has the same seed and law and
no fault. Recovered: over the last 60 steps no layer's MaxVio is above 1, nor above 1.25 of the twin's. Intervals: Wilson's.
'''


def warnings(plan, found):
    runs = []  # (figures, failed, injected, seed)
    for label, by_seed in found.items():
        kind, gate, rate, init, *_ = label.replace('e-', 'e~').split('-')
        twins = found.get(f'twin-{gate}-{rate.replace("~", "-")}-{init}', {})
        if kind != 'twin':
            runs += [(f, early.failed(f, twins[seed]), kind == 'fault', seed) for seed, f in by_seed.items() if seed in twins]
    text = ''
    for title, chosen in (('With the injected faults', runs), ('Without them', [r for r in runs if not r[2]])):
        bad = sum(r[1] for r in chosen)
        text += f'## {title}: {bad} of {len(chosen)} runs failed\n\n'
        if not 0 < bad < len(chosen):
            continue
        test, train = [[r for r in chosen if r[3] % 2 == odd] for odd in (1, 0)]
        rows = []
        for name, sign in early.PREDICTORS.items():
            row = [name]
            for fraction in map(str, early.FRACTIONS):
                values = [r[0]['early']['early'][fraction][name] for r in chosen]
                known = [(sign * v, r[1]) for v, r in zip(values, chosen) if v is not None]
                scores, labels = [s for s, _ in known], [l for _, l in known]
                low, high = early.interval(scores, labels)
                row.append(f'{number(early.auc(scores, labels), 2)} ({number(low, 2)} to {number(high, 2)})')
            rows.append(row)
        row = [f'all of them, logistic, on {sum(r[1] for r in test)} failed and {sum(not r[1] for r in test)} other runs']
        for fraction in map(str, early.FRACTIONS):
            if len({r[1] for r in train}) < 2:
                row.append('–')
                continue
            scores = early.combined([(r[0], r[1]) for r in train], [(r[0], r[1]) for r in test], fraction)
            labels = [r[1] for r in test]
            low, high = early.interval(scores, labels)
            row.append(f'{number(early.auc(scores, labels), 2)} ({number(low, 2)} to {number(high, 2)})')
        rows.append(row)
        text += table(['predictor', 'AUC at 5 % of the run', 'at 10 %', 'at 20 %'], rows) + '\n'
        rows = []
        for name in ('health', 'fhs_alarm'):
            timed = [r for r in chosen if r[1] and r[0]['early']['failed_at'] is not None]
            warned = [r for r in timed if r[0]['early']['alarms'][name]['first'] is not None
                      and r[0]['early']['alarms'][name]['first'] <= r[0]['early']['failed_at']]
            healthy = [r for r in chosen if not r[1]]
            steps = sum(r[0]['early']['steps'] for r in healthy)
            leads = [r[0]['early']['failed_at'] - r[0]['early']['alarms'][name]['first'] for r in warned]
            rows.append([name, f'{len(warned)} of {len(timed)}', str(statistics.median(leads)) if leads else '–',
                         number(1000 * sum(r[0]['early']['alarms'][name]['onsets'] for r in healthy) / steps, 2) if steps else '–'])
        text += table(['alarm as shipped', 'rang before the failure', 'lead, steps (median)', 'onsets in 1000 steps of runs that did not fail'],
                      rows) + '\n'
    return text



EARLY_NOTE = early.__doc__.split('\n\n', 1)[1]

NOTE = '''MaxVio, its floor (the sampling floor), CV, deviation (standard deviation from step to step within a layer), drops,
slowdown, FSI and moves: means over layers, over the last 100 steps before the shift. Deployed: the validation text at the end under the biases to deploy,
over the floor of that text. Settle: median over seeds of the first step after which MaxVio stays under 1.6 floors
(`moectl compare`); after the shift: steps from it on. Loss: differences of runs with the same seed, mean ± standard error. Slowdown: the
fullest device over the mean device, consecutive experts on a device: the factor on a layer's expert time if time is
proportional to tokens. Dropped: share of assignments above the capacity of an expert.
'''

COLOURS = ('#1b6ca8', '#c0392b', '#27864a', '#8e44ad', '#b7791f', '#16828a', '#7f8c8d', '#d35400', '#2c3e50', '#e84393',
           '#6c8e23', '#a0522d', '#4b4bd6')


def picture(plan, found, steps):
    """MaxVio over its floor by step: the median over seeds, one line a law."""
    width, height, left, right, top, bottom = 760, 380, 46, 210, 14, 34
    high = 32.0

    def x(step):
        return left + (width - left - right) * step / steps

    def y(ratio):
        part = math.log(min(max(ratio, 0.7), high) / 0.7) / math.log(high / 0.7)
        return height - bottom - (height - top - bottom) * part

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
           f'<title>{plan.what}: MaxVio over its floor</title>', f'<rect width="{width}" height="{height}" fill="white"/>']
    for ratio in (1, 2, 4, 8, 16, 32):
        out.append(f'<path d="M{left} {y(ratio):.1f}H{width - right}" stroke="#{"888" if ratio == 1 else "ddd"}"/>'
                   f'<text x="{left - 6}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio}</text>')
    for step in range(0, steps + 1, max(1, steps // 6)):
        out.append(f'<text x="{x(step):.1f}" y="{height - bottom + 15}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
               f'<text transform="translate(11 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
               'MaxVio ÷ sampling floor</text>')
    for place, variant in enumerate(v for v in plan.variants if v.label in found):
        series = [f['series'] for f in found[variant.label].values()]
        line = [statistics.median([32.0 if v is None else v for v in values]) for values in zip(*series)]
        colour = COLOURS[place % len(COLOURS)]
        points = ' '.join(f'{x(5 * i + 2.5):.1f},{y(v):.1f}' for i, v in enumerate(line))
        weight = 2.2 if variant.ours else 1.2
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{weight}"/>')
        row = top + 10 + 16 * place
        out.append(f'<path d="M{width - right + 10} {row - 4}h18" stroke="{colour}" stroke-width="{weight}"/>'
                   f'<text x="{width - right + 34}" y="{row}">{variant.title}</text>')
    return '\n'.join(out) + '\n</svg>\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME')
    parser.add_argument('--results', default=os.path.join(HERE, 'results'))
    parser.add_argument('--check', action='store_true')
    options = parser.parse_args()
    wrong = []
    for name in options.names or plans.PLANS:
        plan = plans.PLANS[name]
        found = load(options.results, plan)
        if not found:
            continue
        make, note = {'balance': (balance, NOTE), 'recovery': (recovery, RECOVERY_NOTE), 'early': (warnings, EARLY_NOTE)}[plan.table]
        steps = 5 * max(len(f['series']) for runs in found.values() for f in runs.values())
        pictured = plan.table == 'balance'  # few enough lines to tell apart
        done, wanted = sum(map(len, found.values())), len(plan.variants) * len(plan.seeds)
        homes = dict.fromkeys(plans.trained_in(plan, v) for v in plan.variants if v.label in found)
        links = ', '.join(f'[{home}/]({home}/)' for home in homes)
        made = {f'{name}.md': f'# {plan.what}\n\n{done} of {wanted} runs. `./dev experiments {name}`; the summaries of the runs: {links}.\n\n' +
                              (f'![MaxVio over its floor by step]({name}.svg)\n\n' if pictured else '') + make(plan, found) + '\n' + note}
        if pictured:
            made[f'{name}.svg'] = picture(plan, found, steps)
        for file, text in made.items():
            path = os.path.join(options.results, file)
            if not options.check:
                with open(path, 'w', encoding='utf-8') as out:
                    out.write(text)
                print(path)
            elif not os.path.exists(path) or open(path, encoding='utf-8').read() != text:
                wrong.append(path)
    if wrong:
        sys.exit('not what the summaries give; run bench/experiments/tables.py: ' + ', '.join(wrong))


if __name__ == '__main__':
    main()
