"""A call made by hand: a permit for as long as a block runs, in a coroutine or in a plain thread."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from forebay import clock
from forebay.errors import CallMisused, InvalidAmount, Overloaded
from forebay.quota import check_dollars
from forebay.typing import Charge, Outcome
from forebay.upstream.ask import Ask, Ended, Permit
from forebay.upstream.desk import Desk


class UpstreamCall:
    """One call through an upstream, as an async or a plain context manager.

    Left without an error it is a success, left by an exception a fault, unless `overloaded` or `ignored` was called.
    A cancellation says nothing of the upstream.
    """

    def __init__(self, desk: Desk, ask: Ask, *, dollars: Callable[[Charge], float]) -> None:
        self._desk = desk
        self._ask = ask
        self._dollars = dollars
        self._permit: Permit | None = None
        self._entered = False
        self._used: Charge | None = None
        self._usd: float | None = None
        self._outcome: Outcome | None = None

    async def __aenter__(self) -> Self:
        self._enter_once()
        self._permit = await self._desk.enter(self._ask)
        return self

    def __enter__(self) -> Self:
        self._enter_once()
        self._permit = self._desk.enter_blocking(self._ask)
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
        self._usd = self._dollars(self._used) if cost is None else cost

    def overloaded(self) -> None:
        """Say that it was refused for congestion: fewer will be let through for a while."""
        self._outcome = Outcome.OVERLOAD

    def ignored(self) -> None:
        """Say that how it ends says nothing of the upstream: a request of ours that was wrong, for example."""
        self._outcome = Outcome.IGNORED

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
        stretch = self._desk.paced(tokens, seconds) if outcome is Outcome.SUCCESS else None
        ended = Ended(outcome=outcome, used=self._used, usd=self._usd, seconds=seconds, stretch=stretch)
        self._desk.settle(permit, ended)
