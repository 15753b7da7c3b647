#!/usr/bin/env bash
# Installs the named npm packages, each NAME@VERSION, into a directory: nothing of them is run. Where it cannot, it says
# what is missing and fails.
#
#   scripts/npm.sh DIRECTORY PACKAGE...
set -euo pipefail
into=$1
shift
stamp=$into/.complete # what is there; written last

[ "$(cat "$stamp" 2>/dev/null)" != "$*" ] || exit 0
if ! command -v npm >/dev/null; then
    echo "missing: $* (there is no npm to install them)" >&2
    exit 1
fi
rm -rf "$into"
mkdir -p "$into"
[ -w "${HOME:-/}" ] || export npm_config_cache=$into/.cache
echo "installing npm packages: $*" >&2
npm install --prefix "$into" --no-save --no-package-lock --ignore-scripts --omit=peer \
    --no-audit --no-fund --no-update-notifier --loglevel=error "$@" </dev/null >&2
echo "$*" >"$stamp"
