"""The orphan reaper: no process that runs a handler outlives this process, not even when this one gets ``kill -9``.

One small process does it. The kernel could kill a child whose parent dies, but not the processes that the child
started, not on every system, and only while the thread that started the child lives. The end of this process closes a
pipe, which the reaper always notices.
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
    """The processes to kill when this process ends, with all that they started. The reaper runs while there are any.

    Its methods block, so they are called in threads.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._marks: dict[int, str] = {}  # by process group
        self._process: subprocess.Popen[bytes] | None = None

    def after_fork(self) -> None:
        """Forget the parent's groups and close the parent's pipe. Called in a fork of this process."""
        process = self._process
        self._reset()
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def watch(self, pid: int, mark: str) -> None:
        """Kill the process group `pid` when this process ends, and the processes that have `mark`.

        Raises:
            OSError: the system has no more processes or descriptors; `pid` is not watched.
        """
        with self._lock:
            if self._process is None or not _write(self._process, f"+{pid} {mark}\n"):
                self._start_reaper({**self._marks, pid: mark})
            self._marks[pid] = mark

    def forget(self, pid: int) -> None:
        """Stop watching the process group `pid`, because it has ended."""
        with self._lock:
            self._marks.pop(pid, None)
            if self._process is None:
                return
            if not self._marks:
                process, self._process = self._process, None
                _stop(process)
            elif not _write(self._process, f"-{pid}\n"):  # the reaper was killed
                with contextlib.suppress(OSError):  # then the next `watch` tries again
                    self._start_reaper(self._marks)

    def _start_reaper(self, marks: dict[int, str]) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            _stop(process)
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and file
            [sys.executable, "-I", "-S", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # a reader of our output must not wait for the end of the reaper
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        _write(self._process, "".join(f"+{pid} {mark}\n" for pid, mark in marks.items()))


def _write(process: subprocess.Popen[bytes], lines: str) -> bool:
    assert process.stdin is not None  # noqa: S101 - it was started with a pipe
    try:
        process.stdin.write(lines.encode())
    except BrokenPipeError:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None  # noqa: S101 - it was started with a pipe
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait()


orphan_reaper = OrphanReaper()
os.register_at_fork(after_in_child=orphan_reaper.after_fork)
