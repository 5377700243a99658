#!/usr/bin/env python3
"""A model trained under `sign_bias` goes on under `adaptive_bias` with a guard: does the load stay where it was?

    take_over.py BUILD [--seeds 1 2 3 4 5]

BUILD: the build folder, with examples/train_moe_lm and moectl. 400 steps under sign_bias, then 60 more, in four ways: with
the controller of the checkpoint as far as it fits (`--resume-controller what-fits`), with the biases as a plain file, with
those of a safetensors checkpoint, and, for comparison, with none of them. Prints MaxVio over its floor, mean over layers,
of the last ten steps before the change and of the first ten after it.
"""
import argparse
import json
import math
import os
import struct
import subprocess
import tempfile

STEPS, MORE, WINDOW = 400, 60, 10
MODEL = 'version: 1\nmodel: {layers: 4, experts: 16, top_k: 2, score_space: probability}\n'
SIGN = MODEL + 'expert_bias: {policy: sign_bias, options: {step: 0.001}}\n'
ADAPTIVE = MODEL + 'guard: {}\nexpert_bias:\n  policy: adaptive_bias\n  limits: {min: -1000, max: 1000, rate: 100, center: true}\n'


def ratios(log, first, last):
    """MaxVio over its floor of each step, mean over layers."""
    sums = {}
    with open(log) as file:
        for line in file:
            record = json.loads(line)
            if 'metrics' in record and record.get('tag', 'train') == 'train' and first <= record['step'] < last:
                metrics = record['metrics']
                floor = metrics['sampling_floor_max_vio'] or metrics['noise_floor_max_vio']
                sums.setdefault(record['step'], []).append((metrics['max_vio'], floor))
    return [sum(v for v, _ in step) / sum(f for _, f in step) for step in sums.values()]


def write_safetensors(path, biases):
    header, data = {}, b''
    for layer, values in biases.items():
        raw = struct.pack(f'<{len(values)}f', *values)
        header[f'model.layers.{layer}.mlp.gate.e_score_correction_bias'] = {
            'dtype': 'F32', 'shape': [len(values)], 'data_offsets': [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text + data)


def mean_and_error(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))


def run(build, folder, seed):
    train, tool = os.path.join(build, 'examples/train_moe_lm'), os.path.join(build, 'moectl')

    def path(name):
        return os.path.join(folder, name)

    def call(*command):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def config(name, text):
        with open(path(name), 'w') as file:
            file.write(text)
        return path(name)

    call(train, '--policy', config('sign.yaml', SIGN), '--seed', str(seed), '--steps', str(STEPS + MORE), '--until', str(STEPS),
         '--threads', '1', '--quiet', '--log', path('before.jsonl'), '--checkpoint', path('model.pt'))
    call(tool, 'biases', path('before.jsonl'), '-o', path('biases.json'))
    rows = subprocess.run([tool, 'biases', path('before.jsonl'), '--format', 'json'], check=True, capture_output=True, text=True)
    write_safetensors(path('model.safetensors'), {row['layer']: row['biases'] for row in map(json.loads, rows.stdout.splitlines())})
    call(tool, 'biases', path('model.safetensors'), '-o', path('tensors.json'))
    with_file = ADAPTIVE + '  initial: {}\n'
    ways = {'what fits': (ADAPTIVE, 'what-fits'), 'plain file': (with_file.format('biases.json'), 'none'),
            'safetensors': (with_file.format('tensors.json'), 'none'), 'from zero': (ADAPTIVE, 'none')}
    out = {'before': mean_and_error(ratios(path('before.jsonl'), STEPS - WINDOW, STEPS))}
    for way, (text, controller) in ways.items():
        log = path('after.jsonl')
        subprocess.run(['cp', path('before.jsonl'), log], check=True)
        call(train, '--policy', config('adaptive.yaml', text), '--seed', str(seed), '--steps', str(STEPS + MORE), '--threads', '1', '--quiet', '--log', log,
             '--resume', path('model.pt'), '--resume-controller', controller)
        out[way] = mean_and_error(ratios(log, STEPS, STEPS + WINDOW))
        out[way + ', end'] = mean_and_error(ratios(log, STEPS + MORE - WINDOW, STEPS + MORE))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('build')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3, 4, 5])
    arguments = parser.parse_args()
    table = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for way, value in run(arguments.build, folder, seed).items():
                table.setdefault(way, []).append(value)
    print('| | ' + ' | '.join(f'seed {seed}' for seed in arguments.seeds) + ' | above before by, ± standard error |')
    print('|---|' + '---|' * (len(arguments.seeds) + 1))
    for way, values in table.items():
        difference, error = mean_and_error([value[0] - before[0] for value, before in zip(values, table['before'])])
        print(f'| {way} | ' + ' | '.join(f'{mean:.2f} ± {spread:.2f}' for mean, spread in values) + f' | {difference:+.2f} ± {error:.2f} |')


if __name__ == '__main__':
    main()
