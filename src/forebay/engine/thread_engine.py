"""The engine that runs every task in a thread: a plain callable directly, a coroutine in an event loop of its own."""

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
    """An engine that runs every task in a thread, so that a coroutine that blocks delays no other task.

    An async handler gets a new event loop for each run: objects that it keeps between runs, such as connections, must
    not belong to a loop. In virtual time everything runs in the one loop, as all threads do there.
    """

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:  # noqa: ARG002 - the interface's
        """Return the handler, to be run in threads.

        Raises:
            InvalidSetting: it belongs to the supervisor's own loop: a nested supervisor, a saga, or a handler with
                start and stop.
        """
        handler = spec.build()
        belongs_to_loop = (handler.nested_supervisor, handler.saga, handler.load, handler.start)
        if any(each is not None for each in belongs_to_loop):
            expected = "left out: this handler belongs to the supervisor's own event loop"
            raise InvalidSetting(owner=f"worker {spec.worker!r}", name="engine", value="thread", expected=expected)
        runs = _ThreadRuns(handler)
        return replace(handler, call=runs.call, blocking=True, on_cancel=runs.on_cancel, on_end=runs.on_end)


class _ThreadRuns:
    """The runs of one handler in threads, each in an event loop of its own if it needs one."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        # By the identity of the Task, the oldest run first: the same one may be run again while its first run does not
        # stop yet, and a task that comes back from a store keeps its task_id.
        self._loops: dict[int, list[_LoopInThread]] = {}
        self._lock = threading.Lock()

    def _begin(self, task: Task) -> _LoopInThread:
        """Return the loop of a run that begins in its thread; its cancellation may have come before."""
        with self._lock:
            loops = self._loops.setdefault(id(task), [])
            if not loops or loops[-1].begun:
                loops.append(_LoopInThread())
            loops[-1].begun = True
            return loops[-1]

    def call(self, task: Task) -> Any:
        """Run the handler to its end. Called in a thread."""
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - public by `__all__`; a virtual loop runs us inline
            return self._handler.call(task)
        if not self._handler.blocking:
            return self._begin(task).run(lambda: self._handler.call(task))
        value = self._handler.call(task)
        if not inspect.isawaitable(value):
            return value
        try:
            return self._begin(task).run(lambda: value)
        finally:
            if inspect.iscoroutine(value):
                value.close()  # no effect on a finished one; else Python warns of one that never began

    def on_cancel(self, task: Task) -> object:
        """Stop a run as far as possible. Called in the supervisor's loop."""
        own = self._handler.on_cancel
        try:
            return None if own is None else own(task)
        finally:
            with self._lock:
                loops = self._loops.setdefault(id(task), [])
                if not loops or loops[-1].cancelled:
                    loops.append(_LoopInThread())
                latest = loops[-1]
            latest.cancel()

    def on_end(self, task: Task) -> None:
        """Forget a run that has ended. Called in the supervisor's loop."""
        with self._lock:
            loops = self._loops.get(id(task), [])
            ended = next((loop for loop in loops if loop.ended), None)
            if ended is not None:
                loops.remove(ended)
            if not loops or ended is None:
                self._loops.pop(id(task), None)
        if self._handler.on_end is not None:
            self._handler.on_end(task)


class _LoopInThread:
    """An event loop in a thread, for one coroutine, which can be cancelled from another thread.

    Attributes:
        begun: whether its run has begun.
        cancelled: whether its run was cancelled.
        ended: whether its run has ended.
    """

    def __init__(self) -> None:
        self.begun = self.cancelled = self.ended = False
        self._lock = threading.Lock()
        self._running: asyncio.Task[Any] | None = None

    def run(self, begin: Callable[[], Any]) -> Any:
        """Return what `begin` returns, awaited if it is awaitable."""
        try:
            with asyncio.Runner() as runner:
                return runner.run(self._run(begin))
        finally:
            self.ended = True

    async def _run(self, begin: Callable[[], Any]) -> Any:
        with self._lock:
            self._running = asyncio.current_task()
            cancelled = self.cancelled
        if cancelled:
            raise asyncio.CancelledError
        value = begin()
        return await value if inspect.isawaitable(value) else value

    def cancel(self) -> None:
        """Cancel the coroutine, even before it has begun. From any thread."""
        with self._lock:
            self.cancelled = True
            if self._running is not None:
                with contextlib.suppress(RuntimeError):  # its loop has just closed
                    self._running.get_loop().call_soon_threadsafe(self._running.cancel)
