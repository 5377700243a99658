#!/usr/bin/env python3
"""The seven mistakes of examples/your_router, and a healthy run, on several seeds: the table of bench/README.md.

    mistakes.py YOUR_ROUTER [--seeds 1 2 3] [--pi]

--pi instead: how near pi on the auxiliary loss of the same model, which goes on learning, is to its target after sixty decisions.

YOUR_ROUTER: the built example. Every mistake is made from the first step and mended at step 150 of 300. `fixed` is the same
run with biases that stay 0. Balanced: the mean over layers of MaxVio, over the mean floor, both over ten steps, is below 1.6.
"""
import argparse
import json
import os
import re
import subprocess
import tempfile

MISTAKES = ['none', 'forget-bias', 'wrong-layer', 'wrong-sign', 'swap-storage', 'no-top-values', 'shadow-then-active',
            'replayed-routes']
MENDED, STEPS, WINDOW, BALANCED = 150, 300, 10, 1.6
FIXED = 'version: 1\nmodel: {layers: 3, experts: 16, top_k: 2}\nexpert_bias: {policy: fixed}\n'


def run(program, directory, mistake, seed, fixed):
    log = os.path.join(directory, 'run.jsonl')
    command = [program, '--steps', str(STEPS), '--seed', str(seed), '--log', log]
    if mistake != 'none':
        command += ['--mistake', mistake, '--mend-at', str(MENDED)]
    if fixed:
        policy = os.path.join(directory, 'fixed.yaml')
        with open(policy, 'w') as file:
            file.write(FIXED)
        command += ['--policy', policy]
    done = subprocess.run(command, capture_output=True, text=True)
    records = []
    if os.path.exists(log):
        with open(log) as file:
            records = [json.loads(line) for line in file][1:]
        os.remove(log)
    return done.stdout, done.stderr.strip() if done.returncode else '', records


def floors(records):
    """Of each step: MaxVio and its floor, means over the layers."""
    sums = {}
    for record in records:
        if record.get('tag', 'train') != 'train' or record['layer'] is None:
            continue
        metrics = record['metrics']
        floor = metrics.get('sampling_floor_max_vio') or metrics.get('noise_floor_max_vio')
        if metrics.get('max_vio') is None or not floor:
            continue
        at = sums.setdefault(record['step'], [0, 0])
        at[0] += metrics['max_vio']
        at[1] += floor
    return sums


def over_floor(sums, first, last):
    steps = [sums[s] for s in range(first, last) if s in sums]
    return sum(s[0] for s in steps) / sum(s[1] for s in steps) if steps else float('nan')


def validation(records, step):
    return next(r['loss'] for r in records if r.get('tag') == 'validation' and r['step'] == step)


def row(program, directory, mistake, seed):
    out, error, records = run(program, directory, mistake, seed, False)
    if error:
        return f'| {mistake} | {seed} | 0 | error: {error.split(": ", 1)[1][:90]}… | | | | |'
    notices = re.findall(r'step +(\d+)  layer (\S+)  NOTICE: (.*)', out)
    held = [r['step'] for r in records if 'unresponsive' in r.get('actuators', {}).get('expert_bias', {}).get('reasons', [])]
    _, _, fixed = run(program, directory, mistake, seed, True)
    loss, other = (validation(of, MENDED - 1) for of in (records, fixed))
    sums = floors(records)
    # A run that begins in shadow is on its own from step 100 on; nothing has to be mended where the controller did it.
    start = {'none': 0, 'swap-storage': 10, 'shadow-then-active': 100}.get(mistake, MENDED)
    good = next((s - start for s in range(start, STEPS - WINDOW) if over_floor(sums, s, s + WINDOW) < BALANCED), None)
    first = f'{notices[0][0]} | {notices[0][2][:60]}…' if notices else 'no notice |'
    return (f'| {mistake} | {seed} | {first} | {held[0] if held else "not"} | {loss - other:+.3f} | '
            f'{"not" if good is None else good} | {over_floor(sums, start + 50, min(start + 100, STEPS)):.2f} |')


PI = """version: 1
model: {layers: 3, experts: 16, top_k: 2}
aux_loss_weight:
  policy: pi
  options: {metric: excess_cv, target: 0.25}
  initial: 0.01
  scope: model
  limits: {max: 1, rate: 0.2, cadence: 5}
"""


def excess_under_pi(program, directory, seed):
    """Root of the mean of CV² less its floor², over the layers and steps 300 to 450."""
    policy, log = os.path.join(directory, 'pi.yaml'), os.path.join(directory, 'pi.jsonl')
    with open(policy, 'w') as file:
        file.write(PI)
    subprocess.run([program, '--steps', '450', '--seed', str(seed), '--policy', policy, '--log', log], check=True,
                   capture_output=True)
    with open(log) as file:
        records = [json.loads(line) for line in file][1:]
    squares = [r['metrics']['load_cv'] ** 2 - r['metrics']['sampling_floor_cv'] ** 2 for r in records
               if r.get('tag', 'train') == 'train' and r['layer'] is not None and r['step'] >= 300]
    return (sum(squares) / len(squares)) ** 0.5


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('program')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--pi', action='store_true')
    options = parser.parse_args()
    if options.pi:
        with tempfile.TemporaryDirectory() as directory:
            for seed in options.seeds:
                print(f'seed {seed}: excess_cv {excess_under_pi(options.program, directory, seed):.3f}, target 0.25', flush=True)
        return
    print('| mistake | seed | noticed at step | what it says | held from step | validation loss at mending, less that of '
          '`fixed` | steps from mending to balance | floors, 50 to 100 steps after mending |\n|---|---|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as directory:
        for mistake in MISTAKES:
            for seed in options.seeds:
                print(row(options.program, directory, mistake, seed), flush=True)


if __name__ == '__main__':
    main()
