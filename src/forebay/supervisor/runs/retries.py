"""Retries of tasks: whether a failed attempt is followed by another one, and where the task waits for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from forebay._hooks import call_hook
from forebay.errors import (
    InvalidResult,
    NestedTooDeep,
    NotTransferable,
    Overloaded,
    RemoteError,
    StillSpilled,
    UnusableTask,
    WouldDeadlock,
)
from forebay.events import TaskRetried, log
from forebay.retry import Retry, RetryBudget
from forebay.supervisor.runs.ticket_retries import TicketRetries
from forebay.supervisor.ticket import Ticket, as_error
from forebay.task import TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.interfaces import TaskRecord
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.run import Run

_KEPT: Final = 0.25  # share of the budget that is kept for first retries
_DEFAULT: Final = Retry()
# Whatever is tried, the same task ends the same way.
_MISTAKES: Final = (UnusableTask, NestedTooDeep, WouldDeadlock, InvalidResult, NotTransferable, StillSpilled)
_MISTAKE_NAMES: Final = frozenset(mistake.__name__ for mistake in _MISTAKES)


class RetryDispatcher(Protocol):
    """The dispatcher, as far as retries need it."""

    def arm_expiry(self, ticket: Ticket) -> None:
        """Set the timer that ends a waiting task at its deadline."""

    def proceed(self, ticket: Ticket) -> None:
        """Start or queue a task that has waited for its time."""

    def end_waiting(self, ticket: Ticket, result: TaskResult) -> None:
        """End a ticket that waits inside."""

    def refill(self, pool: Pool) -> None:
        """Take tasks of `pool` back from the overflow, if there is room for them."""

    def count_failure(self, ticket: Ticket, seconds: float, *, error: str) -> None:
        """Count an attempt at a stored task that has failed; the next one is `seconds` from now."""

    def record_failures(self, ticket: Ticket) -> None:
        """Store the failures of a stored task that waits here for its next attempt."""

    def delay_in_store(self, ticket: Ticket, seconds: float) -> bool:
        """Have a stored task wait for its next attempt in its store; return False if it is to wait here."""


class TaskRetries:
    """The tasks of a supervisor that wait for their next attempt, and the budget of all retries.

    Between two attempts a task holds no slot, but counts in the load of its pool as if it were queued: failing work is
    bounded like queued work. A stored one waits in its store instead, from which any process takes it back. When its
    time has come it joins the end of the queue. It keeps its place in its conversation. The next attempt begins once
    the handler of the last one has stopped. If that does not stop within the grace, the next one begins all the same,
    except in a conversation, which would have two runs at a time: there the task ends.

    Args:
        core: the objects that the parts of the supervisor share.
        dispatcher: the dispatcher.
        budget: of the retries of all tasks.
        draw: returns random numbers from [0, 1).

    Attributes:
        allowed: how many retries the budget has allowed.
    """

    def __init__(
        self, core: Core, dispatcher: RetryDispatcher, *, budget: RetryBudget, draw: Callable[[], float]
    ) -> None:
        self._loop = core.loop
        self._timers = core.timers
        self._registry = core.registry
        self._bus = core.bus
        self._pools: Mapping[str, Pool] = core.pools.by_type
        self._dispatcher = dispatcher
        self._draw = draw
        self._draining = False
        self._budget = budget
        self.allowed = 0

    def begin_drain(self) -> None:
        """Wait for the retry budget no longer: draining must end."""
        self._draining = True

    def attempt_begins(self, ticket: Ticket, now: float) -> None:
        """Count an attempt at a task with a policy: the first ones allow retries."""
        if ticket.retries is None:
            self._budget.deposit(now)
        else:
            ticket.retries.attempt_begins()

    def take(self) -> bool:
        """Take a retry from the budget for a second attempt beside the first; return False if none is left."""
        if not self._budget.withdraw(self._loop.time(), keep=_KEPT):
            return False
        self.allowed += 1
        return True

    # --- an attempt has failed ---

    def retry(self, run: Run, result: TaskResult) -> bool:
        """Have the task of `run`, which has ended with `result`, tried again; return False if it is to end."""
        ticket, policy = run.ticket, run.task.retry or run.worker.retry
        if policy is None or ticket.slot is not None or not _is_worth_retry(policy, result):
            return False
        retries = ticket.retries
        if retries is None:
            retries = TicketRetries(policy)
            ticket.keep_retries(retries)
        retries.state.follow(policy)
        pool = self._pools[run.task.task_type]
        asked = result.cause.retry_after if isinstance(result.cause, Overloaded) else None
        times, units = pool.times_of(run.task.estimate)
        time_left = _time_left(ticket) - units * times.optimistic()
        delay = retries.state.next_delay(uses_attempt=True, draw=self._draw(), retry_after=asked, time_left=time_left)
        if delay is None:
            return False
        retries.attempt_failed(result, run.worker, stopping=None if run.ended else run)
        ticket.await_retry()
        if self._bus.active or ticket.listeners is not None:
            event = TaskRetried(
                at=self._loop.time(),
                task_id=ticket.task_id,
                worker_id=run.worker.name,
                attempt=ticket.attempts,
                delay=delay,
                error=result.error or "",
            )
            self._registry.emit(ticket, event)
        self._dispatcher.count_failure(ticket, delay, error=result.error or "")
        if retries.stopping is not None or not self._wait_in_store(ticket, delay):
            self._wait(ticket, delay)
            self._dispatcher.record_failures(ticket)
        return True

    def _wait_in_store(self, ticket: Ticket, delay: float) -> bool:
        """Have a task wait in its store; return False if it is not stored, or has to wait here."""
        return ticket.lease is not None and self._dispatcher.delay_in_store(ticket, delay)

    def _wait(self, ticket: Ticket, delay: float) -> None:
        """Have a task wait in this process."""
        retries = ticket.retries
        assert retries is not None  # noqa: S101 - it has failed before
        if not retries.waits_here:
            self._pools[ticket.task.task_type].delay(ticket)
        due_at = self._loop.time() + delay
        retries.wait_here(self._timers.at(due_at, self._due, ticket), due_at)
        self._dispatcher.arm_expiry(ticket)

    def attempt_stopped(self, ticket: Ticket, *, zombie: bool = False) -> None:
        """Record that the last attempt has stopped, or will not within the grace."""
        retries = ticket.retries
        assert retries is not None  # noqa: S101 - it is the attempt that stops
        if zombie and ticket.task.thread_id is not None:
            if retries.waits_here and retries.result is not None:
                self._end(ticket, "its handler does not stop, so it is not retried")
            return
        retries.attempt_stopped()
        if not retries.pending:  # it has ended meanwhile
            ticket.forget_parent()
        elif retries.waits_here and retries.due:
            self._go_on(ticket)
        elif retries.waits_here and self._wait_in_store(ticket, retries.due_at - self._loop.time()):
            self.leave(ticket)

    def resume(self, ticket: Ticket, record: TaskRecord) -> None:
        """Go on with the attempts at a task that comes back from its store: other processes may have made some."""
        if record.failures > (0 if ticket.retries is None else ticket.retries.state.failed):
            policies = (worker.retry for worker in self._pools[ticket.task.task_type].workers)
            policy = ticket.task.retry or next(filter(None, policies), _DEFAULT)
            retries = TicketRetries(policy, failed=record.failures, total_delay=record.total_delay)
            retries.attempt_failed(_last_result(record), None, stopping=None)
            ticket.keep_retries(retries)

    # --- its time has come ---

    def _due(self, ticket: Ticket) -> None:
        retries = ticket.retries
        assert retries is not None  # noqa: S101 - it has failed before
        retries.mark_due()
        if retries.stopping is None:
            self._go_on(ticket)

    def _go_on(self, ticket: Ticket) -> None:
        if self.allow(ticket):
            self.leave(ticket)
            self._dispatcher.proceed(ticket)

    def allow(self, ticket: Ticket) -> bool:
        """Return whether a task may start as far as the retry budget goes; if not, it waits here, or has ended.

        A first attempt may; a retry takes from the budget once.
        """
        retries = ticket.retries
        if retries is None or not retries.pending or retries.allowed:
            return True
        keep = _KEPT if retries.state.failed > 1 else 0.0
        if self._budget.withdraw(self._loop.time(), keep=keep):
            retries.allow()
            self.allowed += 1
            return True
        delay = None
        if not self._draining:
            delay = retries.state.budget_delay(draw=self._draw(), time_left=_time_left(ticket))
        if delay is not None:
            ticket.wait()
            self._wait(ticket, delay)
        else:
            self._end(ticket, "it is not retried, because the retry budget of the supervisor is used up")
        return False

    # --- the end of the wait ---

    def leave(self, ticket: Ticket) -> None:
        """Stop waiting for the next attempt, here."""
        if ticket.retries is not None and ticket.retries.waits_here:
            pool = self._pools[ticket.task.task_type]
            self._timers.cancel(ticket.retries.stop_waiting())
            pool.stop_delay(ticket)
            self._loop.call_soon(self._dispatcher.refill, pool)  # its place is free, and no run may end for long

    def _end(self, ticket: Ticket, why: str) -> None:
        """End a task with the result of its last attempt."""
        assert ticket.retries is not None  # noqa: S101 - it has failed before
        result = ticket.retries.result
        assert result is not None  # noqa: S101 - as above
        result = msgspec.structs.replace(result, error=f"{result.error}; {why}")
        log.warning("task %r has failed, and %s", ticket.task_id, why)
        self._dispatcher.end_waiting(ticket, result)


def _time_left(ticket: Ticket) -> float:
    return math.inf if ticket.deadline is None else ticket.deadline.remaining()


def _last_result(record: TaskRecord) -> TaskResult:
    """Return the result of the last attempt at a task, which failed in another process."""
    return TaskResult(
        task_id=record.task_id,
        worker_id=None,
        success=False,
        status=TaskStatus.FAILED,
        error=record.last_error or "its last attempt failed in another process",
        attempts=record.attempts,
    )


def _is_worth_retry(policy: Retry, result: TaskResult) -> bool:
    """Return whether another attempt may end better than one that ended with `result`."""
    error = result.cause if result.status is TaskStatus.FAILED else as_error(result)
    if error is None or isinstance(error, _MISTAKES):
        return False
    if isinstance(error, RemoteError) and error.type in _MISTAKE_NAMES:
        return False
    if isinstance(error, Overloaded) and error.load == math.inf:  # coming back cannot help
        return False
    return bool(call_hook("on of a Retry", policy.covers, error))
