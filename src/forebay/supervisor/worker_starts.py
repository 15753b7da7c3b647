"""Starts of the handlers of workers that are registered while the supervisor runs."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol

from forebay._hooks import raise_if_cancelled, report_failure
from forebay.supervisor.runs.completion import describe_error
from forebay.supervisor.ticket import Ticket, unsuccessful_result
from forebay.task import TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.runs.completion import RunCompletion
    from forebay.supervisor.worker import WorkerAgent


class StartDispatcher(Protocol):
    """The dispatcher, as far as the starts of handlers need it."""

    @property
    def completion(self) -> RunCompletion:
        """The ends of its runs, and what they mean for the breakers of its workers."""

    def dequeue(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the queue."""

    def can_requeue(self, ticket: Ticket) -> bool:
        """Return whether a task is stored where the next process finds it."""

    def return_to_store(self, ticket: Ticket) -> None:
        """Leave a stored task to any process, this one included."""

    def finish(self, ticket: Ticket, result: TaskResult) -> None:
        """Give a ticket its result."""

    def update_slots(self, worker: WorkerAgent) -> None:
        """Count the slots that `worker` has now, and dispatch to it."""


class WorkerStarts:
    """Starts handlers in the background. Until its handler has started, a worker takes no task: they queue.

    A start that fails opens the breaker of the worker, and is tried again when the breaker lets a probe through.
    """

    def __init__(self, core: Core, dispatcher: StartDispatcher) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._in_progress: set[asyncio.Future[None]] = set()
        self._closed = False

    def begin(self, worker: WorkerAgent) -> None:
        """Start the handler of a worker, unless it has started or is being started."""
        if not (worker.ready or worker.starting or self._closed):
            worker.begin_start()
            starting = self._core.run_to_completion(self._start(worker))
            self._in_progress.add(starting)
            starting.add_done_callback(partial(self._ended, worker))

    def _ended(self, worker: WorkerAgent, starting: asyncio.Future[None]) -> None:
        self._in_progress.discard(starting)
        if starting.cancelled():  # perhaps before its first step
            worker.end_start(ready=False)
            if not self._closed:  # otherwise by `close`
                self._failed(worker, asyncio.CancelledError("its start was cancelled"))

    def close(self) -> None:
        """Cancel the starts in progress, and begin no more."""
        self._closed = True
        for starting in self._in_progress:
            starting.cancel()

    async def _start(self, worker: WorkerAgent) -> None:
        start = worker.handler.start
        assert start is not None  # noqa: S101 - it is not ready
        try:
            await start()
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
            while not pool.slots and (entry := pool.queue.head()) is not None:
                ticket = entry[2]
                if self._dispatcher.can_requeue(ticket):
                    self._dispatcher.return_to_store(ticket)
                    continue
                self._dispatcher.dequeue(ticket)
                ticket.forget_parent()
                failed = unsuccessful_result(ticket, TaskStatus.FAILED, error, worker_id=worker.name, cause=cause)
                self._dispatcher.finish(ticket, failed)
