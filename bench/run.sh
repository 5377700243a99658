#!/bin/sh
# ./dev bench: every benchmark, then the ratios that the project has budgets for, each taken within one run.
# Arguments go to the benchmark programs, e.g. --benchmark_filter=step
set -eu
cd "$(dirname "$0")/.."
build=build/release/bench
results=$(mktemp)
trap 'rm -f "$results"' EXIT

for program in torch_bench core_bench; do
  # Medians of repeated runs, because a shared machine is noisy.
  "$build/$program" --benchmark_repetitions=5 --benchmark_report_aggregates_only=true \
    --benchmark_out="$results.$program" --benchmark_out_format=csv "$@"
  cat "$results.$program" >>"$results"
  rm -f "$results.$program"
done

awk -F, '
  # name,iterations,real_time,cpu_time,time_unit,...
  $1 ~ /_median"?$/ { name = $1; gsub(/"|_median/, "", name); time[name] = $3 }
  function ratio(what, a, b, budget) {
    if (!(a in time) || !(b in time)) return
    printf "%-74s %7.2f   budget %s\n", what, time[a] / time[b], budget
  }
  END {
    print "\nRatios of median times"
    ratio("record: torch::bincount / moectl", "record_torch_bincount", "record_moectl", ">= 2.5")
    ratio("record: moectl / plain increments", "record_moectl", "record_plain_increments", "<= 1.2")
    ratio("record with top values and slope: moectl / plain increments", "record_moectl_top_values", "record_plain_increments", "<= 2")
    step = "step_moectl/58/256/manual_time"
    ratio("step 58 x 256: moectl / metrics and sign law, stacked tensor operations", step, "step_torch_stacked", "<= 0.08")
    ratio("step 58 x 256: moectl / sign law alone, layer by layer", step, "step_torch_sign_by_layer", "none")
    ratio("step 58 x 256: moectl / sign law alone, stacked", step, "step_torch_sign_stacked", "none")
    large = "step_moectl/100/4096/manual_time"
    if ((step in time) && (large in time))
      printf "%-74s %7.2f   budget <= 1.6\n", "step: time per expert at 100 x 4096 / at 58 x 256",
        (time[large] / 409600) / (time[step] / 14848)
  }' "$results"
"$build/log_bench"
MOECTL_LIBRARY=build/release/libmoectl.so /usr/bin/python3 bench/python_cost.py "$build/python_cost"
