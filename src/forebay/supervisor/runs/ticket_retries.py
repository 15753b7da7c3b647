"""The failed attempts at one task, and its wait for the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.retry import Retry, RetryState

if TYPE_CHECKING:
    from forebay.context import RunningTask
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.worker import WorkerAgent
    from forebay.task import TaskResult


class TicketRetries:
    """The failed attempts at the task of one ticket; it has none before the first one fails.

    Args:
        retry: the policy.
        failed: attempts that failed in other processes.
        total_delay: seconds for which the task has waited between them.

    Attributes:
        state: how many attempts have failed, and how long the task has waited between them.
        result: of the last attempt; the task ends with it if there is no other. None if that was in another process.
        failed_on: the worker of the last attempt, which the next one avoids.
        stopping: the last attempt, while its handler has not stopped. The next one does not begin before.
        pending: another attempt is to be made.
        waits_here: it waits in this process for its time, or for the budget, and not in a queue or a store.
        due_at: loop time at which its time comes, if it waits here.
        due: its time has come.
        allowed: the retry budget has paid for it.
    """

    __slots__ = (
        "_timer",
        "allowed",
        "due",
        "due_at",
        "failed_on",
        "pending",
        "result",
        "state",
        "stopping",
        "waits_here",
    )

    def __init__(self, retry: Retry, *, failed: int = 0, total_delay: float = 0.0) -> None:
        self.state = RetryState(retry, failed=failed, total_delay=total_delay)
        self.result: TaskResult | None = None
        self.failed_on: WorkerAgent | None = None
        self.stopping: RunningTask | None = None
        self.pending = False
        self.due_at = 0.0
        self.waits_here = self.due = self.allowed = False
        self._timer: Timer | None = None

    def attempt_failed(self, result: TaskResult, worker: WorkerAgent | None, *, stopping: RunningTask | None) -> None:
        """Record that an attempt has failed and another one is to be made.

        Args:
            result: the result of the attempt.
            worker: the worker that made it; None if that was in another process.
            stopping: the attempt, if its handler has not stopped.
        """
        self.result = result
        self.failed_on = worker
        self.stopping = stopping
        self.pending = True

    def attempt_stopped(self) -> None:
        """Record that the handler of the last attempt has stopped, or is not waited for."""
        self.stopping = None

    def wait_here(self, timer: Timer, due_at: float) -> None:
        """Wait in this process until `timer` fires, at loop time `due_at`."""
        self.waits_here = True
        self.due = False
        self.due_at = due_at
        self._timer = timer

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
