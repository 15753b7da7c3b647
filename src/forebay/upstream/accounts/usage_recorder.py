"""UsageRecorder: reports what calls have used, to the runs that make them and to the table of their upstream."""

from __future__ import annotations

from forebay.call_usage import CALL_BEGINS, CALL_ENDS, CallUsage
from forebay.interfaces import Outcome
from forebay.quota import BilledUsage, Prices
from forebay.upstream.call_request import CallOutcome, CountedUsage, Permit
from forebay.upstream.usage_table import UsageLabels, UsageTable


class UsageRecorder:
    """The one place where the usage of calls is attributed: to the task that makes them, and to tenant, model and keys.

    Args:
        provider: of the upstream.
        prices: of its models; calls are priced whether or not they have a budget.

    Attributes:
        table: the usage of all calls so far.
    """

    def __init__(self, provider: str, prices: Prices) -> None:
        self._provider = provider
        self._prices = prices
        self.table = UsageTable()

    def begin(self, permit: Permit) -> None:
        """Note that a call begins; each permit that has begun ends once."""
        if (payer := permit.request.payer) is not None:
            payer.record_usage(CALL_BEGINS)

    def end(self, permit: Permit, outcome: CallOutcome, usd: float, *, api_key: str) -> None:
        """Record the usage of a call that has ended.

        Args:
            permit: of the call.
            outcome: how it ended.
            usd: dollars that were counted in its budgets, or would have been.
            api_key: the API key of its account, as it is shown.
        """
        request = permit.request
        usage = None if request.free else self._usage(permit, outcome, usd)
        if usage is not None:
            labels = UsageLabels(request.tenant, request.model, request.key_name, api_key)
            permit.counted = CountedUsage(labels, usage)
            self.table.add(labels, usage)
        if request.payer is not None:
            charged = bool(permit.spend) and (usd > 0 or outcome.kind is Outcome.SUCCESS)  # a refusal tells nothing
            request.payer.record_usage(_ended(usage), usd=usd if charged else None)

    def correct(self, permit: Permit, usage: BilledUsage, usd: float | None) -> None:
        """Replace the usage of a call that has ended by the one that its provider reported later.

        Args:
            permit: of the call.
            usage: as reported.
            usd: dollars that it costs; None if no price is known.
        """
        counted = permit.counted
        if counted is None:
            return
        before = counted.usage
        after = _reported(usage, before.usd if usd is None else usd, unpriced=usd is None)
        permit.counted = CountedUsage(counted.labels, after)
        change = after - before
        self.table.add(counted.labels, change)
        if permit.request.payer is not None:
            permit.request.payer.record_usage(change)

    def _usage(self, permit: Permit, outcome: CallOutcome, usd: float) -> CallUsage | None:
        """Return the usage of a call that has ended; None if it took nothing from its provider."""
        if outcome.usage is not None:
            return _reported(outcome.usage, usd, unpriced=outcome.usd is None, estimated=not outcome.reported)
        if outcome.released or outcome.rate_limited:
            return None
        request, used = permit.request, outcome.used
        charge = request.charge if used is None else used
        if outcome.kind is not Outcome.SUCCESS and used is not None and not (usd or charge.tokens):
            return None  # it was refused
        is_of_model = bool(request.model or charge.input_tokens or charge.output_tokens)  # and no guarded function
        unpriced = outcome.usd is None and not request.usd
        if unpriced and request.model:  # nothing was reserved, since there is no budget, or no price
            units = BilledUsage(input_tokens=charge.input_tokens, output_tokens=charge.output_tokens)
            price = self._prices.cost(self._provider, request.model, units)
            usd, unpriced = price or 0.0, price is None
        return CallUsage(
            calls=1,
            input_tokens=charge.input_tokens,
            output_tokens=charge.output_tokens,
            usd=usd,
            unreported=int(is_of_model and used is None),
            unpriced=int(is_of_model and unpriced),
        )


def _reported(usage: BilledUsage, usd: float, *, unpriced: bool, estimated: bool = False) -> CallUsage:
    return CallUsage(
        calls=1,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        usd=usd,
        unreported=int(estimated),
        unpriced=int(unpriced),
    )


def _ended(usage: CallUsage | None) -> CallUsage:
    """Return the usage of a call, with what takes back its beginning."""
    return CALL_ENDS if usage is None else usage + CALL_ENDS
