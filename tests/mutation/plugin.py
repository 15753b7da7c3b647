"""A pytest plugin that injects bugs, each in a fork of one process that has imported and collected everything.

``-p tests.mutation.plugin --bugs-from FD`` reads lines ``<function of bugs.py> <test>`` from the file descriptor. For
each it forks: the child injects the bug, runs that test, and reports as pytest does. A line ``ENDED <exit status>``
follows. To import what a bug and its test need takes over a second; to fork, some milliseconds.
"""

from __future__ import annotations

import os
import sys

import pytest
from tests.mutation import bugs

ENDED = "child process ended with status"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bugs-from", metavar="FD", type=int, help="a file descriptor that gives bugs and their tests")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    descriptor = session.config.getoption("--bugs-from")
    if descriptor is None:
        return None
    with os.fdopen(descriptor, encoding="utf-8") as requests:
        for request in requests:
            bug, test = request.split()
            sys.stdout.flush()  # else the child would write what is left there, too
            child = os.fork()
            if child == 0:
                session.items = [item for item in session.items if item.nodeid.partition("[")[0] == test]
                getattr(bugs, bug)()
                return None  # pytest runs these items, reports, and exits
            _, status = os.waitpid(child, 0)
            print(f"\n{ENDED} {os.waitstatus_to_exitcode(status)}", flush=True)
    return True
