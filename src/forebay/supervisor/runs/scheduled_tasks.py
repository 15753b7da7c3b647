"""Scheduled tasks: tasks with a `not_before` that wait for it in this process, where no overflow keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from forebay.supervisor.conversations import Conversations
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.ticket import Ticket

_RECHECK = 1.0  # seconds after which a task asks again whether earlier ones of its conversation are in the overflow


class ScheduleDispatcher(Protocol):
    """The dispatcher, as far as scheduled tasks need it."""

    @property
    def conversations(self) -> Conversations:
        """The conversations of its tasks."""

    def arm_expiry(self, ticket: Ticket) -> None:
        """Set the timer that ends a waiting task at its deadline."""

    def recount_conversations(self) -> None:
        """Ask the overflow, in the background, which conversations have tasks in it."""

    def join_queue(self, ticket: Ticket) -> None:
        """Start or queue a task whose time has come, behind its conversation."""

    def refill(self, pool: Pool) -> None:
        """Take tasks of `pool` back from the overflow, if there is room for them."""


class ScheduledTasks:
    """The tasks of a supervisor that wait here for their `not_before`.

    Like a task that waits for a retry, such a task holds no slot, but counts in the load of its pool as if it were
    queued. When its time has come it joins its conversation, or the end of the queue. The time is measured by the
    clock of the event loop, so that setting the wall clock does not move it.
    """

    def __init__(self, core: Core, dispatcher: ScheduleDispatcher) -> None:
        self._loop = core.loop
        self._timers = core.timers
        self._pools: Mapping[str, Pool] = core.pools.by_type
        self._dispatcher = dispatcher
        self._waiting: dict[Ticket, Timer] = {}

    @property
    def tickets(self) -> Iterable[Ticket]:
        """The tickets of the tasks that wait."""
        return self._waiting.keys()

    def hold(self, ticket: Ticket) -> bool:
        """Have a task wait for its `not_before`; return False if that has passed."""
        seconds = ticket.task.starts_in()
        if seconds <= 0:
            return False
        ticket.wait()
        self._pools[ticket.task.task_type].delay(ticket)
        self._arm(ticket, seconds)
        self._dispatcher.arm_expiry(ticket)
        return True

    def _arm(self, ticket: Ticket, seconds: float) -> None:
        self._waiting[ticket] = self._timers.at(self._loop.time() + seconds, self._on_due, ticket)

    def is_waiting(self, ticket: Ticket) -> bool:
        """Return whether a task waits here for its time."""
        return ticket in self._waiting

    def leave(self, ticket: Ticket) -> None:
        """Stop waiting; nothing happens if the task does not wait here."""
        if (timer := self._waiting.pop(ticket, None)) is not None:
            pool = self._pools[ticket.task.task_type]
            self._timers.cancel(timer)
            pool.stop_delay(ticket)
            self._loop.call_soon(self._dispatcher.refill, pool)  # its place is free, and no run may end for long

    def _on_due(self, ticket: Ticket) -> None:
        thread_id = ticket.task.thread_id
        if thread_id is not None and self._dispatcher.conversations.waits_in_overflow(thread_id):
            self._arm(ticket, _RECHECK)  # another process may be running one of its conversation
            self._dispatcher.recount_conversations()
            return
        self.leave(ticket)
        self._dispatcher.join_queue(ticket)
