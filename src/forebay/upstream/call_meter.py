"""The meter of one HTTP call: what it may use and cost before it is sent, and what it has used and cost."""

from __future__ import annotations

from typing import TypeAlias

from forebay import clock
from forebay.interfaces import Outcome, RateLimitHeaders
from forebay.quota import BilledUsage
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.accounts.token_estimates import TokenEstimates
from forebay.upstream.call_request import TOKENS_PER_SECOND, Caller, CallOutcome, CallPrice, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.metered_stream import StreamEnd
from forebay.upstream.providers import (
    Billing,
    BodyMeter,
    Endpoint,
    ProviderRequest,
    Usage,
    UsageMeter,
    WholeResponse,
    find_unpriced,
    find_unreadable,
)
from forebay.upstream.stored_responses import BackgroundResponse

StreamMeter: TypeAlias = UsageMeter | BodyMeter
ReadAnswer: TypeAlias = WholeResponse | StreamMeter
"""An answer as far as it was read: both name the model and the id of the response."""


class CallMeter:
    """The meter of one call, for all its attempts.

    Args:
        core: of the upstream that it is sent through.
        account: that it uses.
        parsed: the request.
        body: of the request, as its caller sent it.
        caller: a caller in another process, who may have rates and budgets of its own; or None.

    Attributes:
        charge: requests and tokens that it is expected to use.
        price: dollars that it is expected to cost at most, or why it cannot be metered.
    """

    __slots__ = ("_budgeted", "_core", "_metered", "_parsed", "_priced", "_sent_tokens", "charge", "price")

    def __init__(
        self,
        core: UpstreamCore,
        account: ThreadSafeAccount,
        parsed: ProviderRequest,
        body: bytes,
        caller: Caller | None = None,
    ) -> None:
        self._core = core
        self._parsed = parsed
        self._metered = core.is_metered or (caller is not None and caller.metered)
        self._budgeted = core.budgets.has_budgets or (caller is not None and bool(caller.budgets))
        self._priced = self._budgeted or core.budgets.counts_dollars
        estimates = account.token_estimates
        self.charge = core.profile.estimate_charge(
            parsed, output_tokens=estimates.output_tokens, input_ratio=estimates.input_ratio
        )
        self._sent_tokens = self.charge.input_tokens
        self.price = self._price(body, estimates) if self._metered or self._priced else CallPrice()
        if not parsed.free and core.settings.has_strict_quota(parsed.model or ""):
            self._reserve_most(estimates)

    def _reserve_most(self, estimates: TokenEstimates) -> None:
        """Reserve the most that the call may use, for strict quotas; reject it if that is not known."""
        core, parsed = self._core, self._parsed
        self.charge = core.profile.charge_at_most(
            self.charge,
            parsed,
            input_ratio=estimates.input_ratio,
            continued_tokens=core.stored_tokens.get(parsed.previous_response_id),
        )
        if self.price.unmetered is not None:
            return
        if parsed.generates_tokens and parsed.max_output_tokens is None:
            field = "max_output_tokens" if parsed.endpoint is Endpoint.RESPONSES else "max_tokens"
            advice = f"set {field}, or leave strict out of the quota, which then reserves what is expected"
            self.price = core.unbounded_call("it does not say how much output it may make", advice)
        elif parsed.billing is Billing.UNPRICED and core.settings.unmetered == "reject":
            advice = "send it through an upstream without strict quotas, or with unmetered='allow', as one request"
            self.price = core.unbounded_call(f"its tokens are not known ({parsed.billing_reason})", advice)

    def _price(self, body: bytes, estimates: TokenEstimates) -> CallPrice:
        """Return the price of the request, or why it cannot be metered."""
        core, parsed = self._core, self._parsed
        model = parsed.model or ""
        unreadable = find_unreadable(parsed, body)
        if unreadable and self._metered and (price := core.unreadable_call(unreadable)) is not None:
            return price
        if parsed.free or not self._priced:
            return CallPrice()
        if unreadable:  # and such calls pass
            return core.unpriced_call(unreadable, model, allow=True)
        if unpriced := find_unpriced(parsed):
            return core.unpriced_call(unpriced, model, allow=not self._budgeted)
        usage = core.profile.estimate_usage(
            parsed,
            largest_output=estimates.largest_output(clock.now()),
            input_ratio=estimates.input_ratio,
            continued_tokens=core.stored_tokens.get(parsed.previous_response_id),
        )
        self._sent_tokens = max(self._sent_tokens, usage.input_tokens)
        tokens = TOKENS_PER_SECOND * parsed.choices
        price = core.price(
            model,
            usage,
            alternatives=parsed.alternatives,
            per_second=BilledUsage(output_tokens=tokens, tier=parsed.tier) if parsed.generates_tokens else None,
            budgeted=self._budgeted,
        )
        return price._replace(bounded=not parsed.generates_tokens or parsed.max_output_tokens is not None)

    def stream_meter(self, *, events: bool) -> StreamMeter:
        """Return a meter for an answer that streams, as events or as the bytes of one response."""
        return UsageMeter(input_tokens=self._sent_tokens) if events else BodyMeter()

    def stream_usage(self, permit: Permit, meter: StreamMeter, end: StreamEnd) -> Usage | None:
        """Return the usage of a streaming answer; None for as much as was reserved.

        A complete answer that reports none counts as it was reserved: the text does not show hidden reasoning, which
        may have been billed. Of one that broke off, or that was left, the output that arrived is counted, and what may
        have been made while none arrived: a model can think for long before its first word, and later. In the
        background it goes on.
        """
        usage = meter.usage
        if usage is not None and not usage.estimated:
            return usage
        parsed = self._parsed
        if parsed.background or not parsed.generates_tokens or not end.readable or isinstance(meter, BodyMeter):
            return None
        if meter.complete and self._metered:
            return None
        if end.ended and meter.complete:
            return usage
        output_at = clock.now() if end.output_at is None else end.output_at
        seconds = max(0.0, output_at - permit.granted_at) + end.silent
        hidden = int(TOKENS_PER_SECOND * parsed.choices * seconds)
        bound = None if parsed.max_output_tokens is None else parsed.max_output_tokens * parsed.choices
        return meter.unfinished_usage(hidden, bound)

    def outcome(
        self,
        permit: Permit,
        kind: Outcome,
        usage: Usage | None,
        answer: ReadAnswer | None = None,
        rate_limit_headers: tuple[RateLimitHeaders, ...] = (),
    ) -> CallOutcome:
        """Return the outcome of an answered attempt, with its usage and cost.

        Args:
            permit: of the attempt.
            kind: the evidence about the provider.
            usage: None for as much as was reserved.
            answer: that has the usage; None for one that is not read.
            rate_limit_headers: of the answer, unless the account has got them already.
        """
        latency = clock.now() - permit.granted_at
        model = "" if answer is None else answer.model or ""
        if answer is not None and answer.response_id is not None:
            self._remember(permit, answer.response_id, usage)
        if usage is None:
            return CallOutcome(kind=kind, latency=latency, rate_limit_headers=rate_limit_headers)
        if self._parsed.free:  # it fetches an answer, which took its tokens when it was made
            if self._parsed.response_id is not None:
                self._correct_background(self._parsed.response_id, usage, answered_by=model)
            return CallOutcome(kind=kind, latency=latency, rate_limit_headers=rate_limit_headers)
        reported = kind is Outcome.SUCCESS and not usage.estimated
        arrived = answer.output_tokens if usage.estimated and isinstance(answer, UsageMeter) else None
        return CallOutcome(
            kind=kind,
            used=self._core.profile.final_charge(self.charge, usage, arrived=arrived),
            usd=self._cost(usage, answer),
            latency=latency,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            estimated_input_tokens=self._parsed.input_tokens if reported else None,
            rate_limit_headers=rate_limit_headers,
            usage=usage,
            reported=not usage.estimated,
        )

    def _cost(self, usage: Usage, answer: ReadAnswer | None) -> float | None:
        """Return the dollars of a usage; None for as many as were reserved."""
        core, parsed = self._core, self._parsed
        usd = core.cost(
            parsed.model or "",
            usage.billed(tier=parsed.tier, web_searches=parsed.searches),
            answered_by=(answer.model if answer is not None else None) or "",
            alternatives=parsed.alternatives,
        )
        if usd is None and self.price.usd:
            core.count_unpriced(parsed.model or "")
        if usd is not None and answer is not None and not answer.whole:
            return max(usd, self.price.usd)
        return usd

    def _remember(self, permit: Permit, response_id: str, usage: Usage | None) -> None:
        """Remember a stored response: its length, for calls that continue it, or that its usage comes later."""
        core, parsed = self._core, self._parsed
        if parsed.endpoint is not Endpoint.RESPONSES:
            return
        if usage is not None and not usage.estimated:
            core.stored_tokens.add(response_id, usage.input_tokens + usage.output_tokens)
        elif parsed.background:
            core.background.add(response_id, BackgroundResponse(parsed.model or "", parsed.tier, permit))

    def _correct_background(self, response_id: str, usage: Usage, *, answered_by: str) -> None:
        """Replace the dollars counted for a response in the background by those of its usage."""
        response = self._core.background.pop(response_id)
        if response is None:
            return
        usd = self._core.cost(response.model, usage.billed(tier=response.tier), answered_by=answered_by)
        if usd is not None:
            if response.permit.record is not None:
                response.permit.record.revise(usd, input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
            for counted in response.permit.spend:
                counted.revise(usd)
        self._core.recorder.correct(response.permit, usage, usd)
        self._core.stored_tokens.add(response_id, usage.input_tokens + usage.output_tokens)
