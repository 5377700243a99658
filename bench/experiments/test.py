#!/usr/bin/env python3
"""A slice of the experiments: a run that is killed and goes on has the bits of one that was not; summaries make tables; those
in the tree are the ones that the summaries in the tree give.

    test.py BUILD
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import early
import summary

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
STEPS = 24


def text_files(folder):
    """Two domains: the sources and the documents of this project."""
    files = []
    for name, endings in (('code', ('.cc', '.h')), ('words', ('.md',))):
        parts = [open(os.path.join(base, f), encoding='utf-8').read()
                 for base, _, names in sorted(os.walk(ROOT))
                 if os.path.relpath(base, ROOT).split(os.sep)[0] not in ('build', 'runs', '.git')
                 for f in sorted(names) if f.endswith(endings)]
        files.append(os.path.join(folder, name + '.txt'))
        with open(files[-1], 'w', encoding='utf-8') as out:
            out.write('\n'.join(parts)[:400000])
    return files


def command(build, work, text, *more):
    return [sys.executable, os.path.join(HERE, 'run.py'), 'balance', '--quick', '--build', build, '--work', work, '--seeds', '501',
            '--steps', str(STEPS), '--checkpoint-every', '5', '--only', 'none', 'ours', 'pi', *more, '--text', *text]


def last_step(log):
    try:
        return int(re.findall(rb'"step":(\d+),', open(log, 'rb').read())[-1])
    except (OSError, IndexError):
        return -1


def summaries(work):
    folder = os.path.join(work, 'quick', 'balance')
    return {name: json.load(open(os.path.join(folder, name))) for name in sorted(os.listdir(folder)) if name.endswith('.json')}


def log_of(work):
    return os.path.join(work, 'quick', 'balance', 'ours-s501.jsonl')


def look_at_a_diverged_run(build, log, path):
    """Its last metrics are absent, and so is its validation loss: that is a result, and no error."""
    with open(log, encoding='utf-8') as read, open(path, 'w', encoding='utf-8') as out:
        for line in read:
            record = json.loads(line)
            if 'metrics' in record and (record['step'] > 15 or record.get('tag') == 'validation'):
                record['metrics'] = {name: None for name in record['metrics']}
                record.pop('loss', None)
            out.write(json.dumps(record) + '\n')
    found = summary.figures(path, os.path.join(build, 'moectl'), warns=True)
    json.dumps(found, allow_nan=False)
    assert early.failed(found, {'validation_loss': 2.0}), 'a run without a loss has failed'
    assert found['series'][-1] is None


def main(build):
    with tempfile.TemporaryDirectory() as folder:
        text = text_files(folder)
        whole, cut = os.path.join(folder, 'whole'), os.path.join(folder, 'cut')
        subprocess.run(command(build, whole, text), check=True)

        process = subprocess.Popen(command(build, cut, text, '--only', 'ours', '--jobs', '1'), start_new_session=True)
        while last_step(log_of(cut)) < 7:
            assert process.poll() is None, 'ended before it could be killed'
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not summaries(cut), 'a killed run has left a summary'
        subprocess.run(command(build, cut, text), check=True)

        once, again = summaries(whole), summaries(cut)
        assert sorted(once) == ['none-s501.json', 'ours-s501.json', 'pi-s501.json'], sorted(once)
        assert once['pi-s501.json']['figures']['aux_loss_weight'] > 0, 'of the whole model'
        for name in once:
            assert once[name]['figures'] == again[name]['figures'], name
            assert once[name]['versions'] == again[name]['versions'], name
        assert open(log_of(whole), 'rb').read() == open(log_of(cut), 'rb').read(), 'other bits after a kill'

        before = os.stat(log_of(cut)).st_mtime_ns
        done = subprocess.run(command(build, cut, text), check=True, capture_output=True, text=True)
        assert '3 runs done before, 0 to go' in done.stderr and os.stat(log_of(cut)).st_mtime_ns == before, done.stderr

        tables = os.path.join(HERE, 'tables.py')
        subprocess.run([sys.executable, tables, 'balance', '--results', os.path.join(whole, 'quick')], check=True)
        page = open(os.path.join(whole, 'quick', 'balance.md'), encoding='utf-8').read()
        assert '| **adaptive_bias, feed-forward** | 1 |' in page and '| none | 1 |' in page, page
        picture = open(os.path.join(whole, 'quick', 'balance.svg')).read()
        assert picture.count('<polyline') == 3, picture
        look_at_a_diverged_run(build, log_of(whole), os.path.join(folder, 'diverged.jsonl'))
        subprocess.run([sys.executable, tables, '--check'], check=True)


if __name__ == '__main__':
    main(sys.argv[1])
