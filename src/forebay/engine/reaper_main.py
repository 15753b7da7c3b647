"""The program of the orphan reaper: it outlives its parent for a moment and kills the process groups left behind.

It imports nothing of Forebay, so that it is small and starts fast. It reads lines from its standard input: ``+PID``
when a process group has started, ``-PID`` when it has ended. End of input means that the parent has ended in some way.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Read until the end of input, then kill the groups that are left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a service manager sends them to every process of a service that drains
    groups: set[int] = set()
    with open(0, "rb", buffering=0, closefd=False) as lines:
        rest = b""
        while data := lines.read(4096):
            *complete, rest = (rest + data).split(b"\n")
            for line in complete:
                (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for pid in groups:
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:  # it has ended by itself
            continue


if __name__ == "__main__":
    main()
