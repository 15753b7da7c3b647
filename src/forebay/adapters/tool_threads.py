"""The threads of the plain tools of one run, so that a cancelled run can wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Final, ParamSpec, TypeVar

from forebay._threads import DaemonThreadExecutor

P = ParamSpec("P")
T = TypeVar("T")

#: Its threads are as many as plain tools run at once, which the slots of their workers bound.
_THREADS: Final = DaemonThreadExecutor("forebay-tool")


class ToolThreads(Executor):
    """An executor for one run. Used in its event loop."""

    def __init__(self) -> None:
        self._running: set[Future[object]] = set()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in a thread."""
        future = _THREADS.submit(fn, *args, **kwargs)
        self._running.add(future)  # type: ignore[arg-type]  # a future of some type
        future.add_done_callback(self._running.discard)
        return future

    async def wait(self) -> None:
        """Wait until all of them have returned, whatever they return or raise."""
        loop = asyncio.get_running_loop()
        for future in tuple(self._running):
            ended = asyncio.Event()
            future.add_done_callback(lambda _, ended=ended: loop.call_soon_threadsafe(ended.set))  # type: ignore[misc]
            await ended.wait()
