#!/usr/bin/env bash
# Runs the tests on the Python of .venv, then on each other Python at an end of the supported range that is found, then
# those of tests/frameworks in the environments of the frameworks. Arguments go to pytest; with any, frameworks are left
# out, unless tests/frameworks is one.
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

# Tests of litellm start it in an environment of its own; without that they are skipped, and say so.
[ $# -gt 0 ] || scripts/bootstrap.sh .venv-litellm '' requirements/litellm.txt || echo 'NOT TESTED: litellm'

# What depends on the version of Python is asyncio, sqlite3, the libraries and the language, and the quick tests of
# everything meet these. The others take the same Forebay through more random runs, more stores and servers, and earlier
# SDKs: they run on one Python only.
#
# Each worker has a part of the tests, in their order, so that most fixtures and servers of a module are started once;
# who is done first takes from the others.
others=()
for python in "${pythons[@]}"; do
    echo "== tests on $("$python" --version) =="
    "$python" -m pytest --numprocesses "${JOBS:-4}" --dist worksteal "${others[@]}" "$@"
    others=(-m "not slow" --hypothesis-profile quick -k "not sqs and not sentinel and not cluster and not replicated")
done

# Frameworks pin what they need, so they have environments of their own: requirements/NAME.txt in .venv-NAME.
frameworks=(frameworks crewai)
case " $* " in "  " | *tests/frameworks*) ;; *) frameworks=() ;; esac
for name in ${frameworks[@]+"${frameworks[@]}"}; do
    scripts/bootstrap.sh ".venv-$name" '' "requirements/$name.txt"
    echo "== tests of requirements/$name.txt =="
    ".venv-$name/bin/python" -m pytest "${@:-tests/frameworks}"
done
