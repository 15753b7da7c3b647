"""A call made by hand: a permit for as long as a block runs, in a coroutine or in a plain thread."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from forebay import clock
from forebay.errors import CallMisused, InvalidAmount, Overloaded
from forebay.quota import check_dollars
from forebay.typing import Charge, Outcome
from forebay.upstream.ask import Ask, Ended, Permit
from forebay.upstream.attempt import Tried
from forebay.upstream.desk import Desk
from forebay.upstream.journey import Bare, Journey, journey_of, travel, travel_blocking
from forebay.upstream.stops import Stop

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream


class UpstreamCall:
    """One call through an upstream, as an async or a plain context manager.

    Left without an error it is a success, left by an exception a fault, unless `overloaded` or `ignored` was called.
    A cancellation says nothing of the upstream.

    Attributes:
        upstream: where to send it: the upstream that was asked, or once entered the one that a fallback led to.
        model: which model to ask there.

    Args:
        upstream: through which it goes.
        model: whose account it is of.
        ask: what it asks of the account of a model, of whatever upstream.
    """

    def __init__(self, upstream: Upstream, model: str, ask: Callable[[Upstream, str], Ask]) -> None:
        self.upstream = upstream
        self.model = model
        self._desk: Desk = upstream.books.desk(model)
        self._make = ask
        self._ask = ask(upstream, model)
        self._permit: Permit | None = None
        self._entered = False
        self._used: Charge | None = None
        self._usd: float | None = None
        self._outcome: Outcome | None = None

    async def __aenter__(self) -> Self:
        self._enter_once()
        if (journey := self._journey()) is None:
            self._permit = await self._desk.enter(self._ask)
        else:
            await travel(journey, self._enter)
        return self

    def __enter__(self) -> Self:
        self._enter_once()
        if (journey := self._journey()) is None:
            self._permit = self._desk.enter_blocking(self._ask)
        else:
            travel_blocking(journey, self._enter_blocking)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(cause)

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(cause)

    def settle(self, *, input_tokens: int, output_tokens: int, usd: float | None = None) -> None:
        """Say what it used; the last word counts. `usd`: what it cost, where the price table does not know.

        Raises:
            InvalidAmount: that is no sum of money; what was said before still counts.
        """
        cost = None if usd is None else check_dollars(usd)
        self._used = Charge(input_tokens=input_tokens, output_tokens=output_tokens, tokens=input_tokens + output_tokens)
        self._usd = self.upstream.dollars(self.model, self._used) if cost is None else cost

    def overloaded(self) -> None:
        """Say that it was refused for congestion: fewer will be let through for a while."""
        self._outcome = Outcome.OVERLOAD

    def ignored(self) -> None:
        """Say that how it ends says nothing of the upstream: a request of ours that was wrong, for example."""
        self._outcome = Outcome.IGNORED

    def _journey(self) -> Journey[Bare] | None:
        if not self.upstream.fallbacks:
            return None
        return journey_of(Bare(self.upstream, self._desk, self._ask), self._elsewhere)

    def _elsewhere(self, stop: Stop, desk: Desk) -> Bare:
        return Bare(stop.upstream, desk, self._make(stop.upstream, stop.model))

    async def _enter(self, leg: Bare) -> Tried:
        return self._taken(leg, await leg.desk.enter(leg.ask, alone=False))

    def _enter_blocking(self, leg: Bare) -> Tried:
        return self._taken(leg, leg.desk.enter_blocking(leg.ask, alone=False))

    def _taken(self, leg: Bare, permit: Permit) -> Tried:
        self.upstream, self.model, self._desk, self._permit = leg.upstream, leg.ask.model, leg.desk, permit
        return Tried(ended=Ended(outcome=Outcome.SUCCESS), open=True)

    def _enter_once(self) -> None:
        if self._entered:
            raise CallMisused
        self._entered = True  # at once: two may try while the first waits

    def _leave(self, cause: BaseException | None) -> None:
        permit = self._permit
        assert permit is not None  # noqa: S101 - entered
        outcome = self._outcome
        if outcome is None:
            if cause is None:
                outcome = Outcome.SUCCESS
            else:
                fault = isinstance(cause, Exception) and not isinstance(cause, (Overloaded, InvalidAmount))
                outcome = Outcome.FAULT if fault else Outcome.IGNORED
        seconds = clock.now() - permit.at
        tokens = self._used.output_tokens if self._used is not None else 0
        ended = Ended(outcome=outcome, used=self._used, usd=self._usd, seconds=seconds, made=tokens)
        self._desk.settle(permit, ended)
