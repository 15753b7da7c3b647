"""Events: what happened, as frozen data, and the bounded ways to receive it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, Self

import msgspec

from forebay._validate import check_whole
from forebay.task import Priority, TaskResult, Verdict

log = logging.getLogger("forebay")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """The base of every event. `at` is loop time in seconds; `kind` names the event when it is sent or printed."""

    kind: ClassVar[str]
    at: float


class TaskSubmitted(Event, frozen=True, kw_only=True):
    """A task was admitted, spilled or rejected."""

    kind = "submitted"
    task_id: str
    task_type: str
    priority: Priority
    verdict: Verdict
    reason: str | None = None
    limited_by: str | None = None
    load: float | None = None


class TaskRefilled(Event, frozen=True, kw_only=True):
    """A spilled task came back into the queue."""

    kind = "refilled"
    task_id: str
    task_type: str


class TaskDeadLettered(Event, frozen=True, kw_only=True):
    """A stored task became a dead letter: it will not be tried again."""

    kind = "died"
    task_id: str
    task_type: str
    attempts: int
    error: str


class TaskStarted(Event, frozen=True, kw_only=True):
    """A handler was started."""

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
    """A worker's breaker opened. `retry_in` is in seconds; None: it stays open until the worker is revived."""

    kind = "worker_failed"
    worker_id: str
    reason: str
    retry_in: float | None


class WorkerRecovered(Event, frozen=True, kw_only=True):
    """A worker's breaker closed, because its probes succeeded or the worker was revived."""

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
    """Code blocked the event loop for `seconds`; `task_id` and `where` name the code as far as it could be seen."""

    kind = "loop_stalled"
    seconds: float
    task_id: str | None
    worker_id: str | None
    where: str


Sink = Callable[[Event], None]


class Subscription:
    """A bounded buffer of events and an async iterator over them: the oldest are dropped, and counted in `dropped`.

    It ends when its source closes, or by `close`.
    """

    def __init__(self, *, bound: int, on_close: Callable[[Subscription], None]) -> None:
        self._buffer: deque[Event] = deque(maxlen=bound)
        self._waiter: asyncio.Future[None] | None = None
        self._on_close = on_close
        self._closed = False
        self.dropped = 0

    @property
    def empty(self) -> bool:
        """True if reading would have to wait."""
        return not self._buffer and not self._closed

    def put(self, event: Event) -> None:
        """Add an event, and drop the oldest if the buffer is full."""
        if len(self._buffer) == self._buffer.maxlen:
            self.dropped += 1
        self._buffer.append(event)
        self._wake()

    def close(self) -> None:
        """End the iteration after the events that are buffered."""
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
    """Delivers each event to sinks and subscriptions. Not thread-safe: it belongs to one loop.

    Attributes:
        active: whether there is a sink or a subscription. Callers of `emit` check it first, to make no event in vain.
    """

    def __init__(self, sinks: tuple[Sink, ...] = ()) -> None:
        self._sinks = sinks
        self._subscriptions: list[Subscription] = []
        self._closed = False
        self.active = bool(sinks)

    def emit(self, event: Event) -> None:
        """Deliver `event`. A sink that raises is logged, and the others still get the event."""
        for sink in self._sinks:
            try:
                sink(event)
            except Exception:
                log.exception("event sink %r failed on %s; the other sinks still get the event", sink, event.kind)
        for subscription in self._subscriptions:
            subscription.put(event)

    def add_sink(self, sink: Sink) -> None:
        """Call `sink` for each event from now on, before the other sinks: these may cause the next event."""
        self._sinks = (sink, *self._sinks)
        self.active = True

    def remove_sink(self, sink: Sink) -> None:
        """Stop calling `sink`."""
        self._sinks = tuple(other for other in self._sinks if other != sink)
        self.active = bool(self._sinks or self._subscriptions)

    def subscribe(self, *, bound: int) -> Subscription:
        """Return a subscription to every event from now on, which keeps the newest `bound` events until they are read.

        Raises:
            InvalidSetting: `bound` is not a whole number of at least 1.
        """
        check_whole("events", "bound", bound)
        subscription = Subscription(bound=bound, on_close=self._remove)
        self._subscriptions.append(subscription)
        self.active = True
        if self._closed:  # there will be no more events
            subscription.close()
        return subscription

    def _remove(self, subscription: Subscription) -> None:
        self._subscriptions.remove(subscription)
        self.active = bool(self._sinks or self._subscriptions)

    def close(self) -> None:
        """End every subscription, present and future."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.close()
