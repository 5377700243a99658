"""Early warning: which figures tell early that a run will fail?

The definition of failure, fixed before the first run of the population was trained, is by outcome alone. A run has failed if
at its end

- unused: in some layer at least a quarter of the experts got less than a tenth of the mean load, over the last 60 steps, or
- loss: its validation loss is not finite, or more than 0.05 nats above that of its healthy twin: the same seed, gate,
  learning rate and initial routers under adaptive_bias.

Predictors are taken at 5, 10 and 20 % of the run, each from the 20 steps before (the longest window in use), and none looks at
the end. AUC: the probability that a failed run ranks above one that did not fail; its 95 % interval by bootstrap over runs.
The combination is a logistic regression on all predictors, fitted on the even seeds and reported on the odd ones.
Alarms are those of the library as it is shipped: health `collapsing` or `collapsed` of some layer, and `fhs_alarm`.
"""
import math
import random

FRACTIONS = (0.05, 0.1, 0.2)
WINDOW, END = 20, 60
UNUSED, QUARTER, LOSS = 0.1, 0.25, 0.05
PREDICTORS = {  # name → sign: whether more of it should warn
    'fhs': 1, 'fsi': 1, 'entropy_slope': -1, 'dead_experts': 1, 'max_vio_over_floor': 1, 'validation_loss': 1, 'gradient_norm': 1}


def unused_share(steps, layer):
    sums = [sum(counts) for counts in zip(*(step[layer]['counts'] for step in steps))]
    mean = sum(sums) / len(sums)
    return sum(c < UNUSED * mean for c in sums) / len(sums)


def present(values):
    """Those that are there: a run that has diverged lacks some."""
    return [v for v in values if v is not None]


def mean(values):
    values = present(values)
    return sum(values) / len(values) if values else None


def figures(steps, losses, floor):
    """losses: [(step, validation loss)]. What the table needs of a run, as numbers."""
    layers, total = sorted(steps[0]), len(steps)
    early = {}
    for fraction in FRACTIONS:
        at = round(fraction * total)
        window = steps[max(0, at - WINDOW):at]

        def worst(name, pick):
            values = present(mean(step[layer]['metrics'].get(name) for step in window) for layer in layers)
            return pick(values) if values else None

        pairs = [(mean(s[layer]['metrics']['max_vio'] for s in window), mean(floor(s[layer]) for s in window)) for layer in layers]
        ratios = [vio / least for vio, least in pairs if vio is not None and least]
        squares = [sum(g * g for layer in layers for g in step[layer]['grad_norm']) for step in window
                   if all(step[layer].get('grad_norm') for layer in layers)]
        seen = [loss for step, loss in losses if step < at and loss is not None]
        early[str(fraction)] = {
            'fhs': worst('fhs', max), 'fsi': worst('fsi', max), 'entropy_slope': worst('entropy_slope', min),
            'dead_experts': sum(window[-1][layer]['metrics'].get('dead_experts') or 0 for layer in layers),
            'max_vio_over_floor': max(ratios, default=None), 'validation_loss': seen[-1] if seen else None,
            'gradient_norm': math.sqrt(mean(squares)) if squares else None}
    first = min(END, total)
    worst_at = [max(unused_share(steps[max(0, t - END):t], layer) for layer in layers) for t in range(first, total + 1)]
    since = None  # the step from which the first half of the definition holds to the end
    for t in range(len(worst_at) - 1, -1, -1):
        if worst_at[t] < QUARTER:
            break
        since = t + first
    alarms = {}
    for name, on in (('health', lambda r: r.get('health') in ('collapsing', 'collapsed')),
                     ('fhs_alarm', lambda r: bool(r['metrics'].get('fhs_alarm')))):
        rings = [any(on(step[layer]) for layer in layers) for step in steps]
        alarms[name] = {'first': rings.index(True) if any(rings) else None,
                        'onsets': sum(b and not a for a, b in zip([False] + rings, rings)), 'steps': sum(rings)}
    return {'early': early, 'unused': worst_at[-1], 'failed_at': since, 'alarms': alarms, 'steps': total}


# ---- From summaries to tables ----

def failed(run, twin):
    loss, healthy = run['validation_loss'], twin['validation_loss']
    unused = run['early']['unused'] >= QUARTER
    return unused or loss is None or not math.isfinite(loss) or (healthy is not None and loss - healthy > LOSS)


def auc(scores, labels):
    """Rank statistic; ties count half. None without both kinds."""
    bad, good = [s for s, l in zip(scores, labels) if l], [s for s, l in zip(scores, labels) if not l]
    if not bad or not good:
        return None
    return sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / (len(bad) * len(good))


def interval(scores, labels, rounds=400):
    source, found = random.Random(1), []
    for _ in range(rounds):
        picks = [source.randrange(len(scores)) for _ in scores]
        value = auc([scores[i] for i in picks], [labels[i] for i in picks])
        if value is not None:
            found.append(value)
    found.sort()
    return (found[int(0.025 * len(found))], found[int(0.975 * len(found))]) if found else (None, None)


def features(run, fraction):
    return [run['early']['early'][fraction][name] for name in PREDICTORS]


def standardised(rows, like):
    """Missing values become the mean; scaled by the rows in `like`."""
    out, columns = [], list(zip(*like))
    scales = []
    for column in columns:
        known = [v for v in column if v is not None]
        middle = sum(known) / len(known) if known else 0
        spread = math.sqrt(sum((v - middle) ** 2 for v in known) / len(known)) if known else 0
        scales.append((middle, spread or 1))
    for row in rows:
        out.append([0.0 if v is None else max(-5.0, min(5.0, (v - m) / s)) for v, (m, s) in zip(row, scales)])
    return out


def logistic(rows, labels, ridge=1.0):
    """Weights of a logistic regression with a ridge, by gradient descent; the last one is the constant."""
    size = len(rows[0])
    weights = [0.0] * (size + 1)
    for _ in range(2000):
        slope = [ridge * w / len(rows) for w in weights[:-1]] + [0.0]
        for row, label in zip(rows, labels):
            z = sum(w * x for w, x in zip(weights, row)) + weights[-1]
            error = 1 / (1 + math.exp(-max(-30.0, min(30.0, z)))) - label
            for i, x in enumerate(row):
                slope[i] += error * x / len(rows)
            slope[-1] += error / len(rows)
        weights = [w - 0.5 * s for w, s in zip(weights, slope)]
    return weights


def combined(train, test, fraction):
    """Scores of the test runs."""
    like = [features(run, fraction) for run, _ in train]
    weights = logistic(standardised(like, like), [bad for _, bad in train])
    rows = standardised([features(run, fraction) for run, _ in test], like)
    return [sum(w * x for w, x in zip(weights, row)) for row in rows]
