#!/bin/sh
# ./dev test-device: builds core, adapter, example and device tests against the LibTorch inside the installed PyTorch, with the
# kit of ./dev device-kit for the rest, runs all of it and prints one table: device/run.sh KIT BUILD [FOLDER]
# Without a GPU it runs what the CPU can. The outputs lie in BUILD/out; FOLDER gets the table and an archive of them. From the environment: PYTHON, another
# python3; JOBS (default: one a core); BUDGET, seconds after which nothing more is begun (default 3600); QUICK=1, without the
# tests of what has nothing to do with the device; STEPS of the large training runs.
set -u
cd "$(dirname "$0")/../.." || exit 2
kit=$(cd "$1" && pwd) || exit 2
rm -rf "$2/out"
mkdir -p "$2/out"
build=$(cd "$2" && pwd) copy=${3:-}
out=$build/out
python=${PYTHON:-python3} jobs=${JOBS:-$(nproc)} budget=${BUDGET:-3600}
began=$(date +%s)
rows=$out/table
printf '| what | result | seconds |\n|---|---|---|\n' >"$rows"
failed=0

row() { printf '| %s | %s | %s |\n' "$1" "$2" "$3" >>"$rows"; }
within() { timeout "$limit" "$@"; }
# step NAME SECONDS COMMAND...: runs it with its output in OUT and sets `code` and `seconds`; `within` what takes time.
step() {
  name=$1 limit=$2
  shift 2
  start=$(date +%s) code=124
  left=$((budget - start + began))
  [ "$limit" -le $left ] || limit=$left
  if [ "$limit" -gt 0 ]; then
    echo "== $name"
    "$@" >"$out/$name.txt" 2>&1
    code=$?
  else
    echo "no time was left" >"$out/$name.txt"
  fi
  seconds=$(($(date +%s) - start))
  if [ $code != 0 ]; then
    failed=1
    tail -n 25 "$out/$name.txt"
  fi
}
finish() {
  {
    echo "$card; PyTorch $torch_version; $(uname -m), $(nproc) cores; $(c++ --version | head -1)"
    cat "$rows"
    [ ! -e "$out/device_bench.txt" ] || { echo; cat "$out/device_bench.txt"; }
    echo "All in $(($(date +%s) - began)) s; outputs in $out"
  } >"$out/report.txt"
  echo
  cat "$out/report.txt"
  if [ -n "$copy" ]; then
    mkdir -p "$copy"
    cp "$out/report.txt" "$copy"
    tar -C "$out" -czf "$copy/outputs.tar.gz" .
  fi
  exit $failed
}

# ---- what is here ----
card="no PyTorch" torch_version=none
"$python" - >"$out/torch" 2>"$out/torch.err" <<'PYTHON' || { cat "$out/torch.err"; row "PyTorch" "no $python with torch" 0; failed=1; finish; }
import os, torch
gpu = torch.cuda.is_available()
print(torch.__version__)
print(torch.utils.cmake_prefix_path)
print(os.path.dirname(torch.__file__))
print(torch.cuda.get_device_name() if gpu else "no GPU")
print("%d.%d" % torch.cuda.get_device_capability() if gpu else "9.0")
print(torch.cuda.get_device_properties(0).total_memory >> 30 if gpu else 0)
try:
    import nvidia
    print(os.pathsep.join(os.path.join(p, d) for p in nvidia.__path__ for d in sorted(os.listdir(p))))
except ImportError:
    print()
PYTHON
line() { sed -n "$1p" "$out/torch"; }
torch_version=$(line 1) prefix=$(line 2) torch_folder=$(line 3) card=$(line 4)
export TORCH_CUDA_ARCH_LIST="$(line 5)"  # or CMake would run a program of its own to find out
vendor=""  # the folders of the vendor's Python packages, which hold headers
IFS=:
for folder in $(line 7); do [ ! -d "$folder/include" ] || vendor="$vendor;$folder"; done
unset IFS

# ---- build ----
library=$(dirname "$(find "$kit" -name libyaml.a | head -1)")
export LIBRARY_PATH="$library${LIBRARY_PATH:+:$LIBRARY_PATH}"
[ ! -x /usr/local/cuda/bin/nvcc ] || export PATH="$PATH:/usr/local/cuda/bin" CUDACXX="${CUDACXX:-/usr/local/cuda/bin/nvcc}"
generator="Unix Makefiles" keep_going=-k
if command -v ninja >/dev/null; then generator=Ninja keep_going="-k 0"; fi
configure() {
  within cmake -S . -B "$build/tree" -G "$generator" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$kit/usr;$prefix" \
    -DCMAKE_BUILD_RPATH="$library" -DMOECTL_CUDA_FOLDERS="$vendor" \
    -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined -DMOECTL_CHART_JS="$kit/chart.min.js" -DMOECTL_WERROR=OFF -DMOECTL_C=OFF \
    -DMOECTL_INSTALL=OFF -DMOECTL_PROMETHEUS=OFF -DCMAKE_GTEST_DISCOVER_TESTS_DISCOVERY_MODE=PRE_TEST "$@"
}
step configure 120 configure
if [ $code = 0 ]; then
  row "configure" "LibTorch of $prefix" $seconds
else
  echo "LibTorch's CMake package fails here; its folder is taken as it lies"
  row "configure" "LibTorch's CMake package fails" $seconds
  failed=0
  rm -rf "$build/tree"
  step configure 120 configure -DMOECTL_TORCH_FOLDER="$torch_folder"
  row "configure" "$([ $code = 0 ] && echo "LibTorch of $torch_folder, as it lies" || echo FAILED)" $seconds
  [ $code = 0 ] || finish
fi
targets="train_moe_lm device_bench quickstart"
programs=$(sed -n 's/^-- Tests on an accelerator: //p' "$out/configure.txt" | tail -1 | tr ';' ' ')
for program in $programs; do targets="$targets ${program}_tests"; done
[ -n "${QUICK:-}" ] || targets="$targets torch_tests core_tests moectl golden_traces"
targets=$(echo "$targets" | tr ' ' '\n' | awk '!seen[$0]++')
# shellcheck disable=SC2086 # lists of words
step build 1800 within cmake --build "$build/tree" -j "$jobs" --target $targets -- $keep_going
row "build, $jobs jobs" "$([ $code = 0 ] && echo built || echo "not all built")" $seconds

# ---- run ----
# One program of tests, in as many parts side by side as jobs, one thread each.
parts() {
  program=$1 count=$2
  part=0
  pids=""
  while [ $part -lt "$count" ]; do
    OMP_NUM_THREADS=1 GTEST_TOTAL_SHARDS=$count GTEST_SHARD_INDEX=$part timeout "$limit" "$program" &
    pids="$pids $!"
    part=$((part + 1))
  done
  bad=0
  for pid in $pids; do wait "$pid" || bad=1; done
  return $bad
}
number() { grep -a "^\[  $1  *\] [0-9]* test" "$out/$2.txt" | sed 's/^.*\] \([0-9]*\) test.*/\1/' | awk '{s+=$1} END {print s+0}'; }
tests() {
  name=$1 count=$2 program=$build/tree/tests/$1
  if ! [ -x "$program" ]; then
    row "$name" "not built" 0
    return
  fi
  step "$name" 240 parts "$program" "$count"
  row "$name" "$(number PASSED "$name") passed, $(number SKIPPED "$name") skipped, $(number FAILED "$name") failed$([ $code = 0 ] || echo ", code $code")" $seconds
}
tests device_tests 1
for program in cuda nccl; do
  case " $programs " in
    *" $program "*) tests ${program}_tests 1 ;;
    *) row "${program}_tests" "left out: no headers of $program" 0 ;;
  esac
done

if [ -x "$build/tree/bench/device_bench" ]; then
  step device_bench 120 within "$build/tree/bench/device_bench"
  row "device_bench" "$([ $code = 0 ] && echo ran || echo FAILED)" $seconds
fi

# The example: sizes that fill a card, or as small as runs on a CPU in seconds; its texts are this project's own.
find docs README.md policies -name '*.md' | sort | xargs cat >"$build/prose.txt"
find src policies include tests -name '*.cc' | sort | xargs cat >"$build/code.txt"
small="--width 32 --heads 2 --expert-hidden 16 --batch 4 --length 64 --steps 12"
if [ "$card" = "no GPU" ]; then
  large="--device cpu $small" small="--device cpu $small"
else
  batch=$(($(line 6) * 46 / 100))  # sequences a GiB of the card, measured by estimate: 64 on 139 GiB
  [ "$batch" -le 64 ] || batch=64
  large="--device cuda --width 1024 --heads 16 --expert-hidden 1024 --batch $batch --length 512 --learning-rate 1e-3"
  large="$large --steps ${STEPS:-60}" small="--device cuda $small"
fi
# train NAME LOG POLICY OPTION...
train() {
  name=$1 log=$2 policy=$3
  shift 3
  step "$name" 200 within "$build/tree/examples/train_moe_lm" --bf16 --validate-every 1000 --policy "$policy" \
    --log "$out/$log.jsonl" "$@" --text "$build/prose.txt" "$build/code.txt"
  result=$(sed -n 's/^final loss \(.*\)/loss \1,/p; s/^\(.* ms a step; control .*\) of training time/\1/p' "$out/$name.txt")
  row "$name" "$([ $code = 0 ] && echo $result || echo FAILED)" $seconds
}
loss() { grep '^final loss' "$out/$1.txt"; }
if [ -x "$build/tree/examples/train_moe_lm" ]; then
  for lag in 0 1; do
    sed "s/^version: 1/version: 1\nlag: $lag/" examples/device_controlled.yaml >"$build/lag_$lag.yaml"
  done
  sed "s/^version: 1/version: 1\nmode: off/" examples/device_uncontrolled.yaml >"$build/off.yaml"
  # shellcheck disable=SC2086 # lists of options
  {
    train train_off train_off "$build/off.yaml" $large
    train train_uncontrolled train_uncontrolled examples/device_uncontrolled.yaml $large
    train train_lag_0 train_lag_0 "$build/lag_0.yaml" $large
    train train_lag_1 train_lag_1 "$build/lag_1.yaml" $large
    train small_straight small_straight "$build/lag_1.yaml" $small
    train small_half small_resumed "$build/lag_1.yaml" $small --until 6 --checkpoint "$build/run.pt"
    train small_resumed small_resumed "$build/lag_1.yaml" $small --resume "$build/run.pt"
  }
  if [ "$(loss small_resumed)" = "$(loss small_straight)" ]; then
    row "small_resumed" "the loss of small_straight, bit for bit" 0
  else
    row "small_resumed" "another loss than small_straight" 0
    [ "$card" != "no GPU" ] || failed=1  # a GPU adds up some gradients in any order
  fi
fi

if [ -z "${QUICK:-}" ]; then
  tests torch_tests "$jobs"
  tests core_tests "$jobs"
  if [ -x "$build/tree/tests/golden_traces" ]; then
    step golden_traces 60 within "$build/tree/tests/golden_traces" tests/golden
    row "golden_traces" "$([ $code = 0 ] && echo "the same bits" || echo FAILED)" $seconds
  fi
fi
finish
