"""The data that calls and accounts exchange: requests, permits, decisions, outcomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from forebay.call_usage import CallUsage
from forebay.context import UsageObserver
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.limit import Grant
from forebay.quota import BilledUsage, QuotaReservation, RateScope
from forebay.task import DEFAULT_TENANT, Priority
from forebay.upstream.usage_table import UsageLabels

_REPEATED: Final = 2  # retries from which on a refusal may be due to what the call asks for
UNREADABLE: Final = "unreadable"
UNPRICED: Final = "unpriced"
UNBOUNDED: Final = "unbounded"
UNMETERED: Final = (UNREADABLE, UNPRICED, UNBOUNDED)
"""The values of ``limited_by`` of calls that a budget or a quota cannot count."""


class Unmetered(NamedTuple):
    """The reason why a call cannot be metered, for which it is rejected.

    Attributes:
        reason: for a person, with what to do.
        limited_by: ``"unreadable"``, ``"unpriced"`` or ``"unbounded"``.
    """

    reason: str
    limited_by: str


TOKENS_PER_SECOND: Final = 200  # of output: few models are faster


class CallPrice(NamedTuple):
    """The price of a call before it is sent.

    Attributes:
        usd: dollars that it is expected to cost at most.
        usd_per_second: dollars of the output that can be made in one second.
        usd_at_once: the part of `usd` that it costs however soon it is left: what it sends, and searches.
        bounded: it bounds its output, so that it costs no more than `usd` however long it takes.
        unmetered: why it cannot be metered, or None.
    """

    usd: float = 0.0
    usd_per_second: float = 0.0
    usd_at_once: float = math.inf
    bounded: bool = True
    unmetered: Unmetered | None = None


class CallRequest(msgspec.Struct, kw_only=True, eq=False):
    """The needs of a call. Times are seconds of the account's clock.

    Attributes:
        charge: requests and tokens that it is expected to use.
        usd: dollars that it is expected to cost at most.
        priority: its priority.
        deadline: when its answer becomes worthless; infinity for never.
        tenant: the tenant that it is made for.
        task_id: the task that makes it, or None: then it is unattributed.
        model: the model that it is for.
        size: bytes of its body; 0 if they are not known.
        free: it costs no money in any case, so no budget is checked.
        usd_per_second: see `CallPrice`.
        usd_at_once: see `CallPrice`.
        bounded: see `CallPrice`.
        unmetered: why it cannot be metered, and is rejected; or None.
        retries: how often it has been retried; a retried call goes to the head of its priority.
        failed: an attempt of it has failed, so that it does not probe a breaker.
        retried: it is retried if it is refused, so that it may be a trial call of a quota.
        asked_at: when it first asked for a permit; set by the account.
        holder: a permit of the account that its caller holds while it waits for this call, or None; set by the account.
        weight: the share of turns of its tenant, unless the account's weights name it.
        payer: the task that makes it, which is told what it has used and was charged; or None.
        budgets: of its caller, from which it spends besides those of the upstream.
        key_name: the name of the issued key with which its caller made it, by which it is attributed; empty for the
            API key of its account.
    """

    charge: Charge = Charge()
    usd: float = 0.0
    priority: Priority = Priority.NORMAL
    deadline: float = math.inf
    tenant: str = DEFAULT_TENANT
    task_id: str | None = None
    model: str = ""
    size: int = 0
    free: bool = False
    retries: int = 0
    failed: bool = False
    retried: bool = True
    asked_at: float = math.inf
    usd_per_second: float = 0.0
    usd_at_once: float = math.inf
    bounded: bool = True
    unmetered: Unmetered | None = None
    holder: Permit | None = None
    weight: float = 1.0
    payer: UsageObserver | None = None
    budgets: tuple[CallBudget, ...] = ()
    key_name: str = ""

    @property
    def goes_first(self) -> bool:
        """True if it goes before other calls of its priority: it was sent before, or a slot is held until it ends."""
        return self.retries > 0 or self.holder is not None

    @property
    def is_suspect(self) -> bool:
        """True if it was retried several times: when it is refused again, what it asks for may be the cause."""
        return self.retries >= _REPEATED

    def unreported_cost(self, seconds: float) -> float:
        """Return the dollars to count for a call that was sent, took `seconds`, and whose usage never arrived."""
        return self.usd if self.bounded else max(self.usd, self.usd_per_second * seconds)

    def cost_within(self, seconds: float) -> float:
        """Return the dollars of what a call that was left after `seconds` can have used at most by then."""
        used = self.usd_at_once + self.usd_per_second * seconds
        return min(self.usd, used) if self.bounded or used == math.inf else used


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The caller of a request: a task, or another process.

    Attributes:
        priority: of its call.
        deadline: the time of `forebay.clock.now` when the answer becomes worthless.
        tenant: who pays for the call.
        task_id: the task that the call belongs to, or None.
        api_key: the API key that the account belongs to; None to read it from the request.
        weight: the share of turns that the task's supervisor, or the gateway, gives the tenant.
        key_is_held: the API key of the request is that of the operator, who lets the caller use it.
        budgets: of the caller, from which its calls spend besides those of the upstream.
        metered: the caller has rates or budgets of its own, so that its calls must be readable.
        key_name: the name of the key that a gateway has issued to the caller; empty if there is none.
    """

    priority: Priority = Priority.NORMAL
    deadline: float = math.inf
    tenant: str = DEFAULT_TENANT
    task_id: str | None = None
    api_key: str | None = None
    weight: float = 1.0
    key_is_held: bool = False
    budgets: tuple[CallBudget, ...] = ()
    metered: bool = False
    key_name: str = ""


class SpendReservation(Protocol):
    """The dollars of one budget that are held for one call. They are settled exactly once."""

    def settle(self, usd: float) -> None:
        """Replace them by the dollars that the call has cost."""

    def revise(self, usd: float) -> None:
        """Correct the cost, after `settle`, by usage that became known later."""


class CallRecord(Protocol):
    """The record of one call in a spend log. It is settled at most once: a call that costs nothing may not be."""

    def settle(self, usd: float, *, input_tokens: int, output_tokens: int) -> None:
        """Record the call, with its cost."""

    def revise(self, usd: float, *, input_tokens: int, output_tokens: int) -> None:
        """Correct what was recorded, by usage that became known later."""


class CallBudget(Protocol):
    """A budget that calls spend from. It knows the time."""

    name: str

    def can_afford(self, usd: float, priority: Priority) -> bool:
        """Return whether `usd` dollars may be reserved."""

    def try_reserve(self, usd: float, priority: Priority) -> SpendReservation | None:
        """Reserve `usd` dollars, or return None if they may not be: check and take are one step."""

    def rejection(self, usd: float, priority: Priority) -> Rejected:
        """Return the rejection of a call for which `usd` dollars cannot be reserved now."""


class CountedUsage(NamedTuple):
    """The usage of a call as it was recorded, and the labels by which it was."""

    labels: UsageLabels
    usage: CallUsage


class Permit(msgspec.Struct, eq=False):
    """The right to send one call: a slot, quotas and dollars are held for it. It is closed exactly once.

    Attributes:
        request: of the call.
        granted_at: when it was granted.
        grant: the slot, as the limit marked it.
        breaker_epoch: the epoch of the account's breaker.
        reservation: the requests and tokens that it holds of the quotas.
        spend: the dollars that are held for it, of each budget.
        account: the account that granted it.
        accepted: the limit knows that the call was not throttled.
        closed: everything has been returned.
        record: of the call, in the spend log; None without one.
        counted: the usage that was recorded for the call, once it has ended and if it has any.
    """

    request: CallRequest
    granted_at: float
    grant: Grant
    breaker_epoch: int
    reservation: QuotaReservation
    spend: Sequence[SpendReservation] = ()
    account: object = None
    accepted: bool = False
    closed: bool = False
    record: CallRecord | None = None
    counted: CountedUsage | None = None


class CallOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an attempt, for its account.

    Attributes:
        kind: the evidence about the upstream.
        used: requests and tokens that it used; None for as many as were reserved.
        released: it took nothing of them: it was not sent.
        answered: the provider has begun to answer it; if its caller left before, it may have been refused as well.
        rate_limited: it was throttled, and its refusal names a rate (429). It took nothing of them either.
        spend_cap: it was refused because the account's money at the provider is spent. It counts as throttled.
        account_limited: it was throttled by another limit of the account, or by one that is not named (429).
        rate_scope: the rate that a refusal names, or None.
        retry_after: seconds that the provider asked to wait, or None.
        rate_limit_headers: the answer's rate-limit headers, unless the account has got them already.
        usd: dollars that it cost; None for as much as was reserved.
        latency: seconds that it took; None if that says nothing about the upstream.
        input_tokens: that it sent, cached ones included; None if they are not known.
        output_tokens: of a success, if known.
        estimated_input_tokens: the estimate made before it was sent; None if it cannot be compared with `used`.
        final: it is not retried. Only final attempts count for the breaker.
        usage: all that it used, where that is known.
        reported: the provider reported that usage; else it is an estimate.
    """

    kind: Outcome
    used: Charge | None = None
    released: bool = False
    answered: bool = True
    rate_limited: bool = False
    spend_cap: bool = False
    account_limited: bool = False
    rate_scope: RateScope | None = None
    retry_after: float | None = None
    rate_limit_headers: tuple[RateLimitHeaders, ...] = ()
    usd: float | None = None
    latency: float | None = None
    input_tokens: int | None = None
    output_tokens: int = 0
    estimated_input_tokens: int | None = None
    final: bool = True
    usage: BilledUsage | None = None
    reported: bool = False

    @property
    def refused_by_limit(self) -> bool:
        """True if a limit of the account refused it (429), not the provider's capacity."""
        return self.rate_limited or self.account_limited


class AttemptResult(msgspec.Struct, kw_only=True, eq=False):
    """The result of one attempt, whose permit is still open.

    The caller gets the result of the last attempt, or ``Overloaded`` if the account rejects a retry for another reason
    than that the call's deadline is too near.

    Attributes:
        outcome: how it ended, for the account.
        value: returned to the caller if this is the last attempt.
        error: raised instead if this is the last attempt.
        retryable: another attempt could succeed.
        uses_attempt: a retry uses up one of the attempts; throttled calls (429, 503, 529) use none.
        retry_after: seconds that the provider asked to wait, or None.
        streaming: the answer is still coming; its reader releases the permit. It is not retried, even if it breaks off.
        can_fall_back: another account could do better.
    """

    outcome: CallOutcome
    value: Any = None
    error: BaseException | None = None
    retryable: bool = False
    uses_attempt: bool = True
    retry_after: float | None = None
    streaming: bool = False
    can_fall_back: bool = False


class Admitted(msgspec.Struct, frozen=True):
    """The call may be sent now."""

    permit: Permit


class Queued(NamedTuple):
    """The call has to wait, about `seconds` seconds, for the part of the account named by `limited_by`."""

    seconds: float
    limited_by: str


class Prospect(NamedTuple):
    """The outlook of a call at an account.

    Attributes:
        seconds: until it would be sent; infinity if it would be rejected.
        calls: that the account could send within the next minute as it is now, by its free slots and its quotas.
    """

    seconds: float
    calls: float


class Rejected(NamedTuple):
    """The call will not be sent.

    Attributes:
        reason: why, for a person.
        limited_by: the part of the account that rejects it.
        load: how full that part is; 1.0 is full.
        retry_after: seconds after which to try again, or None if that is not known or would not help.
        owner: whose limit it is, such as ``"key:writer"``, if it is not the account's; else empty.
    """

    reason: str
    limited_by: str
    load: float
    retry_after: float | None
    owner: str = ""


def scale_charge(charge: Charge, count: int) -> Charge:
    """Return what `count` calls with this charge take together."""
    return Charge(
        requests=charge.requests * count,
        input_tokens=charge.input_tokens * count,
        output_tokens=charge.output_tokens * count,
        tokens=charge.tokens * count,
        most_output_tokens=charge.most_output_tokens * count,
        most_tokens=charge.most_tokens * count,
    )
