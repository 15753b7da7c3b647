"""The events of an upstream: they reach its own hook, and the supervisors whose tasks have called it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final
from weakref import WeakSet

from forebay import clock
from forebay._hooks import call_plain_hook, name_of
from forebay._threads import DaemonThreadExecutor
from forebay.context import EventReceiver
from forebay.events import Event, log

_MAX_UNDELIVERED: Final = 1_000  # the oldest are dropped: a hook that blocks must not fill the memory


class UpstreamEvents:
    """Delivers the events of one upstream. Safe to use from any thread.

    Events happen in the middle of the upstream's work, while it holds locks, and the hook is user code, which may call
    the upstream. So the hook is called a moment later: in a turn of its own of the running event loop or, where there
    is none, in a thread.

    Args:
        name: of the upstream.
        on_event: the hook: it is called with each event; None for none.
    """

    def __init__(self, name: str, on_event: Callable[[Event], object] | None = None) -> None:
        self._hook = on_event
        self._hook_name = "" if on_event is None else f"on_event {name_of(on_event)} of upstream {name!r}"
        self._receivers: WeakSet[EventReceiver] = WeakSet()
        self._undelivered: deque[Event] = deque(maxlen=_MAX_UNDELIVERED)
        self._executor = DaemonThreadExecutor("forebay-upstream-events", max_threads=1)
        self._lock = threading.Lock()

    def add_receiver(self, receiver: EventReceiver) -> None:
        """Let a supervisor receive events from now on, as long as it exists."""
        if receiver not in self._receivers:
            with self._lock:
                self._receivers.add(receiver)

    def emit(self, event: Event) -> None:
        """Deliver an event soon."""
        with self._lock:
            receivers = list(self._receivers)
        for receiver in receivers:
            receiver.receive(event)
        if self._hook is None:
            return
        self._undelivered.append(event)
        loop = clock.running_loop()
        try:
            if loop is not None:
                loop.call_soon(self._deliver)
            else:
                self._executor.submit(self._deliver)
        except RuntimeError:  # the interpreter is shutting down, or no thread can be started
            log.error("%s was not called with %r, because no thread can be started", self._hook_name, event)

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The supervisors are the parent's; the hook is called in the child for its own events."""
        self._lock = threading.Lock()
        self._receivers = WeakSet()
        self._undelivered.clear()
        self._executor = DaemonThreadExecutor("forebay-upstream-events", max_threads=1)

    def _deliver(self) -> None:
        assert self._hook is not None  # noqa: S101 - else nothing is undelivered
        while self._undelivered:
            try:
                event = self._undelivered.popleft()
            except IndexError:  # another thread was faster
                return
            call_plain_hook(self._hook_name, self._hook, event)
