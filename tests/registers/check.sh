#!/bin/sh
# The same bits whatever the width of the registers: builds the core for LEVEL, and compares all that its programs print
# with what the build for x86-64 (SSE2) prints. registers/check.sh LEVEL BUILD SCRATCH
set -eu
level=$1 build=$2 scratch=$3
golden=$(cd "$(dirname "$0")/../golden" && pwd)

# Of each level of the x86-64 psABI, the features that compilers make use of here.
case $level in
  x86-64-v3) wanted="avx2 fma bmi2" ;;
  x86-64-v4) wanted="avx512f avx512bw avx512cd avx512dq avx512vl" ;;
  *) wanted="" ;;
esac
for feature in $wanted; do
  grep -qw "$feature" /proc/cpuinfo || { echo "skipped: this machine has no $feature, which $level needs"; exit 77; }
done

traces() {
  cmake --build "$build" --target "golden_traces_$1" "bits_$1"
  rm -rf "$scratch/$1"
  mkdir -p "$scratch/$1"
  "$build/tests/golden_traces_$1" "$scratch/$1" --record
  "$build/tests/bits_$1" >"$scratch/$1/bits"
  "$build/tests/golden_traces_$1" "$golden"
}
traces x86-64
[ "$level" = x86-64 ] || traces "$level"
diff -r "$scratch/x86-64" "$scratch/$level"
