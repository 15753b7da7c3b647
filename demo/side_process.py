"""The process of a side as its parent sees it: start it, read its reports, and hold it to its time and memory."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from demo.provider import KEY
from demo.sample import Instructions, Sample, Side

_MEMORY_INTERVAL: Final = 0.05  # seconds between readings of a side's memory
_SHOW_INTERVAL: Final = 0.25  # seconds between updates of the screen
_START_TIMEOUT: Final = 60.0  # seconds until a side must be ready
_STOP_TIMEOUT: Final = 10.0  # seconds until a side that was told to stop is killed
_LOG_TAIL: Final = 15  # lines

_ROOT: Final = Path(__file__).parents[1]  # the repository, which the child imports `demo` from

_decode: Final = msgspec.json.Decoder(Sample).decode


class Ending(StrEnum):
    """The reason why a side's process ended."""

    DONE = "all done"
    TIME_UP = "time is up"
    OUT_OF_MEMORY = "out of memory"
    STOPPED = "stopped"  # somebody pressed Ctrl-C
    CRASHED = "crashed"


class SideProcess:
    """The process of one side.

    Its memory limit works as a container's: the kernel kills a process whose resident memory exceeds the limit; this
    class reads it every 50 ms and does the same. (RLIMIT_AS would count address space that an allocator merely
    reserves, and raise a MemoryError in whichever task allocates next.)

    Args:
        instructions: what it is to do.
        key: the API key, passed in the environment.
        log: file for its standard error.
    """

    def __init__(self, instructions: Instructions, *, key: str, log: Path) -> None:
        self.instructions = instructions
        self.samples: list[Sample] = []
        self.latencies: list[float] = []
        self.memory: list[tuple[float, float]] = []  # seconds and resident megabytes, as measured from here
        self.peak_rss_mb = 0.0
        self.ending: Ending | None = None
        self.ended_at: float | None = None  # seconds after it was ready
        self._log = log
        self._started_at = time.monotonic()
        self._ready_at: float | None = None
        self._stopped_at: float | None = None  # when `stop` was called
        self._stop_reason: Ending | None = None  # what it was ended for, if not for time
        self._buffer = b""
        command = [sys.executable, "-m", "demo.side_main", msgspec.json.encode(instructions).decode()]
        with log.open("wb") as errors:
            # In a group of its own: Ctrl-C reaches the parent alone, which lets the side end in order.
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(key),
                process_group=0,
            )
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        assert self._process.stdout is not None  # noqa: S101
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._stdout.close()

    @property
    def side(self) -> Side:
        """The side that it runs."""
        return self.instructions.side

    @property
    def last(self) -> Sample | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    @property
    def seconds(self) -> float:
        """Seconds since it was ready, until it ended."""
        if self.ended_at is not None:
            return self.ended_at
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    @property
    def status(self) -> int | None:
        """Exit status of the process, or minus the signal that ended it; None while it runs."""
        return self._process.returncode

    def stop(self, why: Ending | None = None) -> None:
        """Tell it to end."""
        self._stop_reason = why or self._stop_reason
        self._stopped_at = time.monotonic()
        with contextlib.suppress(OSError):
            self._stdin.write(b"stop\n")
            self._stdin.flush()

    def follow(self, tick: Callable[[], object]) -> None:
        """Watch it until it ends, and call `tick` four times a second.

        Raises:
            KeyboardInterrupt: it has not ended yet: `stop` it, and follow again.
        """
        shown = -inf
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while self.ending is None:
                if selector.select(_MEMORY_INTERVAL):
                    self._read()
                self._check_memory()
                self._check_time()
                if time.monotonic() - shown >= _SHOW_INTERVAL:
                    shown = time.monotonic()
                    tick()
        tick()

    def log_tail(self) -> str:
        """Return the last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_TAIL:])

    # --- inside ---

    def _read(self) -> None:
        chunk = os.read(self._stdout.fileno(), 1 << 16)
        if not chunk:
            self._record_end()
            return
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            sample = _decode(line)
            if self._ready_at is None:
                self._ready_at = time.monotonic() - sample.t
            self.samples.append(sample)
            self.latencies.extend(sample.latencies)

    def _check_memory(self) -> None:
        """Read its memory, and kill it if that is too much."""
        if self.ending is not None or self._stop_reason is Ending.OUT_OF_MEMORY:
            return
        now, peak = resident_mb(self._process.pid) or self._reported_memory()
        self.peak_rss_mb = max(self.peak_rss_mb, peak)
        too_much = now > self.instructions.settings.memory_mb
        due = not self.memory or self.seconds - self.memory[-1][0] >= _SHOW_INTERVAL
        if self._ready_at is not None and (too_much or due):
            self.memory.append((self.seconds, now))
        if too_much:
            self._stop_reason = Ending.OUT_OF_MEMORY
            self._process.kill()

    def _reported_memory(self) -> tuple[float, float]:
        return (self.last.rss_mb, self.last.rss_mb) if self.last else (0.0, 0.0)

    def _check_time(self) -> None:
        now, last = time.monotonic(), self.last
        if self._stopped_at is None:
            all_ended = last is not None and last.submitted >= self.instructions.settings.tasks and not last.inside
            if self.seconds >= self.instructions.settings.seconds or (all_ended and not self.side.stores_tasks):
                self.stop()
        elif now - self._stopped_at > _STOP_TIMEOUT:
            self._process.kill()
        if self._ready_at is None and now - self._started_at > _START_TIMEOUT:
            self._process.kill()

    def _record_end(self) -> None:
        last = self.last
        self.ended_at = last.t if last is not None and last.stage == "ended" else self.seconds
        self._process.wait()
        if self._stop_reason is Ending.OUT_OF_MEMORY:
            self.ending = self._stop_reason
        elif last is None or last.stage != "ended":
            self.ending = Ending.CRASHED
        else:
            nothing_left = not last.inside and not last.spilled
            self.ending = self._stop_reason or (Ending.DONE if nothing_left else Ending.TIME_UP)


def resident_mb(pid: int) -> tuple[float, float] | None:
    """Return the resident memory of a process in MB, now and at its peak; None if the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    if "VmRSS" not in fields:  # it has ended, and nobody has waited for it yet
        return None
    now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _environment(key: str) -> dict[str, str]:
    """Return the environment of a side's process: the parent's, the API key, and where `demo` is imported from."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, KEY: key, "PYTHONPATH": path}
