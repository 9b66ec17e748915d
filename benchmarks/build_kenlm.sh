#!/bin/sh
# KenLM for the benchmarks: the Python module and lmplz, both for orders up to 8, into .venv.
# Needs a C++ compiler, cmake and Boost (Debian: g++ cmake libboost-program-options-dev libboost-system-dev
# libboost-thread-dev libboost-test-dev zlib1g-dev libbz2-dev liblzma-dev).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python="$root/.venv/bin/python"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for tool in c++ cmake make; do command -v $tool >/dev/null || { echo "build_kenlm.sh needs $tool"; exit 1; }; done
MAX_ORDER=8 "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" kenlm
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: -c "$root/constraints.txt" -d "$place" kenlm
tar -xzf "$place"/kenlm-*.tar.gz -C "$place" --strip-components=1
cmake -S "$place" -B "$place/build" -DCMAKE_BUILD_TYPE=Release -DKENLM_MAX_ORDER=8 -DCMAKE_POLICY_VERSION_MINIMUM=3.5 >"$place/log" 2>&1 &&
cmake --build "$place/build" --target lmplz >>"$place/log" 2>&1 || { tail -20 "$place/log"; exit 1; }
cp "$place/build/bin/lmplz" "$root/.venv/bin/lmplz"
echo "lmplz is in .venv/bin"
