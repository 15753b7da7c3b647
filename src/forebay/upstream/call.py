"""A call made by hand: a permit for as long as a block runs, in a coroutine or in a plain thread."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from forebay import clock
from forebay.errors import CallMisused, InvalidAmount, Overloaded
from forebay.interfaces import Charge, Outcome
from forebay.quota import check_dollars
from forebay.upstream.call_flow import AttemptResult
from forebay.upstream.call_request import CallOutcome, CallRequest, Permit
from forebay.upstream.fallback_chain import FallbackChain, PlainRoute, make_chain, run_chain, run_chain_blocking
from forebay.upstream.fallback_routes import FallbackRoute
from forebay.upstream.shared_account import SharedAccount

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

    def __init__(self, upstream: Upstream, model: str, ask: Callable[[Upstream, str], CallRequest]) -> None:
        self.upstream = upstream
        self.model = model
        self._desk: SharedAccount = upstream.accounts.account(model)
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
            self._permit = await self._desk.acquire(self._ask)
        else:
            await run_chain(journey, self._enter)
        return self

    def __enter__(self) -> Self:
        self._enter_once()
        if (journey := self._journey()) is None:
            self._permit = self._desk.acquire_blocking(self._ask)
        else:
            run_chain_blocking(journey, self._enter_blocking)
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
        self._usd = self.upstream.cost(self.model, self._used) if cost is None else cost

    def overloaded(self) -> None:
        """Say that it was refused for congestion: fewer will be let through for a while."""
        self._outcome = Outcome.OVERLOAD

    def ignored(self) -> None:
        """Say that how it ends says nothing of the upstream: a request of ours that was wrong, for example."""
        self._outcome = Outcome.IGNORED

    def _journey(self) -> FallbackChain[PlainRoute] | None:
        if not self.upstream.fallbacks:
            return None
        return make_chain(PlainRoute(self.upstream, self._desk, self._ask), self._elsewhere)

    def _elsewhere(self, stop: FallbackRoute, desk: SharedAccount) -> PlainRoute:
        return PlainRoute(stop.upstream, desk, self._make(stop.upstream, stop.model))

    async def _enter(self, leg: PlainRoute) -> AttemptResult:
        return self._taken(leg, await leg.account.acquire(leg.call_request, sole_account=False))

    def _enter_blocking(self, leg: PlainRoute) -> AttemptResult:
        return self._taken(leg, leg.account.acquire_blocking(leg.call_request, sole_account=False))

    def _taken(self, leg: PlainRoute, permit: Permit) -> AttemptResult:
        self.upstream, self.model, self._desk, self._permit = leg.upstream, leg.call_request.model, leg.account, permit
        return AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS), streaming=True)

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
        seconds = clock.now() - permit.granted_at
        tokens = self._used.output_tokens if self._used is not None else 0
        ended = CallOutcome(kind=outcome, used=self._used, usd=self._usd, latency=seconds, output_tokens=tokens)
        self._desk.settle(permit, ended)
