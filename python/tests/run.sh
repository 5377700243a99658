#!/bin/sh
# The tests of the Python package, with Debian's python3: MOECTL_LIBRARY=libmoectl.so run.sh [ARGS of pytest]. Exit code
# 77: pytest is not installed.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-/usr/bin/python3}
"$python" -c 'import pytest' 2>/dev/null || { echo "skipped: python3-pytest is not installed"; exit 77; }
export PYTHONPATH=.. PYTHONDONTWRITEBYTECODE=1
# One thread each, as other tests run beside it.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
exec "$python" -m pytest -q -p no:cacheprovider -rs "$@"
