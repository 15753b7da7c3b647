"""The processes that a worker's process has started, in whatever session or process group, by Linux's ``/proc``.

Browsers and shells that agents drive often start a session of their own, so that a signal to the process group of the
worker misses them. Descendants of a live process are found by their parents; those whose parent has ended by a random
mark in their environment, which they have inherited. Elsewhere than on Linux nothing is found.

It imports nothing of Forebay, since the orphan reaper uses it, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

MARK = "FOREBAY_WORKER_PROCESS"  # name of the environment variable that holds the mark
_ROUNDS = 10  # searches for marked processes, since one may start another while it is being killed


def descendants(pid: int) -> list[int]:
    """Return the processes that `pid` and its descendants have started and that still run, nearest first."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{each}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_bytes().split()]
    return found[1:]


def marked(marks: Iterable[str]) -> list[int]:
    """Return the processes of this user that have one of `marks` in their environment."""
    entries = [f"{MARK}={mark}".encode() for mark in marks]
    found = []
    with contextlib.suppress(OSError):
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if not set((process / "environ").read_bytes().split(b"\0")).isdisjoint(entries):
                    found.append(int(process.name))
    return found


def kill_all(pids: Iterable[int]) -> None:
    """Kill processes, those that have ended already aside."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def kill_marked(marks: Iterable[str]) -> None:
    """Kill the processes with one of `marks`, and those that they have started, until none is left."""
    marks = tuple(marks)
    killed: set[int] = set()
    for _ in range(_ROUNDS):
        found = set(marked(marks)) - killed  # one that was killed is listed until its parent has waited for it
        if not found:
            return
        for pid in found:
            kill_all([*descendants(pid), pid])
        killed |= found
