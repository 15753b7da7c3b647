"""A process that outlives its parent by a moment: it kills the process groups that the parent has left behind.

A program of its own, which imports nothing of Forebay: it is to be small and to start fast. On its standard input come
lines, ``+PID`` when a group has begun and ``-PID`` when it is over; at their end the parent is gone, however it went.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Watch until the end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a service that is to drain sends them to all its processes
    groups: set[int] = set()
    with open(0, "rb", buffering=0, closefd=False) as lines:
        rest = b""
        while data := lines.read(4096):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for pid in groups:
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:  # it has ended by itself
            continue


if __name__ == "__main__":
    main()
