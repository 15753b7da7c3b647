"""The failed attempts at one task, and its wait for the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.retry import Retry, RetryState
from forebay.task import TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.context import RunningTask
    from forebay.interfaces import TaskRecord
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.worker import WorkerAgent


class TicketRetries:
    """The failed attempts at the task of one ticket; it has none before the first one fails.

    Attributes:
        state: how many attempts have failed, and how long the task has waited between them.
        result: of the last attempt; the task ends with it if there is no other. None while one runs.
        failed_on: the worker of the last attempt, if it was in this process: the next one avoids it.
        recorded: the task store has counted the last attempt as failed.
        stopping: the last attempt, while its handler has not stopped. The next one does not begin before.
        pending: another attempt is to be made.
        waits_here: it waits in this process for its time, or for the budget, and not in a queue or a store.
        due_at: the loop time from which it may begin.
        due: its time has come.
        allowed: the retry budget has paid for it.
    """

    __slots__ = (
        "_timer", "allowed", "due", "due_at", "failed_on", "pending", "recorded", "result", "state", "stopping",
        "waits_here",
    )  # fmt: skip

    def __init__(self, state: RetryState) -> None:
        self.state = state
        self.result: TaskResult | None = None
        self.failed_on: WorkerAgent | None = None
        self.stopping: RunningTask | None = None
        self.recorded = self.pending = self.waits_here = self.due = self.allowed = False
        self.due_at = 0.0
        self._timer: Timer | None = None

    @classmethod
    def from_record(cls, record: TaskRecord, retry: Retry) -> TicketRetries:
        """Return the failed attempts at a stored task, which comes back for its next one."""
        retries = cls(RetryState(retry, failed=record.failures, total_delay=record.total_delay))
        retries.recorded = retries.pending = True
        retries.result = TaskResult(
            task_id=record.task_id,
            worker_id=None,
            success=False,
            status=TaskStatus.FAILED,
            error=record.last_error or "its last attempt failed in another process",
            attempts=record.attempts,
        )
        return retries

    def attempt_failed(self, result: TaskResult, worker: WorkerAgent, *, stopping: RunningTask | None) -> None:
        """Record that an attempt has failed and another one is to be made; `stopping` is it, if it goes on."""
        self.result = result
        self.failed_on = worker
        self.stopping = stopping
        self.pending = True
        self.recorded = False

    def attempt_stopped(self) -> None:
        """Record that the handler of the last attempt has stopped, or is not waited for."""
        self.stopping = None

    def wait_here(self, due_at: float, timer: Timer) -> None:
        """Wait in this process until `timer` fires, at loop time `due_at`."""
        self.waits_here = True
        self.due = False
        self.due_at = due_at
        self._timer = timer

    def wait_in_store(self) -> str | None:
        """Wait in the store; return the error of the last attempt, or None if the store has counted it already."""
        error = None if self.recorded or self.result is None else self.result.error or ""
        self.recorded = True
        return error

    def mark_due(self) -> None:
        """Record that its time has come."""
        self.due = True
        self._timer = None

    def stop_waiting(self) -> Timer | None:
        """Stop waiting here; return the timer, which the caller cancels."""
        self.waits_here = False
        timer, self._timer = self._timer, None
        return timer

    def allow(self) -> None:
        """Record that the retry budget has paid for the next attempt."""
        self.allowed = True

    def attempt_begins(self) -> None:
        """Record that the next attempt begins."""
        self.pending = self.allowed = self.due = False
        self.failed_on = self.result = None

    def end(self) -> None:
        """Record that no other attempt is made."""
        self.pending = False
