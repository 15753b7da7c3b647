"""Events: what happened, as frozen data, and the bounded ways to receive it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextvars import copy_context
from typing import Any, ClassVar, Self

import msgspec

from forebay import clock
from forebay._hooks import call_plain_hook, name_of
from forebay._json import JsonStruct, plain_field, plain_value
from forebay._validate import check_whole
from forebay.task import Priority, TaskResult, Verdict

log = logging.getLogger("forebay")

_MAX_UNDELIVERED = 1000  # events that wait for the sinks, before code that causes more of them delivers them itself


class Event(JsonStruct, frozen=True, kw_only=True):
    """The base of every event.

    Attributes:
        kind: names the event when it is sent or printed.
        at: loop time in seconds, to measure by.
        time: epoch seconds, to show and to store.
    """

    kind: ClassVar[str]
    at: float
    time: float = msgspec.field(default_factory=clock.wall_time)

    def as_dict(self, *, values: bool = True) -> dict[str, Any]:
        """Return it as plain data for JSON, with its `kind`.

        Args:
            values: whether what a handler returned or reported is in it. A value that JSON cannot hold is None, and
                ``value_error`` (of a result, ``result_error``) says why.
        """
        fields = {"kind": self.kind, "time": self.time}
        for name in self.__struct_fields__:
            fields |= self._field_as_dict(name, values=values)
        return fields

    def _field_as_dict(self, name: str, *, values: bool) -> dict[str, Any]:  # noqa: ARG002 - of two events
        return {name: plain_field(getattr(self, name))}


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


class SagaChanged(Event, frozen=True, kw_only=True):
    """A saga is compensated from now on, is parked, or has ended; its log has it.

    Attributes:
        saga_id: of the saga.
        saga: its name.
        state: ``"compensating"``, ``"parked"``, ``"compensated"`` or ``"done"``; ``"running"`` after a person let it go
            on.
        why: why it is parked or compensated; empty otherwise.
    """

    kind = "saga"
    saga_id: str
    saga: str
    state: str
    why: str = ""


class TaskStarted(Event, frozen=True, kw_only=True):
    """A handler was started."""

    kind = "started"
    task_id: str
    worker_id: str
    attempt: int = 1


class TaskRetried(Event, frozen=True, kw_only=True):
    """An attempt failed, and the task is tried again, `delay` seconds later at the earliest."""

    kind = "retried"
    task_id: str
    worker_id: str
    attempt: int
    delay: float
    error: str


class TaskProgress(Event, frozen=True, kw_only=True):
    """A handler passed `value` to ``progress``."""

    kind = "progress"
    task_id: str
    value: Any

    def _field_as_dict(self, name: str, *, values: bool) -> dict[str, Any]:
        if name != "value":
            return super()._field_as_dict(name, values=values)
        return plain_value(name, self.value) if values else {}


class TaskFinished(Event, frozen=True, kw_only=True):
    """A task ended."""

    kind = "finished"
    task_id: str
    result: TaskResult

    def _field_as_dict(self, name: str, *, values: bool) -> dict[str, Any]:
        if name != "result":
            return super()._field_as_dict(name, values=values)
        return {name: self.result.as_dict(values=values)}


class WorkerFailed(Event, frozen=True, kw_only=True):
    """A worker takes no tasks: its breaker opened, it did not start, or its life ended and is not started again.

    It is tried again in `retry_in` seconds; None: not until it is revived.
    """

    kind = "worker_failed"
    worker_id: str
    reason: str
    retry_in: float | None


class WorkerRecovered(Event, frozen=True, kw_only=True):
    """A worker's breaker closed, because its probes succeeded or the worker was revived."""

    kind = "worker_recovered"
    worker_id: str


class WorkerExited(Event, frozen=True, kw_only=True):
    """The life of a worker ended by itself: `exit` is ``"normal"``, ``"shutdown"`` or ``"abnormal"``."""

    kind = "worker_exited"
    worker_id: str
    exit: str
    error: str | None = None


class WorkerRestarted(Event, frozen=True, kw_only=True):
    """A worker was started again, for the `restarts`-th time: its life had ended, or that of a worker before it."""

    kind = "worker_restarted"
    worker_id: str
    restarts: int


class WorkerResized(Event, frozen=True, kw_only=True):
    """A worker was given another number of slots."""

    kind = "worker_resized"
    worker_id: str
    before: int
    max_concurrent: int


class Scaled(Event, frozen=True, kw_only=True):
    """An autoscaler has asked its target for another number of replicas.

    Attributes:
        target: names the target.
        before, after: replicas.
        asked: slots that the tasks ask for, averaged.
        panic: whether the short window counted.
        limited_by: what is short instead of workers, so that no replica was added; None if nothing is.
    """

    kind = "scaled"
    target: str
    before: int
    after: int
    asked: float
    panic: bool = False
    limited_by: str | None = None


class BudgetAlert(Event, frozen=True, kw_only=True):
    """A share of a budget is spent: that of its `alert`, or all of it. It comes once for each share and period.

    A budget counts as spent, too, once a call for a tenth of it or less was rejected because of what is spent.

    Attributes:
        upstream: names the upstream.
        budget: the budget, as the upstream's setting is named: ``"budget"``, ``"tenant_budget"``, ``"task_budget"``.
        tenant: whose budget it is; None unless each tenant has one.
        task: the id of the task whose budget it is; None unless each task has one.
        share: that is spent; 1.0: all.
        usd: dollars of the budget.
        spent: dollars spent in this period.
        per: ``"hour"``, ``"day"`` or ``"month"``; None for a budget that never renews.
        period: when the period began, in epoch seconds; 0.0 if the budget never renews.
    """

    kind = "budget_alert"
    upstream: str
    budget: str
    tenant: str | None
    task: str | None
    share: float
    usd: float
    spent: float
    per: str | None
    period: float


class WorkerUnregistered(Event, frozen=True, kw_only=True):
    """A worker was unregistered; `cut` of its runs had not ended in time, and were stopped."""

    kind = "worker_unregistered"
    worker_id: str
    cut: int


class TaskTypePaused(Event, frozen=True, kw_only=True):
    """A task type was paused: nothing of it begins."""

    kind = "type_paused"
    task_type: str


class TaskTypeResumed(Event, frozen=True, kw_only=True):
    """A task type was resumed."""

    kind = "type_resumed"
    task_type: str


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

    It ends when its source closes, or by `close`. Several may read it: each event goes to one of them.
    """

    def __init__(self, *, bound: int, on_close: Callable[[Subscription], None]) -> None:
        self._buffer: deque[Event] = deque(maxlen=bound)
        self._waiters: list[asyncio.Future[None]] = []
        self._on_close = on_close
        self._closed = False
        self.dropped = 0

    @property
    def empty(self) -> bool:
        """True if reading would have to wait."""
        return not self._buffer and not self._closed

    @property
    def closed(self) -> bool:
        """True if no more events will come."""
        return self._closed

    def take_unread(self) -> list[Event]:
        """Take out every event that can be read now."""
        unread = []
        while self._buffer:
            unread.append(self._buffer.popleft())
        return unread

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
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._buffer:
            if self._closed:
                raise StopAsyncIteration
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)
        return self._buffer.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class EventBus:
    """Delivers each event to subscriptions and sinks. Not thread-safe: it belongs to one loop.

    A subscription has an event at once. A sink is user code, which may raise anything and may call the supervisor, so
    it is never called in the middle of the supervisor's work: events wait for a turn of the loop of their own.

    Attributes:
        active: whether anything receives events. Callers of `emit` check it first, to make no event in vain.
    """

    def __init__(self, sinks: tuple[Sink, ...] = ()) -> None:
        self._sinks = tuple((f"event sink {name_of(sink)}", sink) for sink in sinks)
        self._observers: tuple[Sink, ...] = ()
        self._subscriptions: list[Subscription] = []
        self._undelivered: deque[Event] = deque()  # to the sinks
        self._delivering = False
        self._delivery_due = False  # the loop will call `_deliver_due`
        self._closed = False
        self.active = bool(sinks)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context = copy_context()  # of the sinks: not that of the task whose event is delivered

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver events in `loop`, and call the sinks in the present context. It may have been closed before."""
        self._loop = loop
        self._closed = self._delivery_due = False  # what was due may have been left to a loop that has ended
        self._context = copy_context()

    def emit(self, event: Event) -> None:
        """Give `event` to the subscriptions now, and to the sinks soon. This calls no user code."""
        for observer in self._observers:
            observer(event)
        for subscription in self._subscriptions:
            subscription.put(event)
        if self._sinks and self._loop is not None:
            self._undelivered.append(event)
            if not self._delivery_due:
                self._delivery_due = True
                self._loop.call_soon(self._deliver_due, context=self._context)

    def _deliver_due(self) -> None:
        self._delivery_due = False
        self._deliver()

    def limit_backlog(self) -> None:
        """Call the sinks now if many events wait for them.

        Code that causes events without ever giving the loop a turn calls this where the supervisor is not in the middle
        of anything.
        """
        if len(self._undelivered) > _MAX_UNDELIVERED and not self._delivering:
            self._context.run(self._deliver)

    def _deliver(self) -> None:
        """Call the sinks with the events so far. Those that the sinks cause wait for the next turn of the loop."""
        self._delivering = True
        try:
            for _ in range(len(self._undelivered)):
                event = self._undelivered.popleft()
                for name, sink in self._sinks:
                    call_plain_hook(name, sink, event)
        finally:
            self._delivering = False

    def add_observer(self, observer: Sink) -> None:
        """Call `observer` with each event at once, in the middle of the supervisor's work, so it must not call back."""
        self._observers = (*self._observers, observer)
        self.active = True

    def remove_observer(self, observer: Sink) -> None:
        """Stop calling `observer`."""
        self._observers = tuple(other for other in self._observers if other != observer)
        self._update_active()

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
        self._update_active()

    def _update_active(self) -> None:
        self.active = bool(self._sinks or self._observers or self._subscriptions)

    def close(self) -> None:
        """Deliver what is left to the sinks, and end every subscription, present and future, until it starts again."""
        if not self._delivering:
            self._context.run(self._deliver)
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.close()
