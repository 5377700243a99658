#!/bin/sh
# ./dev demo: the same model trained uncontrolled and controlled, on the same batches, and both runs side by side.
# Expects the tool and the training example to be built. Leaves run logs in runs/demo.
set -eu
cd "$(dirname "$0")/.."

seeds=1
steps=""
policy=examples/controlled.yaml
text=""
while [ $# -gt 0 ]; do
  case $1 in
    --seeds) seeds=$2; shift 2 ;;
    --steps) steps="--steps $2"; shift 2 ;;
    --policy) policy=$2; shift 2 ;;
    --text) shift; text="$*"; break ;;
    *) echo "./dev demo: no option '$1'" >&2; exit 2 ;;
  esac
done

train=build/release/examples/train_moe_lm
runs=runs/demo
mkdir -p "$runs"
name=$(basename "$policy" .yaml)

# train_run NAME SEED CONFIG: one training run, logged as NAME-sSEED.
train_run() {
  log=$runs/$1-s$2.jsonl
  echo
  echo "== $1, seed $2 → $log"
  # shellcheck disable=SC2086 # lists of words
  $train --policy "$3" --seed "$2" --log "$log" $steps ${text:+--text $text}
}

seed=1
logs=""
while [ "$seed" -le "$seeds" ]; do
  train_run uncontrolled "$seed" examples/uncontrolled.yaml
  train_run "$name" "$seed" "$policy"
  logs="$logs $runs/uncontrolled-s$seed.jsonl $runs/$name-s$seed.jsonl"
  seed=$((seed + 1))
done

# Over several seeds: what control costs in validation loss, each controlled run against the uncontrolled one of its
# own seed, which saw the same batches from the same initial weights.
if [ "$seeds" -gt 1 ]; then
  echo
  # shellcheck disable=SC2086
  build/release/moectl compare --format json $logs | awk -F'[:,]' '
    /"run"/ { controlled = $2 !~ /uncontrolled-s/ }
    /"validation_loss"/ {
      if (!controlled) { base = $2; next }
      difference = $2 - base; n++; sum += difference; squares += difference * difference
    }
    END {
      error = sqrt((squares - sum * sum / n) / (n - 1) / n)
      printf "validation loss, controlled - uncontrolled: %+.4f nats, standard error %.4f, %d paired seeds\n",
        sum / n, error, n
    }'
fi

# shellcheck disable=SC2086
build/release/moectl report $logs -o $runs/report.html
echo
echo "The same with every step, layer and expert: $runs/report.html"
echo
# shellcheck disable=SC2086
build/release/moectl compare $logs
