"""In a thread of our own: a plain callable as it is, a coroutine in an event loop that the thread runs for it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec
from forebay.errors import InvalidSetting
from forebay.task import Task


class ThreadEngine:
    """Every run in a thread, so that a coroutine that blocks holds up nobody but itself.

    An async handler gets an event loop for each run: what it keeps from run to run, such as connections, must
    not belong to one. In virtual time everything runs in the one loop, as all threads do there.
    """

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:  # noqa: ARG002 - the seam's
        """Take it.

        Raises:
            InvalidSetting: it lives in the supervisor's own loop: a nested supervisor, or what is started and stopped.
        """
        handler = spec.build()
        if handler.nested_supervisor is not None or handler.load is not None or handler.start is not None:
            expected = "left out: what it was registered with lives in the supervisor's own loop"
            raise InvalidSetting(owner=f"worker {spec.worker!r}", name="engine", value="thread", expected=expected)
        runs = _ThreadRuns(handler)
        return replace(handler, call=runs.call, blocking=True, on_cancel=runs.on_cancel, on_end=runs.on_end)


class _ThreadRuns:
    """The runs of one handler, each in a loop of its own if it needs one."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        # By the task's identity: a task that is run again while its first run will not stop keeps its id.
        self._private: dict[int, _LoopInThread] = {}

    def _of(self, task: Task) -> _LoopInThread:
        return self._private.setdefault(
            id(task), _LoopInThread()
        )  # whoever comes first: the thread, or its cancellation

    def call(self, task: Task) -> Any:
        """In a thread: run the handler to its end."""
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - documented for such use: a virtual loop is in line
            return self._handler.call(task)
        if not self._handler.blocking:
            return self._of(task).run(lambda: self._handler.call(task))
        value = self._handler.call(task)
        if not inspect.isawaitable(value):
            return value
        try:
            return self._of(task).run(lambda: value)
        finally:
            if inspect.iscoroutine(value):
                value.close()  # cancelled before it began, it would be missed; once it has run this does nothing

    def on_cancel(self, task: Task) -> object:
        """In the supervisor's loop: stop a run, if there is a way."""
        own = self._handler.on_cancel
        try:
            return None if own is None else own(task)
        finally:
            self._of(task).cancel()

    def on_end(self, task: Task) -> None:
        """In the supervisor's loop: a run is over."""
        self._private.pop(id(task), None)
        if self._handler.on_end is not None:
            self._handler.on_end(task)


class _LoopInThread:
    """An event loop in a thread, for one coroutine, which can be cancelled from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: asyncio.Task[Any] | None = None
        self._cancelled = False

    def run(self, begin: Callable[[], Any]) -> Any:
        """Run what `begin` returns, once it is awaited, to its end."""
        with asyncio.Runner() as runner:
            return runner.run(self._run(begin))

    async def _run(self, begin: Callable[[], Any]) -> Any:
        with self._lock:
            self._running = asyncio.current_task()
            cancelled = self._cancelled
        if cancelled:
            raise asyncio.CancelledError
        value = begin()
        return await value if inspect.isawaitable(value) else value

    def cancel(self) -> None:
        """Cancel it, from any thread; before it has begun too."""
        with self._lock:
            self._cancelled = True
            if self._running is not None:
                with contextlib.suppress(RuntimeError):  # its loop has just closed
                    self._running.get_loop().call_soon_threadsafe(self._running.cancel)
