"""The state of a ledger, as a store keeps it. Times are seconds of the ledger's own clock, but for `clock`."""

from __future__ import annotations

import msgspec

from forebay.limit import AnswerCounts
from forebay.upstream.shared.ledger.messages import ExchangeReply, LedgerTerms, QuotaTerms, SlotRequest
from forebay.upstream.shared.ledger.observed_quota import ObservedQuota
from forebay.upstream.shared.ledger.rate_messages import SharedRate
from forebay.upstream.shared.ledger.stoppage_state import StoppageState

LAYOUT = 3
"""The version of the layout of the structs in this file: one more with each field, here and in `redis_exchange.lua`.

Every field that layout 1 did not have has a default, with which a ledger that was written before goes on.
"""

LAPSE = 1.5
"""Seconds after which the wishes of a member that has not asked again count no more; what it holds does."""


class MemberState(msgspec.Struct):
    """One member: a live process, as long as its lease lasts.

    Attributes:
        sequence: of its latest request.
        until: when its lease ends.
        seen: when its latest request came.
        held: of each quota.
        short: of each quota: what it needs and does not hold; all 0 if it waits for none.
        lost: of each quota: what it held when an earlier lease of its own ended, which counts as used.
        waiting_since: when it began to wait for a quota or for money.
        is_waiting: it waits for a quota or for money.
        priority: of the call for which it waits.
        slots: that it holds: its calls in flight, or what it was allowed, if that is more.
        slots_wanted: its calls in flight, and those that wait for a slot.
        served_at: when it was last allowed more slots.
        usd: dollars that it holds.
        usd_reserved: the part of them that calls in flight may cost.
        usd_short: dollars that it needs and does not hold; 0 if it waits for none.
        reply: the reply to its latest request.
        absence: how it was when its lease ended, until it has reported what it used after that: what it sends first is
            the request that was not answered.
        under_way: of each observed quota: what its calls in flight have reserved.
        rate_demand: calls a second that it sends, or would send.
        rate_trial_until: until then only it tries why calls are refused.
        proposed: the terms that it asks for, if they are others than those of the ledger.
    """

    sequence: int
    until: float
    seen: float
    held: list[float]
    short: list[float]
    lost: list[float]
    waiting_since: float = 0.0
    is_waiting: bool = False
    priority: int = 0
    slots: int = 0
    slots_wanted: int = 0
    served_at: float = 0.0
    usd: float = 0.0
    usd_reserved: float = 0.0
    usd_short: float = 0.0
    reply: ExchangeReply | None = None
    absence: EndedMember | None = None
    under_way: list[float] = []
    rate_demand: float = 0.0
    rate_trial_until: float = 0.0
    proposed: LedgerTerms | None = None

    def wishes(self, time: float) -> bool:
        """Return whether its wishes count: it has asked lately."""
        return time <= self.seen + LAPSE

    def slot_demand(self, time: float) -> int:
        """Return the slots that it uses and asks for."""
        return max(self.slots, self.slots_wanted) if self.wishes(time) else self.slots

    def report_slots(self, slots: SlotRequest) -> None:
        """Note how many slots it uses and asks for."""
        self.slots_wanted = max(slots.in_use, slots.wanted)


class EndedMember(msgspec.Struct):
    """A member whose lease has ended, or that has left: a repeat of its requests must not count twice.

    Attributes:
        sequence: of its latest request.
        at: when it ended.
        lost: of each quota: what it held, which counts as used.
        until: when its lease ended.
        share: its fair share of all, which it uses if it is alive and the store was away; 0 if it has left.
        slots: that share of the slots.
        usd: dollars that it may have spent in this period, if so, and has not reported.
    """

    sequence: int
    at: float
    lost: list[float]
    until: float = 0.0
    share: float = 0.0
    slots: int = 0
    usd: float = 0.0


class LedgerState(msgspec.Struct):
    """All that a ledger knows.

    Attributes:
        epoch: its id.
        terms: its settings.
        clock: the latest reading of the store's clock, in epoch seconds.
        time: its own clock: it goes on from where it was if the store's goes back.
        levels: of each quota, the given ones first: what nobody holds.
        members: by id.
        ended: members that have ended lately, by id.
        away_until: when the store was back, after nobody had asked for so long that it was away.
        recovers_until: until then members whose leases have ended since `away_until` are taken to be alive.
        period: when the period of its budget began, in epoch seconds.
        recovered: dollars that were spent in this period by what members of an earlier epoch knew.
        reported: dollars that members have spent in this period besides.
        alerted: the highest share of the budget for which a member was told to give an alert in this period.
        previous_period: when the period before began: the clock may go back to it.
        previous_spent: dollars that were spent in that one.
        limit: that the members have learned.
        limit_epoch: how often it was cut.
        limit_answers: that the members have had since it was cut.
        silent_until: until then no call is sent, because a lone one was refused.
        stoppages: of its calls, by kind.
        layout: of the version that wrote it. The first one wrote none.
        observed: the limits that its members have observed.
        rate: that its members have learned from refusals; None if none is.
        rate_epoch: how often a member has learned something of it.
        rate_at: when that was.
        rate_counted: calls of all members that were sent and not refused.
    """

    epoch: str
    terms: LedgerTerms
    clock: float
    time: float = 0.0
    levels: list[float] = []
    members: dict[str, MemberState] = {}
    ended: dict[str, EndedMember] = {}
    away_until: float = 0.0
    recovers_until: float = 0.0
    period: float = -1.0
    recovered: float = 0.0
    reported: float = 0.0
    alerted: float = 0.0
    previous_period: float = -1.0
    previous_spent: float = 0.0
    limit: float = 1.0
    limit_epoch: int = 0
    limit_answers: AnswerCounts = AnswerCounts()
    silent_until: float = 0.0
    stoppages: dict[str, StoppageState] = {}
    layout: int = 1
    observed: list[ObservedQuota] = []
    rate: SharedRate | None = None
    rate_epoch: int = 0
    rate_at: float = 0.0
    rate_counted: int = 0

    @property
    def quotas(self) -> list[QuotaTerms | ObservedQuota]:
        """All quotas: those of the terms, and then the observed ones."""
        return [*self.terms.quotas, *self.observed]

    @property
    def spent(self) -> float:
        """Dollars spent in this period."""
        return self.recovered + self.reported

    def slot_limit(self) -> int | None:
        """Return how many calls may be in flight in all; None if the ledger does not bound them."""
        if self.terms.limit is None:
            return self.terms.max_concurrent
        return 0 if self.time < self.silent_until else int(self.limit)

    def held(self, number: int) -> float:
        """Return what all members hold of a quota."""
        return sum(member.held[number] for member in self.members.values())

    def others(self, member: str) -> list[MemberState]:
        """Return all members but one."""
        return [state for other, state in self.members.items() if other != member]

    def others_before(self, member: str) -> list[MemberState]:
        """Return the members that wait for a quota or for money and are served before `member`."""
        own = self.members[member]
        mine = (own.priority, own.waiting_since, member)
        return [
            state
            for other, state in self.members.items()
            if other != member
            and state.is_waiting
            and state.wishes(self.time)
            and (state.priority, state.waiting_since, other) < mine
        ]
