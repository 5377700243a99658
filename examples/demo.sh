#!/bin/sh
# ./dev demo: the same model trained uncontrolled and controlled, on the same batches, and both runs side by side.
# `moectl watch` shows each run while it trains. Expects the tool and the training example to be built. Leaves run logs,
# and what each training said, in runs/demo. With --check as the first option it only looks at the others.
set -eu
cd "$(dirname "$0")/.."

seeds=1
steps=600
policy=examples/controlled.yaml
text=""
wrong() {
  echo "./dev demo: $1" >&2
  exit 2
}
# whole OPTION VALUE: a whole number above 0.
whole() {
  case $2 in
    '' | 0* | *[!0-9]*) wrong "$1: '$2': must be a whole number above 0" ;;
  esac
}
only_check=""
[ "${1-}" != --check ] || { only_check=yes; shift; }
while [ $# -gt 0 ]; do
  case $1 in
    --seeds) whole "$1" "${2-}"; seeds=$2; shift 2 ;;
    --steps) whole "$1" "${2-}"; steps=$2; shift 2 ;;
    --policy) [ -r "${2-}" ] || wrong "--policy: '${2-}': must be a config that can be read"; policy=$2; shift 2 ;;
    --text)
      shift
      [ $# -gt 0 ] || wrong "--text: must be followed by files"
      for file in "$@"; do [ -r "$file" ] || wrong "--text: '$file': must be a file that can be read"; done
      text="$*"
      break
      ;;
    *) wrong "no option '$1'" ;;
  esac
done
[ -z "$only_check" ] || exit 0

train=build/release/examples/train_moe_lm
moectl=build/release/moectl
runs=runs/demo
mkdir -p "$runs"
name=$(basename "$policy" .yaml)
every=$((steps > 20 ? steps / 20 : 1))  # lines of `watch` where there is no terminal

# Both are in the background: Ctrl-C does not reach them there, and a signal to this script is seen at once.
training="" watch=""
stop_both() {
  trap '' HUP INT TERM  # a second one would cut the waiting short, and the training outlive this script
  for process in $training $watch; do
    kill "$process" 2>/dev/null || :
    wait "$process" 2>/dev/null || :
  done
}
trap stop_both EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# train_run NAME SEED CONFIG: one training run, logged as NAME-sSEED. It is watched by its log, in a terminal by a live
# view; what it has to say itself comes after.
train_run() {
  log=$runs/$1-s$2.jsonl
  said=$runs/$1-s$2.txt
  echo
  echo "== $1, seed $2 → $log"
  rm -f "$log"
  # shellcheck disable=SC2086 # a list of words
  $train --policy "$3" --seed "$2" --log "$log" --steps "$steps" --quiet ${text:+--text $text} >"$said" 2>&1 &
  training=$!
  $moectl watch "$log" --pid "$training" --every "$every" &
  watch=$!
  wait "$watch" || :  # it says itself what is wrong; the training goes on
  watch=""
  status=0
  wait "$training" || status=$?
  training=""
  cat "$said"
  [ "$status" -eq 0 ] || exit "$status"
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
  $moectl compare --format json $logs | awk -F'[:,]' '
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
$moectl report $logs -o $runs/report.html
echo
echo "The same with every step, layer and expert: $runs/report.html"
echo
# shellcheck disable=SC2086
$moectl compare $logs
