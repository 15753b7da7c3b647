"""A call made by hand: a permit for as long as a block runs, in a coroutine or in a plain thread."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from forebay import clock
from forebay._validate import check_tokens
from forebay.errors import CallMisused
from forebay.interfaces import Charge, Outcome
from forebay.quota import BilledUsage, check_dollars
from forebay.upstream.accounts.nested_calls import begin_hold, end_hold
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.call_request import AttemptResult, CallOutcome, CallRequest, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.failed_attempts import judge_exception
from forebay.upstream.fallbacks.fallback import FallbackTarget
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

_PERMITTED = CallOutcome(kind=Outcome.SUCCESS)  # for the flow; the block settles the real outcome


class UpstreamCall:
    """One call through an upstream, as an async or a plain context manager.

    Leaving the block is a success. Leaving it by an exception that reports an answer counts as that answer (429 as
    throttled, 400 as the caller's mistake), by a timeout as `ThreadSafeAccount.judge_timeout` says, and by any other as
    a fault, unless `overloaded` or `ignored` was called. A cancellation says nothing about the upstream.

    Attributes:
        upstream: the upstream to send the call to; inside the block it may be that of a fallback.
        model: the model to call there.

    Args:
        upstream: the call's own upstream.
        runner: runs its calls.
        model: the model of the call.
        request_at: returns the needs of the call, by upstream and model.
    """

    def __init__(
        self,
        upstream: FallbackTarget,
        runner: CallRunner,
        model: str,
        request_at: Callable[[UpstreamCore, str], CallRequest],
    ) -> None:
        self.upstream = upstream
        self.model = model
        self._runner = runner
        self._request_at = request_at
        self._account = upstream.core.accounts.account(model)
        self._permit: Permit | None = None
        self._entered = False
        self._used: Charge | None = None
        self._usd: float | None = None
        self._kind: Outcome | None = None

    async def __aenter__(self) -> Self:
        self._enter_once()
        await self._runner.load_prices()
        await self._runner.run(self._route(), self._permitted, retried=False)
        return self

    def __enter__(self) -> Self:
        self._enter_once()
        self._runner.run_blocking(self._route(), self._permitted_blocking, retried=False)
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
        """Report the usage of the call; the last report counts.

        Args:
            input_tokens: tokens that it sent.
            output_tokens: tokens that it received.
            usd: dollars that it cost; None to look up the price of its model.

        Raises:
            InvalidAmount: `usd` is not an amount of money; the report before still counts.
            InvalidSetting: a number of tokens is invalid; the report before still counts.
        """
        sent, received = check_tokens("settle", input_tokens, output_tokens)
        usage = BilledUsage(input_tokens=sent, output_tokens=received)
        cost = self.upstream.core.cost(self.model, usage) if usd is None else check_dollars(usd)
        self._used = Charge(input_tokens=sent, output_tokens=received, tokens=sent + received)
        self._usd = cost

    def overloaded(self) -> None:
        """Report that the provider throttled the call for congestion: fewer calls are sent for a while."""
        self._kind = Outcome.OVERLOAD

    def ignored(self) -> None:
        """Report that the call's end says nothing about the upstream, for example because the request was wrong."""
        self._kind = Outcome.IGNORED

    def _enter_once(self) -> None:
        if self._entered:
            raise CallMisused
        self._entered = True  # at once: a second caller may try while the first waits

    def _route(self) -> PlainRoute:
        request = self._request_at(self.upstream.core, self.model)
        return PlainRoute(self.upstream, self._account, request, self._request_at)

    async def _permitted(self, route: PlainRoute, permit: Permit) -> AttemptResult:
        return self._permitted_blocking(route, permit)

    def _permitted_blocking(self, route: PlainRoute, permit: Permit) -> AttemptResult:
        """Keep a permit for the block, which releases it."""
        self.upstream, self.model = route.upstream, route.call_request.model
        self._account, self._permit = route.account, permit
        begin_hold(permit)
        return AttemptResult(outcome=_PERMITTED, streaming=True)

    def _leave(self, cause: BaseException | None) -> None:
        permit = self._permit
        assert permit is not None  # noqa: S101 - entered
        end_hold(permit)
        account = self._account
        if self._kind is None and isinstance(cause, Exception):
            outcome = judge_exception(account, permit, cause).outcome
        else:
            kind = self._kind or (Outcome.SUCCESS if cause is None else Outcome.IGNORED)
            answered = cause is None or self._kind is not None  # else the block was cancelled
            outcome = CallOutcome(kind=kind, answered=answered, latency=clock.now() - permit.granted_at)
            if kind is Outcome.OVERLOAD:  # it was refused: no tokens were used
                outcome = msgspec.structs.replace(outcome, used=Charge(), usd=0.0)
        if self._used is not None:  # the block knows better than an exception
            tokens = self._used.output_tokens
            outcome = msgspec.structs.replace(outcome, used=self._used, usd=self._usd, output_tokens=tokens)
        account.settle(permit, outcome)
