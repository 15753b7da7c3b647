"""The core of a supervisor: the objects that its parts share and that none of them owns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Final, TypeVar

from forebay.clock import running_loop
from forebay.events import Event, EventBus
from forebay.supervisor.codecs import TaskCodecs
from forebay.supervisor.failure_log import FailureLog
from forebay.supervisor.pools import Pools
from forebay.supervisor.runs.timers import Timers
from forebay.supervisor.tenants import Tenants
from forebay.supervisor.ticket_registry import TicketRegistry

T = TypeVar("T")
RESUME_DELAY: Final = 0.1  # seconds after the program has cancelled every task of asyncio, perhaps as its loop ends


class Core:
    """The loop, the timers, the tickets, the pools and the event bus of one supervisor.

    Attributes:
        loop: the event loop that it runs on.
        threads: where blocking handlers run.
        bus: where it sends events.
        codecs: the declared types of payloads and results.
        timers: its timers.
        failures: logs what fails in the background.
        registry: its tickets.
        tenants: the tenants that have settings.
        pools: its pools.
        base_context: the context variables of its start, for handlers of tasks that another process submitted.
        closed: whether `close` was called.
        background_listeners: called whenever background work has ended.
    """

    def __init__(  # noqa: PLR0913 - the shared objects, and the settings of those made here
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        threads: Executor,
        bus: EventBus,
        codecs: TaskCodecs,
        max_queue_size: int | None,
        tenants: Tenants,
        keep_results: int,
        keep_results_bytes: int,
    ) -> None:
        self.loop = loop
        self.threads = threads
        self.bus = bus
        bus.start(loop)
        self.codecs = codecs
        self.timers = Timers(loop)
        self.failures = FailureLog()
        self.registry = TicketRegistry(loop, bus, keep=keep_results, keep_bytes=keep_results_bytes)
        self.tenants = tenants
        self.pools = Pools(max_queue_size, tenants)
        self.base_context = copy_context()
        self._background_tasks: set[asyncio.Future[Any]] = set()
        self.background_listeners: list[Callable[[], None]] = []
        self.closed = False

    def receive(self, event: Event) -> None:
        """Deliver an event of an upstream to the sinks and subscriptions. Callable from any thread."""
        if self.closed or not self.bus.active:
            return
        if running_loop() is self.loop:
            self.bus.emit(event)
        else:
            with suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self.loop.call_soon_threadsafe(self.bus.emit, event)

    def run_in_background(self, work: Awaitable[Any], *, if_cancelled: Callable[[], None] | None = None) -> None:
        """Await `work`, and log it if it fails.

        Call `if_cancelled` if somebody cancels it, as programs do that cancel every task of asyncio: perhaps before its
        first step, so that no `finally` of its own can return what it was given.
        """
        future = self.run_to_completion(work)
        future.add_done_callback(self._log_failure)
        if if_cancelled is not None:
            future.add_done_callback(lambda _: if_cancelled() if future.cancelled() and not self.closed else None)

    def run_to_completion(self, work: Awaitable[T]) -> asyncio.Future[T]:
        """Await `work` to its end, even if the caller is cancelled; closing the supervisor waits for it."""
        future = asyncio.ensure_future(work)
        self._background_tasks.add(future)
        future.add_done_callback(self._background_task_done)
        return future

    def close(self) -> None:
        """Cancel the background work that has not ended, so that nobody waits for a store that does not answer."""
        self.closed = True
        for future in self.background_tasks:
            future.cancel()
        self.timers.close()
        self.registry.notify_progress()  # a drain that is under way ends

    def _background_task_done(self, future: asyncio.Future[Any]) -> None:
        self._background_tasks.discard(future)
        for listener in self.background_listeners:
            listener()

    def _log_failure(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self.failures.report("a background task of the supervisor failed", error=error)

    @property
    def background_tasks(self) -> frozenset[asyncio.Future[Any]]:
        """The background work that has not ended."""
        return frozenset(self._background_tasks)
