"""What a record and a step cost from Python, beside C++ in the same run: python_cost.py PROGRAM, where PROGRAM is
python_cost of the same build. MOECTL_LIBRARY names the library of that build."""

import array
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import moectl  # noqa: E402

REPEATS, ROUNDS = 300, 5


def controller(layers, experts):
    return moectl.Controller({"version": 1, "model": {"layers": layers, "experts": experts, "top_k": 8},
                              "expert_bias": {"policy": "adaptive_bias"}})


def median_of(prepare, call):
    times = []
    for i in range(REPEATS):
        prepare(i)
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def of_python():
    recording = controller(1, 64)
    experts = memoryview(array.array("q", [i * 7919 % 64 for i in range(8192 * 8)])).cast("B").cast("q", (8192, 8))
    stepping = controller(58, 256)

    # Made before: a list of 15000 numbers would drive out of the caches what the step works on.
    counts = [array.array("q", [100 + (i * 7 + step * 13 + layer) % 200 for layer in range(58) for i in range(256)])
              for step in range(4)]
    return {"record": median_of(lambda i: None, lambda: recording.record(0, experts)),
            "step": median_of(lambda i: stepping.record_counts(counts[i % 4]), lambda: stepping.step(loss=2.0))}


def of_cpp():
    lines = subprocess.run([sys.argv[1]], stdout=subprocess.PIPE, check=True).stdout.decode().split()
    return dict(zip(lines[::2], map(float, lines[1::2])))


# In turn, because a shared machine is noisy, and on one processor: those of a shared machine differ by half.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rounds = [(of_python(), of_cpp()) for _ in range(ROUNDS)]
print("\nFrom Python, medians in microseconds")
for name, what, budget in (("record", "record 8192 x 8", 1.2), ("step", "step 58 x 256", 1.25)):
    python = statistics.median(p[name] for p, _ in rounds)
    cpp = statistics.median(c[name] for _, c in rounds)
    print(f"{what + ': Python ' + format(python, '.1f') + ' / C++ ' + format(cpp, '.1f'):66} {python / cpp:7.2f}   budget <= {budget}")
