#!/bin/sh
# What the tests of datatools.vst build and load: g++ and dpf-source (a VST3 instrument), zam-plugins (VST3 effects).
# Installed only where missing, by root on Debian or Ubuntu; elsewhere one line says what to install, and those tests
# are skipped. Under CI=true they are required.
set -u
missing=
command -v g++ >/dev/null || missing="$missing g++"
[ -d /usr/share/dpf/distrho ] || missing="$missing dpf-source"
[ -d /usr/lib/vst3/ZamComp.vst3 ] || missing="$missing zam-plugins"
[ -z "$missing" ] && exit 0

log=$(mktemp)
trap 'rm -f "$log"' EXIT
reason="it takes root and apt-get"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "== installing$missing for the tests of VST3 plugins"
    export DEBIAN_FRONTEND=noninteractive
    if { apt-get update && apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then exit 0; fi
    reason=$(grep -E '^(E|Err):?' "$log" | tail -1)
fi
echo "not installed:$missing ($reason); the tests that load VST3 plugins are skipped without" >&2
[ "${CI:-}" = true ] && exit 1
exit 0
