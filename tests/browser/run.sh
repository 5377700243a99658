#!/bin/sh
# run.sh WORK [--long]: the browser tests, with npm's files in the folder WORK. Exits with 77, which CTest calls skipped,
# where something is missing; `./dev test-browser` installs it. --long: the measurement of long_run.mjs instead.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$1
for program in node npm "${CHROMIUM:-chromium}"; do
  command -v "$program" >/dev/null || {
    echo "skipped: $program is not installed; ./dev test-browser installs it"
    exit 77
  }
done
mkdir -p "$work"
cp "$here/package.json" "$here"/*.mjs "$work"
cd "$work"
[ -d node_modules/playwright-core ] || npm install --no-package-lock --no-audit --no-fund --loglevel=error || {
  echo "skipped: npm could not install playwright-core"
  exit 77
}
[ "${2:-}" = --long ] && exec node long_run.mjs
exec node --test report_test.mjs
