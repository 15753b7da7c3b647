"""Watching the event loop from outside: how late it is, and whose code holds it up."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from forebay import clock
from forebay.events import LoopStalled, log

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.runs.run import Run

_INTERVAL = 0.25  # seconds between two beats
_SAMPLES = 4


class Stall(NamedTuple):
    """Code held the loop: for how long in seconds, in which run, if in any, and where."""

    seconds: float
    run: Run | None
    where: str


class LoopMonitor:
    """A thread that asks the loop for a beat now and then, and times the answer.

    `on_lag` gets the least of the last four answers, in seconds: a single blip says nothing, a standing delay is
    overload. It is called in the thread.
    A beat that takes longer than `bound` is a stall: the loop's stack is read while it lasts, and `on_stall` is called
    in the loop once it is over.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        bound: float,
        run_of: Callable[[asyncio.Task[object] | None], Run | None],
        on_lag: Callable[[float], None],
        on_stall: Callable[[Stall], None],
    ) -> None:
        self._loop = loop
        self._run_of = run_of
        self._bound = bound
        self._on_lag = on_lag
        self._on_stall = on_stall
        self._stopped = threading.Event()
        self._beat = threading.Event()
        self._lags: deque[float] = deque([0.0] * _SAMPLES, maxlen=_SAMPLES)
        self._ident = threading.get_ident()

    def start(self) -> None:
        """Begin; to be called in the loop's own thread."""
        self._ident = threading.get_ident()
        threading.Thread(target=self._watch, name="forebay-watch", daemon=True).start()

    def stop(self) -> None:
        """End. Does not wait for the thread, which touches nothing any more."""
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
            self._on_lag(min(self._lags))
            if culprit is not None and not self._stopped.is_set():
                stall = Stall(lag, *culprit)
                try:
                    self._loop.call_soon_threadsafe(self._on_stall, stall)
                except RuntimeError:
                    return

    def _sample_stack(self) -> tuple[Run | None, str]:
        frame = sys._current_frames().get(self._ident)  # noqa: SLF001 - the documented way
        stack = traceback.extract_stack(frame) if frame is not None else []
        where = " < ".join(f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in reversed(stack[-3:]))
        return self._run_of(asyncio.current_task(self._loop)), where


def monitor_loop(dispatcher: Dispatcher, *, bound: float | None) -> LoopMonitor | None:
    """Watch the loop of `house` and let it read how late it is; None if it is not to be, or its time is not real."""
    if bound is None or clock.is_virtual(dispatcher.loop):
        return None

    def whose(aio: asyncio.Task[object] | None) -> Run | None:
        # Asked by the watching thread while the loop stands still: nothing is likely to change under it.
        with contextlib.suppress(RuntimeError):
            runs = [run for worker in dispatcher.workers.values() for run in worker.runs]
            return next((run for run in runs if run.runner is not None and run.runner.handles(run, aio)), None)
        return None

    def on_lag(lag: float) -> None:
        dispatcher.load.host = lag / bound

    watch = LoopMonitor(
        dispatcher.loop,
        bound=bound,
        run_of=whose,
        on_lag=on_lag,
        on_stall=lambda stall: report_stall(dispatcher, stall),
    )
    watch.start()
    return watch


def report_stall(dispatcher: Dispatcher, stall: Stall) -> None:
    """Count a stall, name whose code it was, and tell."""
    dispatcher.counts.stalls += 1
    culprit = stall.run
    task_id = None if culprit is None else culprit.task.task_id
    worker_id = None if culprit is None else culprit.worker.name
    log.warning(
        "the event loop stood still for %.2f s in %s (%s): blocking code belongs in a plain callable, for a thread",
        stall.seconds,
        "code outside of any task" if culprit is None else f"task {task_id!r} on worker {worker_id!r}",
        stall.where,
    )
    if dispatcher.bus.active:
        at, seconds, where = dispatcher.loop.time(), stall.seconds, stall.where
        dispatcher.bus.emit(LoopStalled(at=at, seconds=seconds, task_id=task_id, worker_id=worker_id, where=where))
