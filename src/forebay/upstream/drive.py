"""Driving the script of a call: on an event loop, or in a plain thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from forebay import clock, context
from forebay.retry import Retry, RetryBudgets
from forebay.typing import Outcome
from forebay.upstream.ask import Ask, Ended, Permit
from forebay.upstream.attempt import Enter, Moment, Settle, Sleep, Step, Tried, Try, script
from forebay.upstream.desk import Desk

_GONE = Ended(outcome=Outcome.IGNORED)  # bytes may have left: money and tokens settle at the reservation


class Driver:
    """What is the same for both ways: the desk, the retries, and what is left to chance.

    Args:
        desk: where permits are had.
        retry: how a call is tried again.
        budgets: whether it may be.
        draw: a source of draws from [0, 1).
        hurries: whether a call that was answered *not now* goes elsewhere at once; None where there is nowhere else,
            and so what it meets here is what its run meets.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        retry: Retry,
        budgets: RetryBudgets,
        draw: Callable[[], float],
        hurries: Callable[[], bool] | None = None,
    ) -> None:
        self._desk = desk
        self._hurries = hurries
        self._alone = hurries is None
        self._retry = retry
        self._budgets = budgets
        self._draw = draw
        self._lock = threading.Lock()

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
        steps = script(ask, self._retry, self._budgets, self._hurries)
        given: Any = None
        thrown: BaseException | None = None
        while True:
            try:
                step: Step = steps.send(given) if thrown is None else steps.throw(thrown)
            except StopIteration as end:
                return _tried(end)
            given = thrown = None
            if isinstance(step, Enter):
                given = await self._desk.enter(step.ask, alone=self._alone)
            elif isinstance(step, Try):
                try:
                    given = await attempt(step.permit)
                except BaseException:
                    self._let_go(step.permit)
                    raise
            elif isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
            else:
                given = self._at_once(step)

    def drive_blocking(self, ask: Ask, attempt: Callable[[Permit], Tried]) -> Tried:
        """As `drive`, in a plain thread."""
        steps = script(ask, self._retry, self._budgets, self._hurries)
        given: Any = None
        while True:
            try:
                step: Step = steps.send(given)
            except StopIteration as end:
                return _tried(end)
            given = None
            if isinstance(step, Enter):
                given = self._desk.enter_blocking(step.ask, alone=self._alone)
            elif isinstance(step, Try):
                try:
                    given = attempt(step.permit)
                except BaseException:
                    self._let_go(step.permit)
                    raise
            elif isinstance(step, Sleep):
                threading.Event().wait(step.seconds)
            else:
                given = self._at_once(step)

    def _at_once(self, step: Step) -> Any:
        if isinstance(step, Settle):
            self._desk.settle(step.permit, step.ended)
            return None
        assert isinstance(step, Moment)  # noqa: S101 - all others take time
        return clock.now(), self._draw()

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
