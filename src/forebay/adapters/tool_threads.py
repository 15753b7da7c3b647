"""The threads of the plain tools of one run, so that it can wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
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

    @property
    def running(self) -> int:
        """The number of those that have not returned yet."""
        return len(self._running)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in a thread."""
        future: Future[T] = _THREADS.submit(_without_exit, partial(fn, *args, **kwargs))
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


def exit_error(error: BaseException) -> RuntimeError:
    """Return what is raised instead of a SystemExit or a KeyboardInterrupt: either of them ends the event loop."""
    return RuntimeError(f"the code of the agent raised {error!r}")


def _without_exit(function: Callable[[], T]) -> T:
    try:
        return function()
    except (KeyboardInterrupt, SystemExit) as error:
        raise exit_error(error) from error
