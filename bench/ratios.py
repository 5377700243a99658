#!/usr/bin/env python3
"""The ratios that the project has budgets for, from what the benchmark programs wrote: ratios.py FILE.json...

Medians of repeated runs; the two times of a ratio are of one run of a program.
"""
import json
import sys

STEP, LARGE = "step_moectl/58/256/manual_time", "step_moectl/100/4096/manual_time"
RATIOS = (
    ("record: torch::bincount / moectl", "record_torch_bincount", "record_moectl", ">= 2.5"),
    ("record: moectl / plain increments", "record_moectl", "record_plain_increments", "<= 1.2"),
    ("record with top values and slope: moectl / plain increments", "record_moectl_top_values", "record_plain_increments",
     "<= 2"),
    ("step 58 x 256: moectl / metrics and sign law, stacked tensor operations", STEP, "step_torch_stacked", "<= 0.08"),
    ("step 58 x 256: moectl / sign law alone, layer by layer", STEP, "step_torch_sign_by_layer", "none"),
    ("step 58 x 256: moectl / sign law alone, stacked", STEP, "step_torch_sign_stacked", "none"),
)
CHECKS = ("BM_StepCheckBalanced", "BM_StepCheckImbalanced")


def main(files):
    time, share = {}, {}
    for file in files:
        with open(file, encoding="utf-8") as text:
            for run in json.load(text)["benchmarks"]:
                if run.get("aggregate_name") != "median":
                    continue
                name = run["name"].removesuffix("_median")
                time[name] = run["real_time"] * {"ns": 1e-3, "us": 1, "ms": 1e3}[run["time_unit"]]
                if "check_share" in run:
                    share[name] = run["check_share"]

    def show(what, value, budget):
        print(f"{what:<74} {value:7.2f}   budget {budget}")

    print("\nRatios of median times")
    for what, a, b, budget in RATIOS:
        if a in time and b in time:
            show(what, time[a] / time[b], budget)
    if STEP in time and LARGE in time:
        show("step: time per expert at 100 x 4096 / at 58 x 256", time[LARGE] / 409600 / (time[STEP] / 14848), "<= 1.6")
    if "step_wiring" in time:  # of 58 layers, in microseconds
        show("step, mode off: ns a layer for its three tensors, and all else that remains", 1000 * time["step_wiring"] / 58, "<= 20")
    for name, value in share.items():
        if name.startswith(CHECKS):
            show(f"{name.split('/')[0]}: what the check of the answer adds to a step", value, "<= 0.05")


if __name__ == "__main__":
    main(sys.argv[1:])
