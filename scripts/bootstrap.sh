#!/usr/bin/env bash
# Makes, repairs or updates a virtual environment: the pins of requirements/dev.txt, and this checkout.
#
#   scripts/bootstrap.sh VENV             on the newest Python found, or on the one that PYTHON names
#   scripts/bootstrap.sh VENV MINOR       on that minor, such as 3.11; exits 3 where none can be used
#   scripts/bootstrap.sh VENV '' PINS     with other pins, such as requirements/frameworks.txt
#
# Safe to run at any time. It does nothing if the environment is complete, installs what the requirements changed, and
# starts again if a run was interrupted, the environment's Python has gone or the checkout has moved.
set -euo pipefail
cd -P "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
trap 'exit 130' INT # else an interrupted step only counts as one that failed

venv=$1
minor=${2:-}
pins=${3:-requirements/dev.txt}
python=$venv/bin/python
stamp=$venv/.complete # what the environment was made from; written last

say() { printf '%s: %s\n' "$venv" "$*" >&2; }

# The interpreter behind the command $1: fails unless it runs (a version manager's shim may not), is new enough, and is
# of the minor $2 if one is given.
interpreter() {
    "$1" - "${2:-}" 2>/dev/null <<'EOF_PYTHON'
import sys

minor = "{}.{}".format(*sys.version_info)
if sys.version_info < (3, 11) or sys.argv[1] not in ("", minor):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))
EOF_PYTHON
}

# Debian keeps ensurepip in a package of its own.
has_ensurepip() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
    local names=(python3.13 python3.12 python3.11 python3) name found fallback=
    if [ -n "$minor" ]; then
        names=("python$minor" python3)
    elif [ -n "${PYTHON:-}" ]; then
        interpreter "$PYTHON" || say "PYTHON=$PYTHON is not a Python, 3.11 or newer, that runs"
        return
    fi
    while IFS= read -r name; do
        found=$(interpreter "$name" "$minor") || continue
        if has_ensurepip "$found"; then
            printf '%s\n' "$found"
            return
        fi
        fallback=${fallback:-$found}
    done < <(type -ap "${names[@]}")
    printf '%s\n' "$fallback"
}

make_venv() {
    local base=$1 package
    package=$("$base" -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))')
    say "making it on $("$base" --version) at $base"
    rm -rf "$venv"
    if has_ensurepip "$base"; then
        "$base" -m venv "$venv"
        return
    fi
    say "this Python has no ensurepip: trying pip, virtualenv and uv, then the Debian package $package"
    {
        "$base" -m venv --without-pip "$venv" && "$base" -m pip --python "$python" install --quiet pip ||
            virtualenv --quiet --python "$base" "$venv" ||
            uv venv --quiet --clear --seed --python "$base" "$venv"
    } 2>/dev/null && return
    rm -rf "$venv"
    scripts/apt.sh "$package" && "$base" -m venv "$venv"
}

install() {
    "$python" -m pip install --quiet --constraint "$pins" uv
    say "installing $pins"
    # uv takes seconds, but knows nothing of pip's configuration: behind a mirror, pip gets there in a minute.
    "$python" -m uv pip sync --quiet --python "$python" "$pins" ||
        "$python" -m pip install --quiet --no-deps --requirement "$pins"
    "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
}

# Two lines that tell whether it can be updated in place, and those that tell whether it need be.
foundation() { printf '%s\n' "$PWD" && "$python" -c 'import sys; print(" ".join(sys.version.split()))' 2>/dev/null; }
fingerprint() { foundation && cksum "$pins" pyproject.toml scripts/bootstrap.sh; }

# Two runs at once: the second waits, then finds everything done.
if command -v flock >/dev/null; then
    exec 9<scripts/bootstrap.sh
    flock 9
fi

# An environment stays on its Python until another is asked for.
if [ -n "${PYTHON:-}" ] && [ -z "$minor" ] && [ -f "$stamp" ]; then
    asked=$(find_python)
    [ -n "$asked" ] || exit 1
    [ "$("$asked" --version)" = "$("$python" --version 2>/dev/null || true)" ] || rm -f "$stamp"
fi

[ "$(fingerprint || true)" != "$(cat "$stamp" 2>/dev/null || true)" ] || exit 0
if [ "$(foundation || true)" != "$(head -n 2 "$stamp" 2>/dev/null || true)" ]; then
    base=$(find_python)
    if [ -z "$base" ] || ! make_venv "$base"; then
        [ -z "$minor" ] || exit 3
        say "Forebay needs Python 3.11 or newer that can make virtual environments; on Debian: apt-get install python3-venv"
        exit 1
    fi
fi
rm -f "$stamp"
[ -w "${HOME:-/}" ] || export UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
[ ! -e /etc/ssl/certs/ca-certificates.crt ] || export UV_SYSTEM_CERTS=1 # a company's own certificate is there
install
fingerprint >"$stamp"
say "complete"
