"""A blocking agent in a thread, that a cancelled run stops at its next call instead of leaving it to its end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from contextvars import copy_context
from typing import Any, Final, Protocol

from forebay._threads import DaemonThreadExecutor
from forebay.upstream.httpx_binding.home_loop import HOME_LOOP

#: Its threads are as many as runs of such agents, which the slots of their workers bound.
_THREADS: Final = DaemonThreadExecutor("forebay-agent")


class Stoppable(Protocol):
    """Something that a stop of the run cancels: called from any thread."""

    def cancel(self) -> object:
        """Cancel it."""


class AgentThread:
    """The thread of one run. Made in the event loop; the agent calls `await_in_loop` or `check_stop` before each call.

    Cancelling `run` stops the agent there: what it awaits in the loop is cancelled, and its next call raises
    CancelledError. The run ends when the thread does, and holds its slot until then. A thread that the agent has left
    behind stops at its next call, too. Both methods may be called in several threads of a run at once.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._stoppable: set[Stoppable] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the run."""
        return self._loop

    @property
    def stopped(self) -> bool:
        """True once the run was cancelled or has ended."""
        return self._stopped

    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what `function` returns in a thread, in a copy of this context.

        Bound async clients that it uses in event loops of its own send in this loop.
        """
        context = copy_context()
        context.run(HOME_LOOP.set, self._loop)
        ended = self._loop.run_in_executor(_THREADS, context.run, _outcome, function)
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            self._stop()
            await asyncio.wait([ended])
            raise
        self._stop()
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

    @contextlib.contextmanager
    def stopping(self, stoppable: Stoppable) -> Iterator[None]:
        """Cancel something if the run is stopped while the block runs. Called in the thread."""
        self._stoppable.add(stoppable)
        try:
            if self._stopped:  # otherwise the stop finds it
                stoppable.cancel()
            yield
        finally:
            self._stoppable.discard(stoppable)

    def await_in_loop(self, coroutine: Coroutine[Any, Any, Any], *, stops: bool = True) -> Any:
        """Return the value of a coroutine that runs in the loop, with this thread's context. Called in the thread.

        Args:
            coroutine: what is awaited.
            stops: whether it is cancelled with the run; False for what cleans up.

        Raises:
            asyncio.CancelledError: the run was cancelled.
            RuntimeError: this is the thread of the loop, as in virtual time.
        """
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001 - public by `__all__`
            coroutine.close()
            message = "a thread in virtual time is that of the event loop, which cannot wait for itself"
            raise RuntimeError(f"{message}: give the agent a client that blocks")
        awaited = copy_context().run(asyncio.run_coroutine_threadsafe, coroutine, self._loop)
        try:
            with self.stopping(awaited) if stops else contextlib.nullcontext():
                return awaited.result()
        except concurrent.futures.CancelledError:  # an Exception, which agents take for one of their tools
            raise asyncio.CancelledError from None

    def _stop(self) -> None:
        self._stopped = True
        for each in tuple(self._stoppable):
            each.cancel()


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return a value or an exception as a value, because no future can carry StopIteration or a CancelledError."""
    try:
        return function(), None
    except BaseException as exc:  # noqa: BLE001 - it is raised in the loop
        return None, exc
