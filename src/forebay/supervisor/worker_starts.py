"""Starts of the handlers of workers that are registered while the supervisor runs."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol

from forebay._hooks import raise_if_cancelled, report_failure
from forebay.supervisor.runs.completion import describe_error
from forebay.supervisor.tree.worker_life import MIN_STOP_TIME

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.completion import RunCompletion
    from forebay.supervisor.tree.worker_life import Exit
    from forebay.supervisor.worker import WorkerAgent


class ExitListener(Protocol):
    """The `Supervision` of a dispatcher, as far as the starts of handlers need it."""

    @property
    def halted(self) -> bool:
        """True while it starts no worker: all of them are started together later."""

    def exited(self, worker: WorkerAgent, end: Exit) -> None:
        """Handle the end of a worker's life."""


class StartDispatcher(Protocol):
    """The dispatcher, as far as the starts of handlers need it."""

    @property
    def completion(self) -> RunCompletion:
        """The ends of its runs, and what they mean for the breakers of its workers."""

    def fail_queued(
        self, pool: Pool, error: str, *, worker_id: str | None = None, cause: BaseException | None = None
    ) -> None:
        """End every task in the queue of a pool whose workers will not come, or leave it to its store."""

    @property
    def supervision(self) -> ExitListener:
        """The restarts of its workers."""

    def update_slots(self, worker: WorkerAgent) -> None:
        """Count the slots that `worker` has now, and dispatch to it."""


class WorkerStarts:
    """Starts handlers in the background. Until its handler has started, a worker takes no task: they queue.

    A start that fails opens the breaker of the worker, and is tried again when the breaker lets a probe through.
    """

    def __init__(self, core: Core, dispatcher: StartDispatcher) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._in_progress: dict[WorkerAgent, asyncio.Future[None]] = {}
        self._closed = False

    def begin(self, worker: WorkerAgent) -> None:
        """Start the handler of a worker, unless it has started or is being started."""
        if not (worker.ready or worker.starting or self._closed or self._dispatcher.supervision.halted):
            worker.begin_start()
            starting = self._core.run_to_completion(self._start(worker))
            self._in_progress[worker] = starting
            starting.add_done_callback(partial(self._ended, worker))

    def _ended(self, worker: WorkerAgent, starting: asyncio.Future[None]) -> None:
        if self._in_progress.get(worker) is not starting:
            return  # cancelled by `cancel`
        del self._in_progress[worker]
        if starting.cancelled():  # perhaps before its first step
            worker.end_start(ready=False)
            if not self._closed:
                self._failed(worker, asyncio.CancelledError("its start was cancelled"))

    def close(self) -> None:
        """Cancel the starts in progress, and begin no more."""
        self._closed = True
        for starting in self._in_progress.values():
            starting.cancel()

    def is_starting(self, worker: WorkerAgent) -> bool:
        """Return whether the first start of a worker is in progress."""
        return worker in self._in_progress

    async def cancel(self, worker: WorkerAgent) -> None:
        """Cancel the start of a worker that is leaving or being restarted, if it is in progress."""
        if (starting := self._in_progress.pop(worker, None)) is not None:
            starting.cancel()
            await asyncio.wait((starting,), timeout=MIN_STOP_TIME)
            worker.end_start(ready=False)

    async def _start(self, worker: WorkerAgent) -> None:
        try:
            await worker.life.start(self._core.base_context, partial(self._dispatcher.supervision.exited, worker))
        except BaseException as error:  # noqa: BLE001 - user code
            raise_if_cancelled(error)
            worker.end_start(ready=False)
            self._failed(worker, error)
        else:
            worker.end_start(ready=True)
            if worker.probing:
                self._dispatcher.completion.revive(worker)
            self._dispatcher.update_slots(worker)

    def _failed(self, worker: WorkerAgent, error: BaseException) -> None:
        report_failure(f"start of worker {worker.name!r}", error)
        self._dispatcher.completion.fail_start(worker)
        self._end_waiting(worker, error)

    def _end_waiting(self, worker: WorkerAgent, cause: BaseException) -> None:
        """End the tasks that wait for a worker that could not be started, and for no other that works."""
        error = describe_error(cause)
        for pool in self._core.pools.by_worker[worker].pools:
            if not (pool.slots or pool.paused):
                self._dispatcher.fail_queued(pool, error, worker_id=worker.name, cause=cause)
