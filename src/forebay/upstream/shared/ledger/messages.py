"""The messages between a process and a ledger. All are plain data, in amounts and seconds; none has a time of day."""

from __future__ import annotations

import msgspec

from forebay._text import format_duration
from forebay.limit import AnswerCounts
from forebay.upstream.shared.ledger.observed_messages import ObservedReply, ObservedRequest
from forebay.upstream.shared.ledger.rate_messages import RateReply, RateRequest
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest


def _kept(held: float, reserved: float, needed: float, wanted: float) -> float:
    """Return the part of `held` that is kept: members that each hold a part of what all need would wait for good."""
    return min(held, reserved if needed > held else max(reserved, needed, wanted))


def ledger_key(kind: str, *parts: str) -> str:
    """Return the key of a ledger: another one for each kind and each list of parts."""
    return msgspec.json.encode([kind, *parts]).decode()


class QuotaTerms(msgspec.Struct, frozen=True):
    """One quota of an account.

    Attributes:
        unit: what it counts, see `forebay.quota.Quota.counted`.
        amount: granted in a period.
        seconds: of the period.
    """

    unit: str
    amount: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.amount:,.12g} {self.unit.replace('_', ' ')} in {format_duration(self.seconds)}"


class BudgetTerms(msgspec.Struct, frozen=True):
    """The terms of a budget. See `forebay.quota.Budget`.

    Attributes:
        usd: how much may be spent in each period.
        per: ``"hour"``, ``"day"``, ``"month"``, or None.
        reserved_share: the share kept for HIGH and CRITICAL.
        forget_after: seconds without an exchange after which a budget that never renews is forgotten; None: never.
    """

    usd: float
    per: str | None = None
    reserved_share: float = 0.0
    forget_after: float | None = None

    def __str__(self) -> str:
        period = "in all" if self.per is None else f"per {self.per}"
        kept = f", {self.reserved_share:.12g} of it reserved" if self.reserved_share else ""
        return f"a budget of {self.usd:,.12g} USD {period}{kept}"


class LedgerTerms(msgspec.Struct, frozen=True):
    """The settings of a ledger, which are the same in all processes that use it.

    Attributes:
        quotas: of the account, in an order that all processes agree on.
        max_concurrent: calls in flight at most; None: not bounded by the ledger.
        budget: None: it counts no money.
        limit: names the kind of limit that its members learn together; None: they learn none.
        breaker: names the rules of the breaker that its members share; None: they share none.
    """

    quotas: tuple[QuotaTerms, ...] = ()
    max_concurrent: int | None = None
    budget: BudgetTerms | None = None
    limit: str | None = None
    breaker: str | None = None

    def __str__(self) -> str:
        parts = [str(quota) for quota in self.quotas]
        if self.max_concurrent is not None:
            parts.append(f"max_concurrent={self.max_concurrent}")
        if self.budget is not None:
            parts.append(str(self.budget))
        if self.limit is not None:
            parts.append(f"limit={self.limit}")
        if self.breaker is not None:
            parts.append(f"breaker={self.breaker}")
        return ", ".join(parts) or "no limits"


class QuotaRequest(msgspec.Struct, frozen=True):
    """The use of one quota by a member, and its demand.

    Attributes:
        used: by its calls since its last exchange that was answered; below 0 if they returned more than they took.
        reserved: for its calls in flight, of a strict quota.
        needed: to hold after the exchange, `reserved` included, so that the first of its waiting calls can go; 0 if
            none waits for it. If it does not hold that much, it returns what is not reserved, and gets all or nothing.
        wanted: to hold after the exchange, at least `reserved` and `needed`; what it holds above that is returned.
        missing: from the quota at first, if this request opens the ledger.
    """

    used: float = 0.0
    reserved: float = 0.0
    needed: float = 0.0
    wanted: float = 0.0
    missing: float = 0.0

    def kept(self, held: float) -> float:
        """Return the part of `held` that the member keeps, before anything is granted."""
        return _kept(held, self.reserved, self.needed, self.wanted)


class SlotRequest(msgspec.Struct, frozen=True):
    """The slots that a member uses.

    Attributes:
        in_use: its calls in flight.
        held: the calls that it may have in flight until the reply comes: those that it has, or was allowed.
        wanted: its calls in flight and those that wait for a slot.
    """

    in_use: int = 0
    held: int = 0
    wanted: int = 0


class LimitRequest(msgspec.Struct, frozen=True):
    """The part of a limit that a member has learned since its last exchange that was answered.

    Attributes:
        epoch: of the limit, as the ledger told it last; -1 if it has not.
        level: the limit of the member.
        most: that the limit may ever be.
        cut: the limit to which it has cut it; None if it has not.
        raised: by how much it has raised it, after the cut if there is one.
        returned: by how much it has raised it besides, on its way back to a level that has held before.
        returns_to: that level: rises on the way back to it lead no further, however many members make them.
        silence: seconds for which it asks all members to send no call, because a lone one was refused; 0 for none.
        answers: that it has had since then, or since the cut.
    """

    epoch: int = -1
    level: float = 1.0
    most: float = 1e9
    cut: float | None = None
    raised: float = 0.0
    returned: float = 0.0
    returns_to: float = 0.0
    silence: float = 0.0
    answers: AnswerCounts = AnswerCounts()


class BudgetRequest(msgspec.Struct, frozen=True):
    """The money that a member has spent, and its demand, in dollars.

    Attributes:
        period: the start of the period of all that follows, as the ledger told it; -1 if it has not.
        spent: by its calls since its last exchange that was answered.
        reserved: for its calls in flight.
        needed: to hold after the exchange, `reserved` included, so that the first of its waiting calls can go; 0 if
            none waits for money. If it does not hold that much, it returns what is not reserved, and gets all or
            nothing.
        important: that call may spend the reserved share.
        wanted: to hold after the exchange, at least `reserved` and `needed`; what it holds above that is returned.
        known_spent: by all members, as the ledger told it last.
        logged_period: the start of the present period by the clock of the member, if the ledger has not told it yet and
            the member has a spend log; else -1.
        logged_spent: in that period, by the spend log: a ledger that is new begins with it.
        alert: the share of the budget from which the member wants an alert; 0 for none but that all is spent.
        alerted: the highest share for which an alert was given in that period, as the member knows; 0 for none.
        exhausted: a small call was rejected, since what is left is less than it needs: all counts as spent.
    """

    period: float = -1.0
    spent: float = 0.0
    reserved: float = 0.0
    needed: float = 0.0
    important: bool = False
    wanted: float = 0.0
    known_spent: float = 0.0
    logged_period: float = -1.0
    logged_spent: float = 0.0
    alert: float = 0.0
    alerted: float = 0.0
    exhausted: bool = False

    def kept(self, held: float) -> float:
        """Return the part of `held` that the member keeps, before anything is granted."""
        return _kept(held, self.reserved, self.needed, self.wanted)


class ExchangeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a member to a ledger.

    Attributes:
        ledger: the key of the ledger in its store.
        member: the id of the member: of one process, and of one upstream in it.
        sequence: larger than that of each earlier request of the member, at least 1. A request that is repeated,
            because its reply was lost, has the same one and the same contents.
        answered: the sequence number of the member's latest request that was answered; 0 before the first.
        epoch: the ledger's, as its last reply told it; empty before the first.
        members: how many there are, as that reply told it; 0 before the first.
        terms: the settings of this process.
        priority: of the first waiting call; the lowest number is served first.
        quotas: one for each of the terms, in their order, and then one for each of `observed`.
        slots: None if the terms bound none.
        budget: None if the terms have none.
        leaving: the member ends: it returns all that it holds.
        limit: None if the terms have none.
        stoppages: by kind; None if it shares none.
        observed: the limits that the member has observed, or was told.
        rate: None if the member learns no rate.
    """

    ledger: str
    member: str
    sequence: int
    answered: int = 0
    epoch: str = ""
    members: int = 0
    terms: LedgerTerms
    priority: int = 0
    quotas: tuple[QuotaRequest, ...] = ()
    slots: SlotRequest | None = None
    budget: BudgetRequest | None = None
    leaving: bool = False
    limit: LimitRequest | None = None
    stoppages: dict[str, StoppageRequest] | None = None
    observed: tuple[ObservedRequest, ...] = ()
    rate: RateRequest | None = None


class QuotaReply(msgspec.Struct, frozen=True):
    """The state of one quota after an exchange.

    Attributes:
        held: by the member now, to be used until its lease ends.
        level: what nobody holds; below 0 is a debt.
        wait: seconds until the member's need is expected to be met, by the refill alone; 0 if it is.
    """

    held: float
    level: float
    wait: float = 0.0


class SlotReply(msgspec.Struct, frozen=True):
    """The slots of a member after an exchange.

    Attributes:
        allowed: how many calls it may have in flight: it starts none above that.
        give_back: a slot that becomes free is not used again before the next exchange: members without any wait.
        free: slots that nobody holds.
    """

    allowed: int
    give_back: bool = False
    free: int = 0


class LimitReply(msgspec.Struct, frozen=True):
    """The limit that all members have learned.

    Attributes:
        epoch: how often it was cut.
        level: calls in flight at most, in all processes, before it is rounded down.
        silence: seconds for which no call is sent.
        others: calls that other members may have in flight.
        answers: that all members have had since the latest cut.
    """

    epoch: int
    level: float
    silence: float = 0.0
    others: int = 0
    answers: AnswerCounts = AnswerCounts()


class BudgetReply(msgspec.Struct, frozen=True):
    """The state of a budget after an exchange, in dollars.

    Attributes:
        period: when the present period began, in epoch seconds of the store.
        ends_in: seconds until it ends; None for never. What is held is void then.
        held: by the member now.
        spent: by all members, in this period.
        reserved: for calls in flight of all members.
        recall: another member waits for money: what is not reserved is to be returned at once.
        alert: the share for which this member is to give an alert; 0 for none.
        alerted: the highest share for which one was given in this period, by any member; 0 for none.
    """

    period: float
    held: float
    spent: float
    reserved: float
    ends_in: float | None = None
    recall: bool = False
    alert: float = 0.0
    alerted: float = 0.0


class ExchangeReply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a ledger to an exchange.

    Attributes:
        epoch: the id of the ledger. Another one than before: its store has lost its data.
        members: how many there are, this one included.
        rank: how many of them come before this one, in an order that all agree on.
        competing: how many wait for more than they were granted, this one included if it does.
        retry_in: seconds after which to ask again for what was not granted; None if all that was needed was granted.
        conflict: the terms of the live members, if they differ from those of the request; nothing was done then.
        quotas: one for each of the terms, and then one for each of `observed`.
        slots: None if the terms bound none.
        budget: None if the terms have none.
        limit: None if the terms have none.
        stoppages: by kind, those of the request of which the member does not know everything; None if there are none.
        observed: the limits that all members have observed.
        rate: None if the request has none.
    """

    epoch: str
    members: int
    rank: int
    competing: int = 0
    retry_in: float | None = None
    conflict: LedgerTerms | None = None
    quotas: tuple[QuotaReply, ...] = ()
    slots: SlotReply | None = None
    budget: BudgetReply | None = None
    limit: LimitReply | None = None
    stoppages: dict[str, StoppageReply] | None = None
    observed: tuple[ObservedReply, ...] = ()
    rate: RateReply | None = None


LEASE = 5.0
"""Seconds for which a member may use what it holds, from the moment at which it sent the request."""

LEASE_MARGIN = 0.25
"""Seconds before its end in which a lease is not used: from a decision until its call is sent."""
