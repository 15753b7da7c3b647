"""The loop monitor: how late the event loop is, and which code blocks it, measured from a thread."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections import deque
from typing import TYPE_CHECKING

from forebay import clock
from forebay._text import format_duration
from forebay.events import EventBus, LoopStalled, log

if TYPE_CHECKING:
    from forebay.supervisor.load import SystemLoad
    from forebay.supervisor.runs.run import ActiveRuns, Run

_INTERVAL = 0.25  # seconds between two beats
_SAMPLES = 4


class LoopMonitor:
    """A thread that asks the loop for a beat four times a second, and measures how late the beat comes.

    The load of the host is the least of the last four lags over `bound`: one late beat says nothing, but a lag that
    lasts is overload. A beat that is later than `bound` is a stall: the stack of the loop's thread is sampled while it
    lasts, and it is counted and reported once it is over.

    Args:
        loop: the loop to monitor; the monitor is made and started in its thread.
        bound: seconds of lag at which the load is 1.0.
        runs: the runs in progress.
        load: where the lag is recorded.
        bus: where stalls are reported.

    Attributes:
        stalls: how many stalls there have been.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, bound: float, runs: ActiveRuns, load: SystemLoad, bus: EventBus
    ) -> None:
        self._loop = loop
        self._bound = bound
        self._runs = runs
        self._load = load
        self._bus = bus
        self.stalls = 0
        self._stopped = threading.Event()
        self._beat = threading.Event()
        self._lags: deque[float] = deque([0.0] * _SAMPLES, maxlen=_SAMPLES)
        self._loop_thread = threading.get_ident()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._watch, name="forebay-loop-monitor", daemon=True).start()

    def stop(self) -> None:
        """Stop, without waiting for the thread, which does nothing any more."""
        self._stopped.set()
        self._beat.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            self._beat.clear()
            asked = clock.monotonic()
            try:
                self._loop.call_soon_threadsafe(self._beat.set)
            except RuntimeError:  # the loop is closed
                return
            culprit: tuple[Run | None, str] | None = None
            while not self._beat.wait(self._bound):
                if self._stopped.is_set() or self._loop.is_closed():
                    return
                culprit = culprit or self._sample_stack()
            lag = clock.monotonic() - asked
            self._lags.append(lag)
            self._load.record_host(min(self._lags) / self._bound)
            if culprit is not None and not self._stopped.is_set():
                try:
                    self._loop.call_soon_threadsafe(self._report_stall, lag, *culprit)
                except RuntimeError:
                    return

    def _sample_stack(self) -> tuple[Run | None, str]:
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - the documented way
        stack = traceback.extract_stack(frame) if frame is not None else []
        where = " < ".join(f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in reversed(stack[-3:]))
        return self._find_run(asyncio.current_task(self._loop)), where

    def _find_run(self, aio: asyncio.Task[object] | None) -> Run | None:
        """Return the run whose handler is running in the asyncio task `aio`."""
        # Called in the monitor's thread while the loop is blocked, so the runs are unlikely to change meanwhile.
        with contextlib.suppress(RuntimeError):
            return next((run for run in list(self._runs) if run.is_handled_in(aio)), None)
        return None

    def _report_stall(self, seconds: float, run: Run | None, where: str) -> None:
        self.stalls += 1
        task_id = None if run is None else run.task.task_id
        worker_id = None if run is None else run.worker.name
        log.warning(
            "the event loop was blocked for %s by %s (%s): make blocking code a plain function, which runs in a thread",
            format_duration(seconds),
            "code outside of any task" if run is None else f"task {task_id!r} on worker {worker_id!r}",
            where,
        )
        if self._bus.active:
            at = self._loop.time()
            self._bus.emit(LoopStalled(at=at, seconds=seconds, task_id=task_id, worker_id=worker_id, where=where))
