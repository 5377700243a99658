#!/usr/bin/env python3
"""What is above the floor when a model is deployed: the last validation pass of runs of examples/train_moe_lm.

    deployed.py RUN.jsonl…

MaxVio of the summed counts, mean over layers: with the biases in force (tag in_force), with those to deploy (tag
validation), the latter with the domains weighted as in the last training batches, and the floor of the pass.
"""
import json
import sys


def max_vio(loads):
    return max(loads) * len(loads) / sum(loads) - 1


def figures(path):
    last, mixture = {}, {}
    with open(path) as file:
        for line in file:
            record = json.loads(line)
            if 'counts' not in record:
                continue
            tag = record.get('tag', 'train')
            if tag == 'train':
                mixture = record['domain_counts']
            else:
                last[tag, record['layer']] = record
    if not any(tag == 'in_force' for tag, _ in last):
        sys.exit(f'{path}: holds no last validation pass: has the run ended?')
    share = {name: sum(counts) for name, counts in mixture.items()}
    deployed = [record for (tag, _), record in last.items() if tag == 'validation']
    weighted = []
    for record in deployed:
        domains = record['domain_counts']
        weighted.append([sum(share[name] * counts[i] / sum(counts) for name, counts in domains.items())
                         for i in range(len(record['counts']))])

    def mean(values):
        return sum(values) / len(values)

    return [mean([max_vio(record['counts']) for (tag, _), record in last.items() if tag == 'in_force']),
            mean([max_vio(record['counts']) for record in deployed]), mean([max_vio(loads) for loads in weighted]),
            mean([record['metrics']['sampling_floor_max_vio'] for record in deployed])]


rows = [(path, figures(path)) for path in sys.argv[1:]]
rows.append(('mean', [sum(column) / len(rows) for column in zip(*(row for _, row in rows))]))
print('| run | in force | deployed | deployed, training mixture | floor |')
print('|---|---|---|---|---|')
for path, row in rows:
    print(f'| {path} | ' + ' | '.join(f'{value:.3f}' for value in row) + ' |')
