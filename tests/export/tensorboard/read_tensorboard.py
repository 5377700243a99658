"""read_tensorboard.py DIR: what TensorBoard itself finds in a run's folder, as JSON."""
import json
import sys

from tensorboard.backend.event_processing import event_accumulator

everything = {event_accumulator.SCALARS: 0, event_accumulator.HISTOGRAMS: 0}
run = event_accumulator.EventAccumulator(sys.argv[1], size_guidance=everything)
run.Reload()
tags = run.Tags()
json.dump({
    "scalars": {tag: [[e.step, e.value] for e in run.Scalars(tag)] for tag in tags["scalars"]},
    "histograms": {tag: [[e.step, {"min": h.min, "max": h.max, "num": h.num, "sum": h.sum, "filled": sum(h.bucket)}]
                         for e in run.Histograms(tag) for h in [e.histogram_value]] for tag in tags["histograms"]},
}, sys.stdout)
