"""Stopping what runs on a worker that is unregistered or restarted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from forebay.errors import WorkerStopped
from forebay.events import TaskRetried
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.runs.run import ActiveRuns, Run
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent


class StoppingDispatcher(Protocol):
    """The dispatcher, as far as stopping the runs of one worker needs it."""

    @property
    def runs(self) -> ActiveRuns:
        """Its runs in progress."""

    @property
    def spill(self) -> Spill | None:
        """The overflow, if there is one."""


class RunStopper:
    """Ends the runs of a worker, whose handlers are asked to stop.

    A task that has a record goes back to its store, from where it comes back to this process or another one. That would
    let others of its conversation overtake it, so a task of a conversation ends, like one without a record.
    """

    def __init__(self, core: Core, dispatcher: StoppingDispatcher) -> None:
        self._core = core
        self._dispatcher = dispatcher

    async def stop(
        self, worker: WorkerAgent, status: TaskStatus, error: str, *, limit: float, max_attempts: int | None = None
    ) -> None:
        """End the runs of `worker` with `status`, and wait for their handlers for at most `limit` seconds.

        The cause of those that end FAILED is a WorkerStopped.

        Args:
            worker: the worker.
            status: of the results.
            error: of the results.
            limit: seconds.
            max_attempts: if a run may be the reason for the stop, this counts as a failed attempt of a stored task, of
                which it has so many unless it has a policy of retries. None: it does not count.
        """
        returning: list[Ticket] = []
        for run in self._dispatcher.runs.on(worker):
            if run.abandoned_at is None and self._goes_back(run, max_attempts):
                run.ticket.begin_store_call()  # so that a cancellation waits until it is in the store
                returning.append(run.ticket)
                run.abandon()
                if max_attempts is not None:
                    self._count_failure(run, error)
            else:
                cause = None
                if status is TaskStatus.FAILED:
                    cause = WorkerStopped(worker=worker.name, task_id=run.task.task_id, why=error)
                run.end_early(status, error, cause)
        try:
            await self.wait(worker, limit)
        finally:
            for ticket in returning:
                ticket.end_store_call()
                self._return_to_store(ticket, failed=max_attempts is not None)

    async def wait(self, worker: WorkerAgent, limit: float | None) -> None:
        """Wait until nothing runs on `worker`, for at most `limit` seconds."""
        if (idle := self._dispatcher.runs.when_idle(worker)) is not None:
            await asyncio.wait((idle,), timeout=limit)

    def _goes_back(self, run: Run, max_attempts: int | None) -> bool:
        lease = run.ticket.lease
        if self._dispatcher.spill is None or lease is None or run.task.thread_id is not None:
            return False
        if max_attempts is None:
            return True
        return run.task.retry is None and run.worker.retry is None and lease.record.failures + 1 < max_attempts

    def _count_failure(self, run: Run, error: str) -> None:
        """Count and report the attempt of a run as failed: the task is to be tried again at once."""
        spill = self._dispatcher.spill
        assert spill is not None  # noqa: S101 - see _goes_back
        spill.stored.count_failure(run.ticket, 0.0, error=error)
        retried = TaskRetried(
            at=self._core.loop.time(),
            task_id=run.task.task_id,
            worker_id=run.worker.name,
            attempt=run.attempt,
            delay=0.0,
            error=error,
        )
        self._core.registry.emit(run.ticket, retried)

    def _return_to_store(self, ticket: Ticket, *, failed: bool) -> None:
        """Return a task to its store, whose attempt has `failed` or does not count."""
        spill = self._dispatcher.spill
        assert spill is not None  # noqa: S101 - see _goes_back
        if not ticket.done() and ticket.lease is not None:  # otherwise another process has it by now
            if failed and spill.stored.can_delay(ticket):
                spill.stored.delay(ticket, 0.0)
            else:
                spill.return_to_store(ticket)
        elif ticket.cancel_reason is not None:
            ticket.cancel(ticket.cancel_reason)
