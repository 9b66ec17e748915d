#!/bin/sh
# What the tests use besides Python packages: for datatools.vst g++ and dpf-source (build a VST3 instrument) and
# zam-plugins (VST3 effects); for the browser tests Chromium. Installed only where missing, by root on Debian or Ubuntu;
# elsewhere one line says what to install, and those tests are skipped. Under CI=true they are required.
set -u
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0

install() {  # install "packages" "what is skipped without"
    reason="it takes root and apt-get"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "== installing $1 for $2"
        export DEBIAN_FRONTEND=noninteractive
        if { apt-get update && apt-get install -y --no-install-recommends $1; } >"$log" 2>&1; then return; fi
        reason=$(grep -E '^(E|Err):?' "$log" | tail -1)
    fi
    echo "not installed: $1 ($reason); $2 are skipped without" >&2
    if [ "${CI:-}" = true ]; then status=1; fi
}

plugins=
command -v g++ >/dev/null || plugins="$plugins g++"
[ -d /usr/share/dpf/distrho ] || plugins="$plugins dpf-source"
[ -d /usr/lib/vst3/ZamComp.vst3 ] || plugins="$plugins zam-plugins"
[ -z "$plugins" ] || install "${plugins# }" "the tests that load VST3 plugins"
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
    install chromium "the tests in a browser"
exit $status
