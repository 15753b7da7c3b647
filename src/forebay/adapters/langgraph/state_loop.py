"""The event loop of a state, and calls that come to it from other threads and loops."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from forebay import _validate
from forebay.errors import NoRunningLoop, WouldDeadlock
from forebay.state import Namespace
from forebay.storage.shown_url import shown_url

_CHECK_INTERVAL = 1.0  # seconds after which a caller looks whether the loop is still there

_T = TypeVar("_T")


def check_state(owner: str, state: object) -> None:
    """Check that what `owner`, a class, was given is a state or a namespace of one.

    Raises:
        InvalidSetting: it is not.
    """
    if not isinstance(state, Namespace):
        expected = "a ShardedState, which `await ShardedState.connect(...)` returns, or a namespace of it"
        shown = shown_url(state) if isinstance(state, str) else state  # it may have a password
        _validate.reject(owner, "state", shown, expected)


class StateLoop:
    """The running event loop, which is that of the state: all calls run there, wherever they come from.

    Args:
        owner: the class that uses it, for messages.

    Raises:
        NoRunningLoop: none is running.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            why = "is made outside of an event loop: make it in the one in which its state was connected"
            raise NoRunningLoop(what=owner, why=why) from None

    async def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Return the result of `work`, which runs in the loop of the state if this is another one."""
        if asyncio.get_running_loop() is self._loop:
            return await work
        self._check_runs(work)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        result = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait((result,), timeout=_CHECK_INTERVAL))[0]:
                self._check_may_end(work, future)
        except asyncio.CancelledError:
            result.cancel()
            raise
        return await result

    def run_blocking(self, method: str, work: Coroutine[Any, Any, _T]) -> _T:
        """Return the result of `work`; block the calling thread for it.

        Args:
            method: that was called, for messages.
            work: what to run.

        Raises:
            WouldDeadlock: the calling thread is that of the loop.
            NoRunningLoop: the loop has ended.
        """
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            work.close()
            what = f"{self._owner}.{method}() in the event loop of its state"
            raise WouldDeadlock(what=what, advice=f"await a{method}() there, and run graphs by ainvoke() or astream()")
        self._check_runs(work)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not wait((future,), timeout=_CHECK_INTERVAL).done:
            self._check_may_end(work, future)
        return future.result()

    def _check_may_end(self, work: Coroutine[Any, Any, Any], future: Future[Any]) -> None:
        """Check that the loop has not ended before it has taken up `work`: nobody else would say so."""
        if not self._loop.is_closed():
            return
        future.cancel()
        if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
            work.close()
        raise self._ended()

    def _check_runs(self, work: Coroutine[Any, Any, Any]) -> None:
        if not self._loop.is_running():
            work.close()
            raise self._ended()

    def _ended(self) -> NoRunningLoop:
        why = "was made in an event loop that runs no more: its state lives as long as that loop"
        return NoRunningLoop(what=self._owner, why=why)
