"""What a call asks of its account, and what it may be answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.limit import Grant
from forebay.quota import QuotaReservation
from forebay.task import Priority


class CallRequest(msgspec.Struct, kw_only=True, eq=False):
    """A call before it is sent. Times are seconds of the account's clock.

    Attributes:
        charge: what it is expected to take of the quotas.
        usd: dollars that it is expected to cost at most.
        priority: its rung.
        deadline: when its answer becomes worthless; infinity for never.
        tenant: on whose behalf.
        run: the id of the task that makes it, or None: then it is unattributed.
        model: what it is for.
        free: it costs no money, whatever comes of it, so no budget is asked.
        retries: tries of it that have failed; a retried call goes to the head of its rung.
        since: when it asked first; the account notes it.
    """

    charge: Charge = Charge()
    usd: float = 0.0
    priority: Priority = Priority.NORMAL
    deadline: float = math.inf
    tenant: str = "default"
    task_id: str | None = None
    model: str = ""
    free: bool = False
    retries: int = 0
    asked_at: float = math.inf


class SpendReservation(Protocol):
    """Dollars that a call holds of one budget, until they are settled."""

    def settle(self, usd: float) -> None:
        """It has cost so much."""


class CallBudget(Protocol):
    """A budget that a call draws on. It knows what day it is."""

    name: str

    def can_afford(self, usd: float, priority: Priority) -> bool:
        """Whether so much may be reserved."""

    def reserve(self, usd: float) -> SpendReservation:
        """Set so much aside."""

    def rejection(self, usd: float) -> Rejected:
        """Why so much is not afforded, and when it may be."""


class Permit(msgspec.Struct, eq=False):
    """A call that may be sent: one slot, its charge and its dollars are held for it. Closed exactly once.

    Attributes:
        ask: whose it is.
        at: when it was given.
        grant: the slot, as the limit marked it.
        era: of the account's breaker.
        reservation: what it holds of the quotas.
        sums: what it holds of each budget that it draws on.
        accepted: whether the limit was told that the call was not refused.
        closed: whether all has been given back.
    """

    request: CallRequest
    granted_at: float
    grant: Grant
    breaker_epoch: int
    reservation: QuotaReservation
    spend: Sequence[SpendReservation] = ()
    accepted: bool = False
    closed: bool = False


class CallOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended, as far as its account is concerned.

    Attributes:
        outcome: what that says about the upstream.
        used: what it took of the quotas; None: as much as was reserved.
        released: it took nothing of them: it never left, or was refused and not counted.
        rate: it was refused since a quota is used up.
        retry_after: seconds that the refusal asked for, or None.
        notices: what the headers of its answer said of the quotas, unless that was heard before.
        usd: what it cost; None: as much as was reserved.
        seconds: how long it took, if that says anything of the upstream's pace.
        made: output tokens, if that is known of a success.
        foreseen: input tokens that it was estimated to send; None: what it used says nothing of that.
        final: whether it will not be tried again: only such count for the breaker.
    """

    kind: Outcome
    used: Charge | None = None
    released: bool = False
    rate_limited: bool = False
    retry_after: float | None = None
    rate_limit_headers: tuple[RateLimitHeaders, ...] = ()
    usd: float | None = None
    latency: float | None = None
    output_tokens: int = 0
    estimated_input_tokens: int | None = None
    final: bool = True


class Admitted(NamedTuple):
    """It may be sent now."""

    permit: Permit


class Queued(NamedTuple):
    """It has to wait, about so many seconds, for what binds."""

    seconds: float
    limited_by: str


class Rejected(NamedTuple):
    """It will not be sent.

    Attributes:
        reason: why, for a person.
        binding: the part of the account that refuses it.
        load: what that part holds against what it may hold.
        retry_after: seconds after which to come again, or None if that is unknown or never helps.
    """

    reason: str
    limited_by: str
    load: float
    retry_after: float | None


def scale_charge(charge: Charge, count: int) -> Charge:
    """What so many calls like it take together."""
    return Charge(
        requests=charge.requests * count,
        input_tokens=charge.input_tokens * count,
        output_tokens=charge.output_tokens * count,
        tokens=charge.tokens * count,
    )
