"""Driving the script of a call: on an event loop, or in a plain thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from forebay import clock, context
from forebay.retry import Retry, RetryBudgets
from forebay.typing import Outcome
from forebay.upstream.ask import Ask, Ended, Permit
from forebay.upstream.attempt import Enter, Moment, Settle, Sleep, Step, Tried, Try, script
from forebay.upstream.desk import Desk

_GONE = Ended(outcome=Outcome.IGNORED)  # bytes may have left: money and tokens settle at the reservation


class Retries:
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


class Driver:
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

    def __init__(self, desk: Desk, retries: Retries, hurries: Callable[[], bool] | None = None) -> None:
        self._desk = desk
        self._retries = retries
        self._hurries = hurries
        self._alone = hurries is None

    async def run(self, ask: Ask, attempt: Callable[[Permit], Awaitable[Tried]]) -> Any:
        """Try a call on an event loop. `attempt` raises only what is not the upstream's: a cancellation, say.

        Raises:
            Overloaded: it was refused. Whatever the last attempt failed by.
        """
        return conclude(await self.drive(ask, attempt))

    def run_blocking(self, ask: Ask, attempt: Callable[[Permit], Tried]) -> Any:
        """As `run`, in a plain thread."""
        return conclude(self.drive_blocking(ask, attempt))

    async def drive(self, ask: Ask, attempt: Callable[[Permit], Awaitable[Tried]]) -> Tried:
        """As `run`, to what the last attempt came to.

        Raises:
            Overloaded: it was refused.
        """
        self._begin()
        permit = await self._desk.enter(ask, alone=self._alone)
        tried = await self._made(permit, attempt)
        if self._is_last(permit, tried):
            return tried
        steps = self._script(ask, permit, tried)
        try:
            return await self._follow(steps, attempt)
        finally:
            self._end(steps)

    def drive_blocking(self, ask: Ask, attempt: Callable[[Permit], Tried]) -> Tried:
        """As `drive`, in a plain thread."""
        self._begin()
        permit = self._desk.enter_blocking(ask, alone=self._alone)
        tried = self._made_blocking(permit, attempt)
        if self._is_last(permit, tried):
            return tried
        steps = self._script(ask, permit, tried)
        try:
            return self._follow_blocking(steps, attempt)
        finally:
            self._end(steps)

    async def _follow(self, steps: Generator[Step, Any, Tried], attempt: Callable[[Permit], Awaitable[Tried]]) -> Tried:
        given: Any = None
        while True:
            try:
                step = self._next(steps, given)
            except StopIteration as end:
                return _tried(end)
            given = None
            if isinstance(step, Enter):
                given = await self._desk.enter(step.ask, alone=self._alone)
            elif isinstance(step, Try):
                given = await self._made(step.permit, attempt)
            elif isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
            else:
                given = self._at_once(step)

    def _follow_blocking(self, steps: Generator[Step, Any, Tried], attempt: Callable[[Permit], Tried]) -> Tried:
        given: Any = None
        while True:
            try:
                step = self._next(steps, given)
            except StopIteration as end:
                return _tried(end)
            given = None
            if isinstance(step, Enter):
                given = self._desk.enter_blocking(step.ask, alone=self._alone)
            elif isinstance(step, Try):
                given = self._made_blocking(step.permit, attempt)
            elif isinstance(step, Sleep):
                threading.Event().wait(step.seconds)
            else:
                given = self._at_once(step)

    async def _made(self, permit: Permit, attempt: Callable[[Permit], Awaitable[Tried]]) -> Tried:
        try:
            return await attempt(permit)
        except BaseException:
            self._let_go(permit)
            raise

    def _made_blocking(self, permit: Permit, attempt: Callable[[Permit], Tried]) -> Tried:
        try:
            return attempt(permit)
        except BaseException:
            self._let_go(permit)
            raise

    def _begin(self) -> None:
        now = clock.now()
        with self._retries.lock:
            self._retries.budgets.deposit(now)

    def _is_last(self, permit: Permit, tried: Tried) -> bool:
        """Whether nothing can follow a first attempt. Its permit is closed then, unless its answer is still coming."""
        if tried.open or tried.ended.outcome is Outcome.SUCCESS:
            with self._retries.lock:
                self._retries.budgets.let_in(permit.at)
        if tried.open:
            return True
        if tried.again:
            return False
        self._desk.settle(permit, tried.ended)
        return True

    def _script(self, ask: Ask, permit: Permit, tried: Tried) -> Generator[Step, Any, Tried]:
        retries = self._retries
        return script(ask, permit, tried, retry=retries.retry, budgets=retries.budgets, hurries=self._hurries)

    def _next(self, steps: Generator[Step, Any, Tried], given: Any) -> Step:
        with self._retries.lock:
            return steps.send(given)

    def _end(self, steps: Generator[Step, Any, Tried]) -> None:
        """Close a script, at its end or before."""
        with self._retries.lock:
            steps.close()

    def _at_once(self, step: Step) -> Any:
        if isinstance(step, Settle):
            self._desk.settle(step.permit, step.ended)
            return None
        assert isinstance(step, Moment)  # noqa: S101 - all others take time
        return clock.now(), self._retries.draw()

    def _let_go(self, permit: Permit) -> None:
        if not permit.closed:
            self._desk.settle(permit, _GONE)


def conclude(tried: Tried) -> Any:
    """What the caller gets of the last attempt; the run that is under way hears of a fault.

    Raises:
        Exception: what it failed by.
    """
    if tried.ended.outcome is Outcome.FAULT and (run := context.drawing()) is not None:
        run.let_down()
    if tried.error is not None:
        raise tried.error
    return tried.value


def _tried(end: StopIteration) -> Tried:
    tried: Tried = end.value
    return tried
