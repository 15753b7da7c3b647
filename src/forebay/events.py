"""What happened, as frozen data, and the bounded ways to hear of it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, Self

import msgspec

from forebay.errors import InvalidSetting
from forebay.task import Priority, TaskResult, Verdict

log = logging.getLogger("forebay")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. `at` is loop time in seconds; `kind` names it on any wire."""

    kind: ClassVar[str]
    at: float


class TaskSubmitted(Event, frozen=True, kw_only=True):
    """The gate decided."""

    kind = "submitted"
    task_id: str
    task_type: str
    priority: Priority
    verdict: Verdict
    reason: str | None = None
    limited_by: str | None = None
    load: float | None = None


class TaskRefilled(Event, frozen=True, kw_only=True):
    """A spilled task came back inside."""

    kind = "refilled"
    task_id: str
    task_type: str


class TaskDeadLettered(Event, frozen=True, kw_only=True):
    """A stored task will not be tried again: it is among the dead letters."""

    kind = "died"
    task_id: str
    task_type: str
    attempts: int
    error: str


class TaskStarted(Event, frozen=True, kw_only=True):
    """A handler began."""

    kind = "started"
    task_id: str
    worker_id: str
    attempt: int = 1


class TaskProgress(Event, frozen=True, kw_only=True):
    """A handler passed `value` to ``progress``."""

    kind = "progress"
    task_id: str
    value: Any


class TaskFinished(Event, frozen=True, kw_only=True):
    """A task ended."""

    kind = "finished"
    task_id: str
    result: TaskResult


class WorkerFailed(Event, frozen=True, kw_only=True):
    """A worker's breaker opened; `retry_in` is in seconds, None until it is revived."""

    kind = "worker_failed"
    worker_id: str
    reason: str
    retry_in: float | None


class WorkerRecovered(Event, frozen=True, kw_only=True):
    """A worker's breaker let work through again: by probes, or revived."""

    kind = "worker_recovered"
    worker_id: str


class ZombieFound(Event, frozen=True, kw_only=True):
    """A handler outlived its timeout or its cancellation; it still holds its slot."""

    kind = "zombie_found"
    task_id: str
    worker_id: str


class ZombieEnded(Event, frozen=True, kw_only=True):
    """A zombie really ended, `after` seconds past its timeout, and its slot is free."""

    kind = "zombie_ended"
    task_id: str
    worker_id: str
    after: float


class LoopStalled(Event, frozen=True, kw_only=True):
    """Code held the event loop for `seconds`; `task_id` and `where` name it as far as they could be seen."""

    kind = "loop_stalled"
    seconds: float
    task_id: str | None
    worker_id: str | None
    where: str


Sink = Callable[[Event], None]


class Subscription:
    """Events as they come, in a bounded buffer: the oldest are dropped, and counted in `dropped`.

    An async iterator; it ends when its source closes, or by `close`.
    """

    def __init__(self, *, bound: int, on_close: Callable[[Subscription], None]) -> None:
        self._buffer: deque[Event] = deque(maxlen=bound)
        self._waiter: asyncio.Future[None] | None = None
        self._on_close = on_close
        self._closed = False
        self.dropped = 0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to be read at once."""
        return not self._buffer and not self._closed

    def put(self, event: Event) -> None:
        """Add an event, at the price of the oldest if there is no room."""
        if len(self._buffer) == self._buffer.maxlen:
            self.dropped += 1
        self._buffer.append(event)
        self._wake()

    def close(self) -> None:
        """End the iteration after what is buffered."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._buffer:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._buffer.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class EventBus:
    """Hands each event to sinks and subscriptions. Not thread-safe: it belongs to one loop."""

    def __init__(self, sinks: tuple[Sink, ...] = ()) -> None:
        self._sinks = sinks
        self._subscriptions: list[Subscription] = []
        self._closed = False
        self.active = bool(sinks)  # whether anyone listens: who emits asks first, and makes no event for nobody

    def emit(self, event: Event) -> None:
        """Hand `event` to everyone. A sink that raises is logged, and harms nobody else."""
        for sink in self._sinks:
            try:
                sink(event)
            except Exception:
                log.exception("event sink %r failed on %s and is passed over", sink, event.kind)
        for subscription in self._subscriptions:
            subscription.put(event)

    def add_sink(self, sink: Sink) -> None:
        """Call `sink` too, from now on; before the others, whose doing may be the next event."""
        self._sinks = (sink, *self._sinks)
        self.active = True

    def remove_sink(self, sink: Sink) -> None:
        """Call `sink` no more."""
        self._sinks = tuple(other for other in self._sinks if other != sink)
        self.active = bool(self._sinks or self._subscriptions)

    def subscribe(self, *, bound: int) -> Subscription:
        """Everything from now on, the newest `bound` events kept until read."""
        if not isinstance(bound, int) or bound < 1:
            raise InvalidSetting(owner="events", name="bound", value=bound, expected="a whole number of at least 1")
        subscription = Subscription(bound=bound, on_close=self._forget)
        self._subscriptions.append(subscription)
        self.active = True
        if self._closed:  # nothing will happen any more
            subscription.close()
        return subscription

    def _forget(self, subscription: Subscription) -> None:
        self._subscriptions.remove(subscription)
        self.active = bool(self._sinks or self._subscriptions)

    def close(self) -> None:
        """End every subscription, those to come too."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.close()
