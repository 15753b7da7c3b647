"""Nothing that runs a handler outlives this process, not even its ``kill -9``: one small process sees to it.

The kernel could kill a child whose parent dies, but neither what the child started, nor on every system, nor unless the
very thread lives on that made the child. A closed pipe is seen by everyone.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

_PROGRAM = Path(__file__).with_name("reaper_main.py")


class OrphanReaper:
    """The groups of processes that are watched over; the process that does it runs while there are any.

    Blocks: for threads.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def after_fork(self) -> None:
        """In a fork of this process: what is watched over is not its own, nor is the pipe its to hold open."""
        process = self._process
        self._reset()
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def watch(self, pid: int) -> None:
        """From now on the group of `pid` ends with this process.

        Raises:
            OSError: the system has no more processes or descriptors; nothing is watched over that was not before.
        """
        with self._lock:
            if self._process is None or not _write(self._process, f"+{pid}\n"):
                self._start_reaper(self._groups | {pid})
            self._groups.add(pid)

    def forget(self, pid: int) -> None:
        """The group of `pid` has ended."""
        with self._lock:
            self._groups.discard(pid)
            if self._process is None:
                return
            if not self._groups:
                process, self._process = self._process, None
                _end(process)
            elif not _write(self._process, f"-{pid}\n"):  # somebody has ended it
                with contextlib.suppress(OSError):  # then the next to be watched has another try
                    self._start_reaper(self._groups)

    def _start_reaper(self, groups: set[int]) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            _end(process)
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and file
            [sys.executable, "-I", "-S", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # whoever reads ours is not to wait for its end
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        _write(self._process, "".join(f"+{pid}\n" for pid in groups))


def _write(process: subprocess.Popen[bytes], lines: str) -> bool:
    assert process.stdin is not None  # noqa: S101 - it has a pipe
    try:
        process.stdin.write(lines.encode())
    except BrokenPipeError:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None  # noqa: S101 - it has a pipe
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait()


orphan_reaper = OrphanReaper()
os.register_at_fork(after_in_child=orphan_reaper.after_fork)
