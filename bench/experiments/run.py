#!/usr/bin/env python3
"""Trains the example's model over configs and seeds, and keeps a summary of every finished run.

    run.py [NAME...] [--quick] [--build BUILD] [--seeds 501 ...] [--only LABEL ...] [--jobs N] [--list]

One run a core, with one thread each: what runs beside it cannot change its result. A run that was interrupted goes on from
its last checkpoint, and then has the bits of one that was not. Summaries of finished runs stand in results/NAME/ and are
not repeated; logs and checkpoints in runs/experiments/NAME/. `tables.py NAME` makes tables and pictures of the summaries.
--quick: few steps of few runs, to see that everything works. Its summaries, and those of other steps or texts than the
plan's, stand beside the logs in runs/experiments/quick/NAME/.
"""
import argparse
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import plans
import summary

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
QUICK_STEPS = 60


def output_of(*command):
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(moectl):
    """What the numbers of a training depend on besides config and seed."""
    processor = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), None)
    return {'moectl': output_of(moectl, '--version'),
            'commit': output_of('git', 'describe', '--always', '--dirty', '--abbrev=12'),
            'libtorch': output_of('dpkg-query', '-W', '-f', '${Version}', 'libtorch-dev'),
            'blas': output_of('dpkg-query', '-W', '-f', '${Version}', 'libopenblas0-pthread'),
            'processor': processor}


def write(path, text):
    """Whole or not at all."""
    with open(path + '.part', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.part', path)


class Run:
    """One training: a variant of a plan with one seed."""

    def __init__(self, plan, variant, seed, arguments, folders, checkpoint_every):
        self.plan, self.variant, self.seed, self.arguments = plan, variant, seed, arguments
        self.checkpoint_every = checkpoint_every
        work, results = folders
        stem = f'{variant.label}-s{seed}'
        self.config, self.log, self.checkpoint, self.said = (
            os.path.join(work, stem + ending) for ending in ('.yaml', '.jsonl', '.pt', '.txt'))
        self.summary = os.path.join(results, stem + '.json')
        self.name = f'{plan.name}/{stem}'
        self.process, self.core = None, None

    def done(self):
        """Finished before, with the same config and arguments."""
        try:
            with open(self.summary) as file:
                kept = json.load(file)
        except (OSError, ValueError):
            return False
        return (kept['config'], kept['arguments']) == (self.variant.config, self.arguments)

    def start(self, train, core):
        config = f'# train_moe_lm {" ".join(self.arguments)}\n{self.variant.config}'
        again = all(map(os.path.exists, (self.checkpoint, self.log, self.config)))
        again = again and open(self.config, encoding='utf-8').read() == config  # of the same arguments
        if not again:
            for path in (self.log, self.checkpoint):
                if os.path.exists(path):
                    os.remove(path)
        write(self.config, config)
        command = [train, '--policy', self.config, '--seed', str(self.seed), '--log', self.log, '--threads', '1', '--quiet',
                   '--checkpoint', self.checkpoint, '--checkpoint-every', str(self.checkpoint_every), *self.arguments]
        if again:
            command += ['--resume', self.checkpoint]
        self.core = core
        environment = dict(os.environ, OMP_NUM_THREADS='1')
        self.process = subprocess.Popen(command, stdout=open(self.said, 'w'), stderr=subprocess.STDOUT, env=environment,
                                        preexec_fn=lambda: os.sched_setaffinity(0, {core}))

    def steps_done(self):
        """From the log's end."""
        try:
            with open(self.log, 'rb') as file:
                file.seek(max(0, os.path.getsize(self.log) - 200000))
                found = re.findall(rb'\n\{"step":(\d+),', file.read())
            return int(found[-1]) + 1 if found else 0
        except OSError:
            return 0

    def finish(self, moectl, about):
        if self.process.returncode != 0:
            raise SystemExit(f'{self.name}: the training failed; its last words, of {self.said}:\n'
                             + ''.join(open(self.said).readlines()[-5:]))
        result = {'experiment': self.plan.name, 'label': self.variant.label, 'title': self.variant.title,
                  'seed': self.seed, 'config': self.variant.config, 'arguments': self.arguments,
                  'versions': about, 'figures': summary.figures(self.log, moectl, self.plan.table == 'early')}
        write(self.summary, json.dumps(result) + '\n')
        os.remove(self.checkpoint)


def runs_of(plan, options):
    arguments = [*plan.arguments, *(('--text', *options.text) if options.text else ())]
    seeds, labels = options.seeds or plan.seeds, options.only or [v.label for v in plan.variants]
    if options.quick:
        seeds, labels = seeds[:2], options.only or plan.quick
    steps = options.steps or (QUICK_STEPS if options.quick else plan.steps)
    as_planned = not (options.quick or options.steps or options.text)

    def run(seed, variant):
        home = plans.trained_in(plan, variant)
        work = os.path.join(options.work, home if as_planned else os.path.join('quick', home))
        results = os.path.join(HERE, 'results', home) if as_planned else work
        for folder in (work, results):
            os.makedirs(folder, exist_ok=True)
        return Run(plan, variant, seed, ['--steps', str(steps), *variant.arguments, *arguments], (work, results), options.checkpoint_every)

    # By seed first: what is there early is a whole row of pairs.
    return [run(seed, plan.variant(label)) for seed in seeds for label in labels]


def show(done, total, running, rate, left):
    parts = ', '.join(f'{r.name} {r.steps_done()}' for r in running)
    bar = '#' * round(20 * done / total) + '.' * (20 - round(20 * done / total))
    text = f'[{bar}] {done:.1f} of {total} runs; {parts}' + (f'; {left / 60:.0f} min left' if rate else '')
    if sys.stderr.isatty():
        sys.stderr.write('\r\033[K' + text[:200])
    else:
        sys.stderr.write(text + '\n')
    sys.stderr.flush()


def train_all(waiting, options):
    train = os.path.join(options.build, 'examples', 'train_moe_lm')
    moectl = os.path.join(options.build, 'moectl')
    about = versions(moectl)
    cores = sorted(os.sched_getaffinity(0))[:options.jobs]
    running, finished, total = [], 0, len(waiting)
    started, shown = time.monotonic(), 0
    had = None  # steps that stood there already: time left goes by the others
    try:
        while waiting or running:
            free = [c for c in cores if c not in [r.core for r in running]]
            while waiting and free:
                run = waiting.pop(0)
                run.start(train, free.pop())
                running.append(run)
            time.sleep(0.5)
            for run in [r for r in running if r.process.poll() is not None]:
                running.remove(run)
                run.finish(moectl, about)
                finished += 1
            steps = int(running[0].arguments[1]) if running else 1
            done = finished + sum(r.steps_done() for r in running) / steps
            had = done if had is None else had
            rate = (done - had) / (time.monotonic() - started)
            if time.monotonic() - shown > (1 if sys.stderr.isatty() else 60) or not running:
                show(done, total, running, rate, (total - done) / rate if rate else 0)
                shown = time.monotonic()
    finally:
        for run in running:
            run.process.terminate()
            run.process.wait()
    sys.stderr.write('\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help='experiments; default: all')
    parser.add_argument('--build', default=os.path.join(ROOT, 'build', 'release'))
    parser.add_argument('--work', default=os.path.join(ROOT, 'runs', 'experiments'), help='for logs and checkpoints')
    parser.add_argument('--seeds', type=int, nargs='+')
    parser.add_argument('--only', nargs='+', metavar='LABEL', help='these variants')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), choices=range(1, 1025), metavar='N', help='runs at once, each on a core of its own')
    parser.add_argument('--steps', type=int, help='of a run, in place of the plan\'s')
    parser.add_argument('--checkpoint-every', type=int, default=50, metavar='STEPS')
    parser.add_argument('--text', nargs='+', metavar='FILE', help='train on these files, each a domain, in place of the machine\'s')
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--list', action='store_true', help='print the experiments and how much of them is done')
    options = parser.parse_args()
    for name in options.names:
        if name not in plans.PLANS:
            parser.error(f"no experiment '{name}': must be one of {', '.join(plans.PLANS)}")
    chosen = [plans.PLANS[name] for name in options.names or plans.PLANS]
    for plan in chosen:
        unknown = set(options.only or ()) - {v.label for v in plan.variants}
        if unknown:
            parser.error(f"--only: {plan.name} has no variant '{unknown.pop()}'")
    runs = [run for plan in chosen for run in runs_of(plan, options)]
    if options.list:
        for plan in chosen:
            of_plan = [run for run in runs if run.plan is plan]
            print(f'{plan.name}: {plan.what}. {sum(r.done() for r in of_plan)} of {len(of_plan)} runs done')
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainings end too
    os.makedirs(options.work, exist_ok=True)
    lock = open(os.path.join(options.work, 'lock'), 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f'{options.work}: another run.py is at work there')
    runs = {run.summary: run for run in runs}.values()  # two plans may share a run
    waiting = [run for run in runs if not run.done()]
    print(f'{len(runs) - len(waiting)} runs done before, {len(waiting)} to go', file=sys.stderr)
    if waiting:
        train_all(waiting, options)


if __name__ == '__main__':
    main()
