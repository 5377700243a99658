#!/bin/sh
# The same bits whatever the width of the registers: builds the core for LEVEL, and compares all that its programs print
# with what the build for x86-64 (SSE2) prints. `native` is the core as it is built for everything else: for the registers of
# this machine, unless MOECTL_NATIVE is off. registers/check.sh LEVEL BUILD SCRATCH
set -eu
level=$1 build=$2 scratch=$3
golden=$(cd "$(dirname "$0")/../golden" && pwd)

# The features of that level of the x86-64 psABI that compilers make use of here.
if [ "$level" = x86-64-v3 ]; then
  for feature in avx2 fma bmi2; do
    grep -qw "$feature" /proc/cpuinfo || { echo "skipped: this machine has no $feature, which $level needs"; exit 77; }
  done
elif [ "$level" = native ]; then
  grep -qw avx512f /proc/cpuinfo || { echo "skipped: this machine has no AVX-512"; exit 77; }
  grep -q 'MOECTL_NATIVE:BOOL=ON' "$build/CMakeCache.txt" || { echo "skipped: MOECTL_NATIVE is off"; exit 77; }
fi

traces() {
  end=_$1
  [ "$1" != native ] || end=""
  cmake --build "$build" --target "golden_traces$end" "bits$end"
  rm -rf "$scratch/$1"
  mkdir -p "$scratch/$1"
  "$build/tests/golden_traces$end" "$scratch/$1" --record
  "$build/tests/bits$end" >"$scratch/$1/bits"
  "$build/tests/golden_traces$end" "$golden"
}
traces x86-64
[ "$level" = x86-64 ] || traces "$level"
diff -r "$scratch/x86-64" "$scratch/$level"
