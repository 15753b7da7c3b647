"""A shard whose failures do not spread: once it is down, calls of it fail at once, until it answers again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

from forebay.context import CallObserver, call_observer
from forebay.errors import ShardAnswerLost, ShardUnavailable, StoreAnswerLost, StoreUnavailable, WrongLoop
from forebay.state.shard import OperationRejected, Shard
from forebay.state.shard_load import ShardLoad, StateLoad
from forebay.state.time_limits import TimeLimits

log = logging.getLogger("forebay")

_P = ParamSpec("_P")
_T = TypeVar("_T")

_PROBE_INTERVAL = 0.5  # seconds between two attempts to reach a shard that is down


class GuardedShard:
    """A shard with a time limit for each call.

    A shard that has not answered in time, or could not be reached, is *down*. While it is down, a ping is sent to it
    twice a second, and all calls fail without being sent. So they do once it has been closed.

    Args:
        shard: the shard.
        weight: its share of the keys, compared with the others'.
        state: the load of the state that it is in.
        timeout: seconds that a call may take.

    Attributes:
        load: as task admission sees it.
    """

    def __init__(self, shard: Shard, weight: float, state: StateLoad, *, timeout: float) -> None:
        self.shard = shard
        self.url = shard.url
        self._timeout = timeout
        self._limits = TimeLimits(timeout)
        self.load = ShardLoad(f"shard:{shard.url}", state, limits=self._limits, recheck=_PROBE_INTERVAL)
        state.add(self.load, weight)
        self._error: ShardUnavailable | None = None  # why it is down
        self._probing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that of `open`
        self._is_closed = False

    @property
    def is_down(self) -> bool:
        """True while calls of it fail."""
        return self._error is not None

    @property
    def why_down(self) -> str:
        """The reason for which calls of it fail; empty if they do not."""
        return "" if self._error is None else self._error.why

    async def open(self) -> None:
        """Connect. If it cannot be reached, it is down."""
        self._loop = asyncio.get_running_loop()
        await self._connect()

    async def close(self) -> None:
        """Stop the probes and close the shard, within the time of two calls. Later calls fail.

        Raises:
            WrongLoop: it was opened in another event loop.
        """
        self._check_loop()
        self._is_closed = True
        why, advice = "its state has been closed", "Use a state within its `async with`, or connect another one."
        self._error = ShardUnavailable(where=self.url, why=why, advice=advice)
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait((self._probing,))  # a cancellation of this call is not taken for that of the probe
            self._probing = None
        with suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(2 * self._timeout):
                await self.shard.close()

    async def call(self, method: Callable[_P, Awaitable[_T]], *args: _P.args, **options: _P.kwargs) -> _T:
        """Return what `method` of the shard returns.

        Raises:
            ShardUnavailable: the shard is down.
            ShardAnswerLost: it may have done what it was asked.
            WrongLoop: it was opened in another event loop.
        """
        loop = self._check_loop()
        run = call_observer()
        if run is not None:
            run.record_call(self.load)
        if self._error is not None:
            raise _reported(ShardUnavailable(where=self.url, why=self._error.why, advice=self._error.advice), run)
        limit = self._limits.start(loop)
        try:
            return await method(*args, **options)
        except OperationRejected as rejected:
            raise _reported(_named(rejected.error, self.url), run) from rejected.error
        except StoreUnavailable as error:
            raise _reported(self._fail(error), run) from error
        except asyncio.CancelledError as error:
            if not limit.has_cancelled():
                raise
            raise _reported(self._fail(self._late(StoreAnswerLost)), run) from error
        finally:
            self.load.took(self._limits.stop(limit, loop))

    def _check_loop(self) -> asyncio.AbstractEventLoop:
        """Return the running event loop, in which it was opened."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop and self._loop is not None:
            advice = "connect another state there, or hand the call over by asyncio.run_coroutine_threadsafe()"
            raise WrongLoop(what="A ShardedState", advice=advice)
        return loop

    def _late(self, kind: type[StoreUnavailable]) -> StoreUnavailable:
        why, advice = f"it has not answered within {self._timeout:g} s", "Check that it runs and can be reached."
        return kind(where=self.url, why=why, advice=advice)

    def _fail(self, error: StoreUnavailable) -> ShardUnavailable:
        self._go_down(ShardUnavailable(where=self.url, why=error.why, advice=error.advice))
        return _named(error, self.url)

    def _go_down(self, error: ShardUnavailable) -> None:
        if self._is_closed:
            return
        if self._error is None:
            log.error("the shard %s is down: %s. Its keys fail until it is back. %s", self.url, error.why, error.advice)
        self._error = error
        self.load.went_down()
        if self._loop is not None and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._probe(), name=f"forebay-state-probe-{self.url}")

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self.shard.open()
        except StoreUnavailable as error:
            self._fail(error)
        except TimeoutError:
            self._fail(self._late(StoreUnavailable))

    async def _probe(self) -> None:
        """Ask for an answer until there is one."""
        while self._error is not None:
            await asyncio.sleep(_PROBE_INTERVAL)
            with suppress(Exception):  # a probe that ends would leave the shard down for good
                async with asyncio.timeout(self._timeout):
                    await self.shard.open()
                    with suppress(OperationRejected):  # it has answered: other operations may succeed
                        await self.shard.ping()
                self._error = None
                self.load.came_up()
                log.warning("the shard %s is back", self.url)


def _reported(error: ShardUnavailable, run: CallObserver | None) -> ShardUnavailable:
    """Return an error, once the run has noted it: then it does not count against the worker."""
    if run is not None:
        run.record_upstream_fault()
    return error


def _named(error: StoreUnavailable, url: str) -> ShardUnavailable:
    kind = ShardAnswerLost if isinstance(error, StoreAnswerLost) else ShardUnavailable
    return kind(where=url, why=error.why, advice=error.advice)
