"""The tickets of a supervisor: those that have not ended, those that ended lately, and the listeners to both."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from forebay.events import Event, EventBus, TaskFinished
from forebay.task import TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.ticket import Ticket

_SUCCEEDED = TaskStatus.SUCCEEDED  # attribute access on an enum is slow on the hot path


class TicketRegistry:
    """Tickets by task id.

    Attributes:
        live: tickets that have not ended, apart from the weakly held ones.
        ended: the latest tickets that have ended; `keep` of them.
        weak: tickets of spilled tasks that nobody here awaits. The store can restore them, so a million spilled tasks
            take no memory; a caller that still has such a ticket gets its result.
        listeners: called whenever a task or background work has ended.
        succeeded: how many tasks have succeeded.
        ends: how many tasks have ended in each other status.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, bus: EventBus, *, keep: int) -> None:
        self._loop = loop
        self._bus = bus
        self.keep = keep
        self.live: dict[str, Ticket] = {}
        self.ended: OrderedDict[str, Ticket] = OrderedDict()
        self.weak: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
        self.listeners: list[Callable[[], None]] = []
        self.succeeded = 0
        self.ends = dict.fromkeys(TaskStatus, 0)

    def add(self, ticket: Ticket) -> None:
        """Add a ticket that has not ended."""
        self.live[ticket.task.task_id] = ticket

    def discard(self, ticket: Ticket) -> None:
        """Forget a ticket, because another process or no process has its task."""
        if self.live.get(ticket.task_id) is ticket:
            del self.live[ticket.task_id]
        if self.weak.get(ticket.task_id) is ticket:
            del self.weak[ticket.task_id]

    def forget_end(self, task_id: str) -> None:
        """Forget the end of a task, because it may run again."""
        self.ended.pop(task_id, None)

    def get(self, task_id: str) -> Ticket | None:
        """Return the ticket of a task that has not ended or ended lately, unless it is held weakly."""
        return self.live.get(task_id) or self.ended.get(task_id)

    def all_unfinished(self) -> list[Ticket]:
        """Return every ticket that has not ended."""
        return [*self.live.values(), *self.weak.values()]

    def hold_weakly(self, ticket: Ticket) -> None:
        """Hold the ticket of a spilled task only as long as other code does."""
        self.weak[ticket.task_id] = ticket
        self.live.pop(ticket.task_id, None)

    def hold_strongly(self, task_id: str) -> Ticket | None:
        """Hold the weakly held ticket of a task from now on, and return it if there is one."""
        ticket = self.weak.pop(task_id, None)
        if ticket is not None:
            self.live[task_id] = ticket
        return ticket

    def settle(self, ticket: Ticket, result: TaskResult) -> None:
        """Resolve a ticket, and keep it for a while among those that ended."""
        if result.status is _SUCCEEDED:
            self.succeeded += 1
        else:
            self.ends[result.status] += 1
        task_id = ticket.task.task_id
        self.live.pop(task_id, None)
        self.ended[task_id] = ticket
        if len(self.ended) > self.keep:
            self.ended.popitem(last=False)
        if self._bus.active:  # first, so that sinks are called before those who await the task wake up
            self._bus.emit(TaskFinished(at=self._loop.time(), task_id=task_id, result=result))
        ticket.resolve(result)
        if self.listeners:
            self.notify_progress()

    def emit(self, ticket: Ticket, event: Event) -> None:
        """Send an event to the listeners of the ticket and of the supervisor."""
        ticket.emit(event)
        if self._bus.active:
            self._bus.emit(event)

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a task or background work has ended."""
        self.listeners.append(listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Stop calling `listener`."""
        self.listeners.remove(listener)

    def notify_progress(self) -> None:
        """Call the listeners, such as `drain()`: a task or background work has ended."""
        for listener in self.listeners:
            listener()
