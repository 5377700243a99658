#!/bin/sh
# The example mpi_loop under mpirun: mpi/run.sh MPIRUN MPI_LOOP HEADER
#  - the same bits on one rank and on four, of which one has no tokens, with lag 0 and 1;
#  - a rank that is killed ends the job with an error;
#  - the two lambdas are those that HEADER shows.
set -eu
mpirun=$1 loop=$2 header=$3
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fail() { echo "mpi: $*" >&2; exit 1; }

# In a container, as root, with fewer cores than ranks, without ssh and without leave to read the memory of other
# processes. Open MPI 4 reads OMPI_MCA_, Open MPI 5 PRTE_MCA_ for its launcher.
export OMPI_MCA_plm_rsh_agent=sh PRTE_MCA_plm_ssh_agent=sh OMPI_MCA_btl_vader_single_copy_mechanism=none \
  OMPI_MCA_btl_sm_single_copy_mechanism=none OMPI_MCA_mpi_yield_when_idle=1
job() {
  ranks=$1
  shift
  timeout 120 "$mpirun" --allow-run-as-root --oversubscribe -n "$ranks" "$loop" "$@"
}
hashes() { sed -n 's/^rank .*: biases //p' "$1"; }

for lag in 0 1; do
  job 1 300 $lag >"$scratch/alone"
  job 4 300 $lag >"$scratch/four"
  alone=$(hashes "$scratch/alone")
  [ -n "$alone" ] || fail "lag $lag: no hash from one rank"
  [ "$(hashes "$scratch/four" | wc -l)" = 4 ] || fail "lag $lag: not four hashes"
  [ "$(hashes "$scratch/four" | sort -u)" = "$alone" ] || fail "lag $lag: four ranks differ from one: $(cat "$scratch/four")"
  echo "lag $lag: four ranks have the biases of one: $alone"
  eval "lag_$lag=\$alone"
done
[ "$lag_0" != "$lag_1" ] || fail "lag 0 and 1 are the same run"

# A killed rank. The job has steps for days.
for lag in 0 1; do
  : >"$scratch/killed"  # so that it is there however late the job begins
  job 4 1000000000 $lag >"$scratch/killed" 2>"$scratch/errors" &
  launcher=$!
  victim="" tries=0
  while [ -z "$victim" ]; do
    victim=$(sed -n 's/^rank 2: process //p' "$scratch/killed")
    tries=$((tries + 1))
    [ $tries -lt 600 ] || fail "lag $lag: no rank 2 within a minute"
    sleep 0.1
  done
  sleep 0.5
  kill -9 "$victim"
  code=0
  wait $launcher || code=$?
  [ $code != 0 ] || fail "lag $lag: a job with a killed rank ended well"
  [ $code != 124 ] || fail "lag $lag: the job outlived its killed rank"
  grep -qi "signal 9" "$scratch/errors" || fail "lag $lag: no word of the killed rank: $(cat "$scratch/errors")"
  echo "lag $lag: a killed rank ends the job with code $code"
done

# Without comment marks, white space and the names of captures and functions around them.
plain() { sed 's,^ *//,,' "$1" | tr -d ' \n' | sed 's/\[[&=]\]//g'; }
plain "$header" >"$scratch/header"
for call in MPI_Allreduce MPI_Iallreduce; do
  body=$(plain "$(dirname "$0")/../../examples/mpi_loop.cc" |
    grep -o "(std::span<std::int64_t>sums){[^{}]*$call([^{}]*\(\[request\]{[^}]*};\)\?}" || true)
  [ -n "$body" ] || fail "no lambda with $call in the example"
  grep -qF "$body" "$scratch/header" || fail "the header shows another lambda than the example's: $body"
done
echo "the header shows both lambdas"
