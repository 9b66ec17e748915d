#!/bin/sh
# Make the environment $1 with $PYTHON, or with the first Python from 3.10 to 3.13 found on PATH.
set -eu
in_range='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
fail() { echo "$1" >&2; exit 1; }

if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1): datatools needs Python 3.10 or newer"
else
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c "$in_range" >/dev/null 2>&1; then PYTHON=$name; break; fi
    done
    [ -n "${PYTHON:-}" ] || fail "datatools needs Python 3.10 to 3.13 and python3 is $(python3 -V 2>&1 || true): \
install one, or name it: make PYTHON=/path/to/python3.11"
fi
echo "== making $1 with $("$PYTHON" -V)"
"$PYTHON" -m venv "$1"
