"""The tickets of a supervisor: those that have not ended, those that ended lately, and the listeners to both."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from forebay.events import Event, EventBus, TaskFinished
from forebay.supervisor.payload_size import SCALARS, estimated_bytes
from forebay.supervisor.type_counts import TypeCounts
from forebay.task import TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.ticket import Ticket

_SUCCEEDED = TaskStatus.SUCCEEDED  # attribute access on an enum is slow on the hot path


class TicketRegistry:
    """Tickets by task id.

    Attributes:
        live: tickets that have not ended, apart from the weakly held ones.
        ended: the latest tickets that have ended: at most `keep`, of `keep_bytes` together.
        by_key: the tickets that others may get by their idempotency key, as long as anything holds them: of tasks that
            have not ended, and of those that have succeeded.
        weak: tickets of spilled tasks that nobody here awaits. The store can restore them, so a million spilled tasks
            take no memory; a caller that still has such a ticket gets its result.
        listeners: called whenever a task has ended, or a worker can take tasks again.
        succeeded: how many tasks have succeeded.
        ends: how many tasks have ended in each other status.
        types: the counts of each task type.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, bus: EventBus, *, keep: int, keep_bytes: int) -> None:
        self._loop = loop
        self._bus = bus
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._ended_bytes = 0
        self.live: dict[str, Ticket] = {}
        self.ended: OrderedDict[str, Ticket] = OrderedDict()
        self.weak: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
        self.by_key: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
        self.listeners: list[Callable[[], None]] = []
        self.succeeded = 0
        self.ends = dict.fromkeys(TaskStatus, 0)
        self.types = TypeCounts()

    def add(self, ticket: Ticket) -> None:
        """Add a ticket that has not ended."""
        self.live[ticket.task.task_id] = ticket

    def remember_key(self, ticket: Ticket) -> None:
        """Let others get a stored task that comes back by its key, unless another one has the key by now."""
        if ticket.task.key is not None:
            self.by_key.setdefault(ticket.task.key, ticket)

    def forget_key(self, ticket: Ticket) -> None:
        """Give nobody a ticket by its key any more: the same work may run again."""
        key = ticket.task.key
        if key is not None and self.by_key.get(key) is ticket:
            del self.by_key[key]

    def discard(self, ticket: Ticket) -> None:
        """Forget a ticket, because another process or no process has its task."""
        if self.live.get(ticket.task_id) is ticket:
            del self.live[ticket.task_id]
        if self.weak.get(ticket.task_id) is ticket:
            del self.weak[ticket.task_id]

    def forget_end(self, task_id: str) -> None:
        """Forget the end of a task, because it may run again."""
        if (ended := self.ended.pop(task_id, None)) is not None:
            self._ended_bytes -= ended.size

    def get(self, task_id: str) -> Ticket | None:
        """Return the ticket of a task that has not ended or ended lately, unless it is held weakly."""
        return self.live.get(task_id) or self.ended.get(task_id)

    def find(self, task_id: str) -> Ticket | None:
        """Return the ticket of a task that has not ended or ended lately, however it is held."""
        return self.get(task_id) or self.weak.get(task_id)

    def all_unfinished(self) -> list[Ticket]:
        """Return every ticket that has not ended."""
        return [*self.live.values(), *self.weak.values()]

    def hold_weakly(self, ticket: Ticket) -> None:
        """Hold the ticket of a spilled task only as long as other code does."""
        self.forget_end(ticket.task_id)  # of an earlier task with its id, which nothing else tells from this one then
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
        task, ended, kept = ticket.task, self.ended, ticket
        counts = self.types.of(task.task_type)
        if result.status is _SUCCEEDED:
            self.succeeded += 1
            counts.count_success(result.usage)
        else:
            self.ends[result.status] += 1
            counts.count_other_end(result.status, result.usage)
            self.forget_key(ticket)
        task_id = task.task_id
        self.live.pop(task_id, None)
        if result.cause is not None:
            kept = self._without_cause(ticket, result)
        if task_id in ended:  # an id that is used again
            self.forget_end(task_id)
        ended[task_id] = kept
        # Most payloads and results are small: this is on the hot path.
        if type(task.payload) not in SCALARS or type(result.result) not in SCALARS or result.error is not None:
            self._measure(kept, result)
        while ended and (len(ended) > self._keep or self._ended_bytes > self._keep_bytes):
            self._ended_bytes -= ended.popitem(last=False)[1].size
        if self._bus.active:  # first, so that sinks are called before those who await the task wake up
            self._bus.emit(TaskFinished(at=self._loop.time(), task_id=task_id, result=result))
        ticket.resolve(result)
        if self.listeners:
            self.notify_progress()

    def _without_cause(self, ticket: Ticket, result: TaskResult) -> Ticket:
        """Return the ticket to keep of one that ends with `result`, which has a cause."""
        kept, key = ticket.without_cause(result), ticket.task.key
        if key is not None and self.by_key.get(key) is ticket:
            self.by_key[key] = kept
        return kept

    def _measure(self, ticket: Ticket, result: TaskResult) -> None:
        """Count the bytes that a kept ticket holds."""
        payload = ticket.task.payload
        ticket.measure(estimated_bytes(payload) + estimated_bytes(result.result) + len(result.error or ""))
        self._ended_bytes += ticket.size

    def emit(self, ticket: Ticket, event: Event) -> None:
        """Send an event to the listeners of the ticket and of the supervisor."""
        ticket.emit(event)
        if self._bus.active:
            self._bus.emit(event)

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a task has ended, or a worker can take tasks again."""
        self.listeners.append(listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Stop calling `listener`."""
        self.listeners.remove(listener)

    def notify_progress(self) -> None:
        """Call the listeners, such as `drain()`: a task has ended, or a worker can take tasks again."""
        for listener in self.listeners:
            listener()
