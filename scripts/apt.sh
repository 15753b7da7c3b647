#!/usr/bin/env bash
# Installs those of the named Debian packages that are missing: as root, or by sudo if it asks for no password. Where it
# may not, it says what is missing and fails.
set -euo pipefail

missing=()
for package; do
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

root=()
if [ "$(id -u)" -ne 0 ]; then
    root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || ! "${root[@]}" true 2>/dev/null; then
    echo "missing, and not mine to install: ${missing[*]} (as root: apt-get install ${missing[*]})" >&2
    exit 1
fi

apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq --yes -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120)
echo "installing Debian packages: ${missing[*]}" >&2
{
    "${apt[@]}" update
    "${apt[@]}" install --no-install-recommends "${missing[@]}"
} </dev/null >&2
