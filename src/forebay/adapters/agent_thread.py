"""A blocking agent in a thread, that a cancelled run stops at its next call instead of leaving it to its end."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, Final

from forebay._threads import DaemonThreadExecutor

#: Its threads are as many as runs of such agents, which the slots of their workers bound.
_THREADS: Final = DaemonThreadExecutor("forebay-agent")


class AgentThread:
    """The thread of one run. Made in the event loop; the agent calls `await_in_loop` or `check_stop` before each call.

    Cancelling `run` stops the agent there: what it awaits in the loop is cancelled, and its next call raises
    CancelledError. The run ends when the thread does, and holds its slot until then.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._awaited: concurrent.futures.Future[Any] | None = None

    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what `function` returns in a thread, in a copy of this context."""
        ended = self._loop.run_in_executor(_THREADS, copy_context().run, _outcome, function)
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            self._stopped = True
            if self._awaited is not None:
                self._awaited.cancel()
            await asyncio.wait([ended])
            raise
        value, cause = ended.result()
        if cause is not None:
            raise cause
        return value

    def check_stop(self) -> None:
        """Check that the run goes on. Called in the thread.

        Raises:
            asyncio.CancelledError: it was cancelled.
        """
        if self._stopped:
            raise asyncio.CancelledError

    def await_in_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return the value of a coroutine that runs in the loop, with this thread's context. Called in the thread.

        Raises:
            asyncio.CancelledError: the run was cancelled.
            RuntimeError: this is the thread of the loop, as in virtual time.
        """
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - public by `__all__`
            coroutine.close()
            message = "a thread in virtual time is that of the event loop, which cannot wait for itself"
            raise RuntimeError(f"{message}: give the agent a client that blocks")
        awaited = self._awaited = copy_context().run(asyncio.run_coroutine_threadsafe, coroutine, self._loop)
        try:
            if self._stopped:  # otherwise the cancellation finds it
                awaited.cancel()
            return awaited.result()
        except concurrent.futures.CancelledError:  # an Exception, which agents take for one of their tools
            raise asyncio.CancelledError from None
        finally:
            self._awaited = None


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return a value or an exception as a value, because no future can carry StopIteration or a CancelledError."""
    try:
        return function(), None
    except BaseException as exc:  # noqa: BLE001 - it is raised in the loop
        return None, exc
