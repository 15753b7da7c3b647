#!/usr/bin/env bash
# Runs the tests on the Python of .venv, then on each other Python at an end of the supported range that is found.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

here=$(.venv/bin/python -c 'import sys; print("{}.{}".format(*sys.version_info))')
pythons=(.venv/bin/python)
for minor in 3.11 3.13; do
    [ "$minor" != "$here" ] || continue
    status=0
    scripts/bootstrap.sh ".venv-$minor" "$minor" || status=$?
    case $status in
        0) pythons+=(".venv-$minor/bin/python") ;;
        3) echo "NOT TESTED on Python $minor: none was found here that can make a virtual environment" ;;
        *) exit "$status" ;;
    esac
done

# Tests that take minutes and do not depend on the version of Python run on one only: injected bugs, earlier SDKs, and
# task stores on SQS, Sentinels and a cluster.
others=()
for python in "${pythons[@]}"; do
    echo "== tests on $("$python" --version) =="
    "$python" -m pytest --numprocesses "${JOBS:-2}" "${others[@]}" "$@"
    others=(--ignore tests/mutation --ignore tests/integration/test_older_sdks.py)
    others+=(-k "not sqs and not sentinel and not cluster")
done
