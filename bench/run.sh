#!/bin/sh
# ./dev bench: every benchmark, then the ratios that the project has budgets for, each taken within one run.
# Arguments go to the benchmark programs, e.g. --benchmark_filter=step
set -eu
cd "$(dirname "$0")/.."
build=build/release/bench
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

for program in torch_bench core_bench; do
  # Medians of repeated runs, because a shared machine is noisy.
  "$build/$program" --benchmark_repetitions=5 --benchmark_report_aggregates_only=true \
    --benchmark_out="$results/$program.json" --benchmark_out_format=json "$@"
done
/usr/bin/python3 bench/ratios.py "$results/torch_bench.json" "$results/core_bench.json"
"$build/log_bench"
MOECTL_LIBRARY=build/release/libmoectl.so /usr/bin/python3 bench/python_cost.py "$build/python_cost"
