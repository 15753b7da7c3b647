"""The program of the orphan reaper: it outlives its parent for a moment and kills the processes left behind.

It imports nothing of Forebay but `process_tree`, so that it is small and starts fast. It reads lines from its standard
input: ``+PID MARK`` when a worker's process has started, ``-PID MARK`` when it has ended. End of input means that the
parent has ended in some way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # it runs isolated, as a file
from process_tree import descendants, kill_all, kill_marked  # type: ignore[import-not-found]


def main() -> None:
    """Read until the end of input, then kill the processes that are left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a service manager sends them to every process of a service that drains
    left: dict[int, str] = {}
    with open(0, "rb", buffering=0, closefd=False) as lines:
        rest = b""
        while data := lines.read(4096):
            *complete, rest = (rest + data).split(b"\n")
            for line in complete:
                pid, _, mark = line[1:].decode().partition(" ")
                if line[:1] == b"+":
                    left[int(pid)] = mark
                else:
                    left.pop(int(pid), None)
    for group in left:
        started = descendants(group)
        with contextlib.suppress(OSError):  # it has ended by itself
            os.killpg(group, signal.SIGKILL)
        kill_all(started)
    if left:
        kill_marked(left.values())


if __name__ == "__main__":
    main()
