#!/bin/sh
# run.sh WORK: event files of the tool, read back by readers that others wrote (see readers_test.mjs), with npm's files in
# the folder WORK. Exits with 77, which CTest calls skipped, where something is missing; `./dev test-readers` installs it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$1
for program in node npm; do
  command -v "$program" >/dev/null || {
    echo "skipped: $program is not installed; ./dev test-readers installs it"
    exit 77
  }
done
mkdir -p "$work"
cp "$here/package.json" "$here"/*.mjs "$here"/*.py "$work"
cd "$work"
# Without scripts: they would compile a faster checksum.
[ -d node_modules/tfrecord ] || npm install --ignore-scripts --no-package-lock --no-audit --no-fund --loglevel=error || {
  echo "skipped: npm could not install tfrecord"
  exit 77
}
exec node --test readers_test.mjs
