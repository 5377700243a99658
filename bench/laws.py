#!/usr/bin/env python3
"""Tables of plant_table's lines.

laws.py NEW [OLD] [--laws A B] [--only TEXT]: two files, or two laws of one file, side by side: medians over the seeds (x floor: means),
the paired difference of x floor with its standard error, settle, excess area.
laws.py FILE --all: a row a law, means over the plants that every law ran on.
"""
import argparse
import collections
import math
import statistics

NEVER = 300  # what a run that never settles counts as


def read(path):
    runs = collections.defaultdict(dict)  # (law, plant) -> seed -> figures
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            law, plant, seed, *figures = line.rstrip("\n").split("\t")
            runs[law, plant][int(seed)] = [None if f == "-" else float(f) for f in figures]
    return runs


def settle(runs):
    middle = statistics.median([NEVER if r[1] is None else r[1] for r in runs])
    return "never" if middle >= NEVER else f"{middle:.0f}"


def area(runs):
    known = [r[2] for r in runs if r[2] is not None]
    return statistics.median(known) if known else None


def geometric(values):
    return math.exp(statistics.fmean([math.log(max(v, 0.1)) for v in values]))


def side_by_side(old, new):
    """Rows of Markdown; `old` and `new`: plant -> seed -> figures."""
    print("| plant | x floor | difference | settle | excess area |\n|---|---|---|---|---|")
    ratios, settles, areas, worse = [], [], [], []
    for plant in new:
        seeds = sorted(set(new[plant]) & set(old.get(plant, {})))
        if not seeds:
            continue
        a, b = [old[plant][s] for s in seeds], [new[plant][s] for s in seeds]
        differences = [y[0] - x[0] for x, y in zip(a, b)]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0
        if mean > max(0.02, 2 * error):
            worse.append(plant)
        of_a, of_b = statistics.fmean(r[0] for r in a), statistics.fmean(r[0] for r in b)
        ratios.append((of_a, of_b))
        settles.append([statistics.median([NEVER if r[1] is None else r[1] for r in x]) for x in (a, b)])
        areas_here = area(a), area(b)
        if None not in areas_here:
            areas.append(areas_here)
        told = "–" if None in areas_here else f"{areas_here[0]:.1f} → {areas_here[1]:.1f}"
        print(f"| {plant} | {of_a:.3f} → {of_b:.3f} | {mean:+.3f} ± {error:.3f} | {settle(a)} → {settle(b)} | {told} |")
    means = [geometric(column) for column in zip(*ratios)]
    steps = [statistics.fmean(column) for column in zip(*settles)]
    area_text = " → ".join(f"{geometric(column):.1f}" for column in zip(*areas)) or "–"
    print(f"| **mean over {len(ratios)} plants** | {means[0]:.3f} → {means[1]:.3f} | | {steps[0]:.0f} → {steps[1]:.0f} | "
          f"{area_text} |")
    print(f"\nWorse by more than .02 and two standard errors: {', '.join(worse) or 'none'}.")


def all_laws(runs):
    laws = list(dict.fromkeys(law for law, _ in runs))
    shared = [p for p in dict.fromkeys(p for _, p in runs) if all((law, p) in runs for law in laws)]
    print("| law | x floor | settle | excess area | end x floor | wander |\n|---|---|---|---|---|---|")
    for law in laws:
        of = [list(runs[law, plant].values()) for plant in shared]
        ratio = geometric([statistics.fmean(r[0] for r in x) for x in of])
        steps = statistics.fmean(statistics.median([NEVER if r[1] is None else r[1] for r in x]) for x in of)
        areas = geometric([area(x) for x in of if area(x) is not None])
        end = geometric([statistics.fmean(r[3] for r in x) for x in of if x[0][3] is not None])
        wander = statistics.fmean(statistics.fmean(r[4] for r in x) for x in of)
        print(f"| {law} | {ratio:.3f} | {steps:.0f} | {areas:.1f} | {end:.3f} | {wander:.3f} |")
    print(f"\nMeans over {len(shared)} simulated routers; of x floor and area geometric; "
          f"a run that never settles counts as {NEVER} steps.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="lines of plant_table; the second: what came before")
    parser.add_argument("--laws", nargs=2, metavar=("OLD", "NEW"), default=("adaptive", "adaptive"))
    parser.add_argument("--only", default="", metavar="TEXT", help="plants whose name holds it")
    parser.add_argument("--all", action="store_true", help="a row a law")
    args = parser.parse_args()
    runs = read(args.files[0])
    if args.all:
        all_laws(runs)
        return
    before = read(args.files[-1])

    def of(all_runs, law):
        return {plant: seeds for (name, plant), seeds in all_runs.items() if name == law and args.only in plant}

    side_by_side(of(before, args.laws[0]), of(runs, args.laws[1]))


if __name__ == "__main__":
    main()
