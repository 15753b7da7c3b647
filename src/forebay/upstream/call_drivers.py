"""Driving the script of a call: on an event loop, or in a plain thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from forebay import clock, context
from forebay.interfaces import Outcome
from forebay.retry import Retry, RetryBudgets
from forebay.upstream.call_flow import Acquire, AttemptResult, ReadClock, Release, Send, Sleep, Step, call_flow
from forebay.upstream.call_request import CallOutcome, CallRequest, Permit
from forebay.upstream.shared_account import SharedAccount

_GONE = CallOutcome(kind=Outcome.IGNORED)  # bytes may have left: money and tokens settle at the reservation


class UpstreamRetries:
    """How the calls of an upstream are tried again, and how often all of them together.

    Args:
        retry: how one call is.
        draw: a source of draws from [0, 1).
    """

    __slots__ = ("budgets", "draw", "lock", "retry")

    def __init__(self, retry: Retry, *, draw: Callable[[], float]) -> None:
        self.retry = retry
        self.budgets = RetryBudgets()
        self.draw = draw
        self.lock = threading.Lock()  # of the budgets: calls come from many threads


class CallDriver:
    """Tries one call, on an event loop or in a plain thread.

    Nearly all succeed at once, so the first attempt is made by the way, and only what follows it is scripted: a
    generator and an object for each step cost some 25 us a call.

    Args:
        desk: where permits are had.
        retries: how it is tried again.
        hurries: whether a call that was answered *not now* goes elsewhere at once; None where there is nowhere else,
            and so what it meets here is what its run meets.
    """

    __slots__ = ("_alone", "_desk", "_hurries", "_retries")

    def __init__(
        self, desk: SharedAccount, retries: UpstreamRetries, hurries: Callable[[], bool] | None = None
    ) -> None:
        self._desk = desk
        self._retries = retries
        self._hurries = hurries
        self._alone = hurries is None

    async def run(self, ask: CallRequest, attempt: Callable[[Permit], Awaitable[AttemptResult]]) -> Any:
        """Try a call on an event loop. `attempt` raises only what is not the upstream's: a cancellation, say.

        Raises:
            Overloaded: it was refused. Whatever the last attempt failed by.
        """
        return unwrap_result(await self.drive(ask, attempt))

    def run_blocking(self, ask: CallRequest, attempt: Callable[[Permit], AttemptResult]) -> Any:
        """As `run`, in a plain thread."""
        return unwrap_result(self.drive_blocking(ask, attempt))

    async def drive(self, ask: CallRequest, attempt: Callable[[Permit], Awaitable[AttemptResult]]) -> AttemptResult:
        """As `run`, to what the last attempt came to.

        Raises:
            Overloaded: it was refused.
        """
        self._begin()
        permit = await self._desk.acquire(ask, sole_account=self._alone)
        tried = await self._made(permit, attempt)
        if self._is_last(permit, tried):
            return tried
        steps = self._script(ask, permit, tried)
        try:
            return await self._follow(steps, attempt)
        finally:
            self._end(steps)

    def drive_blocking(self, ask: CallRequest, attempt: Callable[[Permit], AttemptResult]) -> AttemptResult:
        """As `drive`, in a plain thread."""
        self._begin()
        permit = self._desk.acquire_blocking(ask, sole_account=self._alone)
        tried = self._made_blocking(permit, attempt)
        if self._is_last(permit, tried):
            return tried
        steps = self._script(ask, permit, tried)
        try:
            return self._follow_blocking(steps, attempt)
        finally:
            self._end(steps)

    async def _follow(
        self, steps: Generator[Step, Any, AttemptResult], attempt: Callable[[Permit], Awaitable[AttemptResult]]
    ) -> AttemptResult:
        given: Any = None
        while True:
            try:
                step = self._next(steps, given)
            except StopIteration as end:
                return _tried(end)
            given = None
            if isinstance(step, Acquire):
                given = await self._desk.acquire(step.request, sole_account=self._alone)
            elif isinstance(step, Send):
                given = await self._made(step.permit, attempt)
            elif isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
            else:
                given = self._at_once(step)

    def _follow_blocking(
        self, steps: Generator[Step, Any, AttemptResult], attempt: Callable[[Permit], AttemptResult]
    ) -> AttemptResult:
        given: Any = None
        while True:
            try:
                step = self._next(steps, given)
            except StopIteration as end:
                return _tried(end)
            given = None
            if isinstance(step, Acquire):
                given = self._desk.acquire_blocking(step.request, sole_account=self._alone)
            elif isinstance(step, Send):
                given = self._made_blocking(step.permit, attempt)
            elif isinstance(step, Sleep):
                threading.Event().wait(step.seconds)
            else:
                given = self._at_once(step)

    async def _made(self, permit: Permit, attempt: Callable[[Permit], Awaitable[AttemptResult]]) -> AttemptResult:
        try:
            return await attempt(permit)
        except BaseException:
            self._let_go(permit)
            raise

    def _made_blocking(self, permit: Permit, attempt: Callable[[Permit], AttemptResult]) -> AttemptResult:
        try:
            return attempt(permit)
        except BaseException:
            self._let_go(permit)
            raise

    def _begin(self) -> None:
        now = clock.now()
        with self._retries.lock:
            self._retries.budgets.deposit(now)

    def _is_last(self, permit: Permit, tried: AttemptResult) -> bool:
        """Whether nothing can follow a first attempt. Its permit is closed then, unless its answer is still coming."""
        if tried.streaming or tried.outcome.kind is Outcome.SUCCESS:
            with self._retries.lock:
                self._retries.budgets.record_accepted(permit.granted_at)
        if tried.streaming:
            return True
        if tried.retryable:
            return False
        self._desk.settle(permit, tried.outcome)
        return True

    def _script(self, ask: CallRequest, permit: Permit, tried: AttemptResult) -> Generator[Step, Any, AttemptResult]:
        retries = self._retries
        return call_flow(ask, permit, tried, retry=retries.retry, budgets=retries.budgets, hurries=self._hurries)

    def _next(self, steps: Generator[Step, Any, AttemptResult], given: Any) -> Step:
        with self._retries.lock:
            return steps.send(given)

    def _end(self, steps: Generator[Step, Any, AttemptResult]) -> None:
        """Close a script, at its end or before."""
        with self._retries.lock:
            steps.close()

    def _at_once(self, step: Step) -> Any:
        if isinstance(step, Release):
            self._desk.settle(step.permit, step.outcome)
            return None
        assert isinstance(step, ReadClock)  # noqa: S101 - all others take time
        return clock.now(), self._retries.draw()

    def _let_go(self, permit: Permit) -> None:
        if not permit.closed:
            self._desk.settle(permit, _GONE)


def unwrap_result(tried: AttemptResult) -> Any:
    """What the caller gets of the last attempt; the run that is under way hears of a fault.

    Raises:
        Exception: what it failed by.
    """
    if tried.outcome.kind is Outcome.FAULT and (run := context.call_observer()) is not None:
        run.record_upstream_fault()
    if tried.error is not None:
        raise tried.error
    return tried.value


def _tried(end: StopIteration) -> AttemptResult:
    tried: AttemptResult = end.value
    return tried
