"""The ledger of one account, or of one budget, for all processes that share it: the decision over an exchange. Pure.

A store runs `exchange` as one step: it loads the ledger, decides, and saves it. The arithmetic is plain, because a
store may have the same rules in a script of its own.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from forebay.errors import StoreUnavailable
from forebay.upstream.shared.ledger.absent_members import (
    absent_member,
    expect_unnamed,
    notice_absence,
    take_unnamed,
)
from forebay.upstream.shared.ledger.budget_shares import (
    begin_period,
    begin_with_log,
    budget_reply,
    grant_money,
    money_retry,
    recover_spend,
    report_spend,
    restore_spend,
)
from forebay.upstream.shared.ledger.ledger_state import LAYOUT, EndedMember, LedgerState, MemberState
from forebay.upstream.shared.ledger.limit_learning import begin_limit, limit_reply, report_limit
from forebay.upstream.shared.ledger.messages import LEASE, ExchangeReply, ExchangeRequest
from forebay.upstream.shared.ledger.observed_learning import (
    correct_observed,
    observed_replies,
    quota_requests,
    report_observed,
)
from forebay.upstream.shared.ledger.periods import period_end
from forebay.upstream.shared.ledger.quota_shares import (
    grant_quotas,
    quota_replies,
    refill_quotas,
    report_quotas,
    return_quotas,
)
from forebay.upstream.shared.ledger.rate_shares import rate_reply, report_rate
from forebay.upstream.shared.ledger.slot_shares import grant_slots
from forebay.upstream.shared.ledger.stoppages import end_probes, report_stoppages, stoppage_replies

_MAX_RETRY: Final = 0.25  # seconds: what others return may come before the refill
_KEEP_ENDED: Final = 3600.0  # seconds for which it is known that a member has ended
_MAX_ENDED: Final = 128  # of them


class AccountLedger:
    """The ledger of one account, or of one budget.

    Each member asks for quotas, slots and money, and reports what it has used, in one exchange at a time. What it holds
    is leased: when its lease ends without another exchange, the member has died or was paused for too long. Its slots
    and its money are free again then; of its quotas, what it held counts as used.

    Exchanges may be repeated: a request with the sequence number of one that was decided gets the same reply.

    Attributes:
        state: what a store keeps.
    """

    __slots__ = ("state",)

    def __init__(self, state: LedgerState) -> None:
        self.state = state

    @classmethod
    def open(cls, now: float, request: ExchangeRequest) -> AccountLedger:
        """Return a new ledger, for the first request that comes.

        Its quotas are full, or what the member says; if it has known the ledger before, its store has lost it, and they
        are empty. Its budget begins with what the member's spend log has.
        """
        lost = bool(request.epoch)
        levels = [0.0 if lost else quota.amount for quota in request.terms.quotas]
        if not lost:
            levels = [level - asked.missing for level, asked in zip(levels, request.quotas, strict=False)] or levels
        epoch = f"{request.member}:{request.sequence}"
        state = LedgerState(epoch=epoch, terms=request.terms, clock=now, levels=levels, layout=LAYOUT)
        begin_limit(state, request.limit)
        if request.terms.budget is not None:
            begin_period(state, request.terms.budget, now)
            if request.budget is not None:
                begin_with_log(state, request.budget)
        expect_unnamed(state, request)
        return cls(state)

    def exchange(self, now: float, request: ExchangeRequest) -> ExchangeReply:
        """Count what a member has used, decide what it gets, and return the reply.

        Args:
            now: the store's clock, in epoch seconds.
            request: of the member.
        """
        state, name = self.state, request.member
        self._advance(now)
        known = state.members.get(name)
        if known is not None and known.reply is not None and request.sequence <= known.sequence:
            return known.reply
        if request.terms != state.terms:
            if known is not None:
                known.proposed = request.terms
            if any(other.proposed != request.terms for other in state.others(name)):
                return ExchangeReply(epoch=state.epoch, members=len(state.members), rank=0, conflict=state.terms)
            self._replace_terms(now, request)
        forgotten = request.answered > self._latest_sequence(name)
        member, counts = self._join(request)
        member.sequence, member.seen, member.until = request.sequence, state.time, state.time + LEASE
        member.proposed = None
        if counts:
            self._count(member, request, forgotten=forgotten)
        reply = self._decide(request, member)
        member.reply = reply
        if request.leaving:
            self._end(name, EndedMember(member.sequence, state.time, member.held))
        return reply

    def _count(self, member: MemberState, request: ExchangeRequest, *, forgotten: bool) -> None:
        """Count what a member reports; `forgotten`: the ledger has lost an exchange that was answered."""
        state = self.state
        report_observed(state, member, request)
        report_quotas(state, member, quota_requests(state, request))
        correct_observed(state, member, request)
        if request.rate is not None:
            report_rate(state, member, request.rate, knows=request.epoch == state.epoch)
        if request.budget is not None:
            if forgotten:
                restore_spend(state, request.budget)
            report_spend(state, member, request.budget)
        if request.limit is not None and request.epoch == state.epoch:
            report_limit(state, request.limit)
        if request.stoppages is not None:
            report_stoppages(state, request.member, request.stoppages)

    def expires_at(self) -> float | None:
        """Return when a store may forget the ledger if no exchange comes, in its epoch seconds; None for never.

        A new ledger would be the same then: its quotas are full, and the period of its budget is over.
        """
        state = self.state
        kept = LEASE + _KEEP_ENDED
        for quota, level in zip(state.quotas, state.levels, strict=True):
            kept = max(kept, _KEEP_ENDED + (quota.amount - level) * quota.seconds / quota.amount)
        if (budget := state.terms.budget) is not None:
            end = period_end(budget.per, state.period)
            if end is None and budget.forget_after is None:
                return None
            kept = max(kept, budget.forget_after or 0.0 if end is None else end - state.clock)
        return state.clock + kept

    def _advance(self, now: float) -> None:
        """Let time pass, and end the leases that are over."""
        state = self.state
        elapsed = max(0.0, now - state.clock)
        state.clock = now
        state.time += elapsed
        refill_quotas(state, elapsed)
        if state.terms.budget is not None:
            begin_period(state, state.terms.budget, now)
        notice_absence(state, elapsed)
        for name in [name for name, member in state.members.items() if member.until < state.time]:
            self._end(name, absent_member(state, state.members[name]))

    def _end(self, name: str, ended_member: EndedMember) -> None:
        """End a member: its slots and its money are free, unless it may be using its fair share."""
        state = self.state
        del state.members[name]
        end_probes(state, name)
        state.ended[name] = ended_member
        for other in [other for other, ended in state.ended.items() if ended.at < state.time - _KEEP_ENDED]:
            del state.ended[other]
        while len(state.ended) > _MAX_ENDED:
            oldest = min(state.ended, key=lambda other: (state.ended[other].at, other))
            del state.ended[oldest]

    def _latest_sequence(self, name: str) -> int:
        """Return the sequence number of the latest request of a member that is known; 0 if none is."""
        known = self.state.members.get(name) or self.state.ended.get(name)
        return 0 if known is None else known.sequence

    def _join(self, request: ExchangeRequest) -> tuple[MemberState, bool]:
        """Return the member that asks, and whether what it reports counts: it does not if it was counted before."""
        state = self.state
        if (member := state.members.get(request.member)) is not None:
            member.absence = None
            return member, True
        quotas = len(state.quotas)
        ended = state.ended.pop(request.member, None)
        lost = ended.lost if ended is not None and len(ended.lost) == quotas else [0.0] * quotas
        member = MemberState(
            sequence=request.sequence,
            until=state.time,
            seen=state.time,
            held=[0.0] * quotas,
            short=[0.0] * quotas,
            lost=list(lost),
            absence=ended,
            under_way=[0.0] * len(state.observed),
        )
        state.members[request.member] = member
        if request.epoch and request.epoch != state.epoch:
            self._recover(member, request)
        return member, ended is None or request.sequence > ended.sequence

    def _recover(self, member: MemberState, request: ExchangeRequest) -> None:
        """Take over what a member of an earlier epoch knows: the store has lost it."""
        state = self.state
        member.absence = take_unnamed(state)
        state.levels = [min(0.0, level) for level in state.levels]
        if request.budget is not None:
            recover_spend(state, request.budget)

    def _replace_terms(self, now: float, request: ExchangeRequest) -> None:
        """Take over settings that all members ask for. A quota keeps its level, and so does a limit of the same kind.

        The members keep their slots and their money. What they hold of a quota counts as used, as if their leases had
        ended: they have held nothing since their own settings changed.
        """
        state, terms = self.state, request.terms
        if terms.limit != state.terms.limit:
            begin_limit(state, request.limit)
        given = len(state.terms.quotas)
        known = {(quota.unit, quota.seconds): number for number, quota in enumerate(state.terms.quotas)}
        places = [known.get((quota.unit, quota.seconds)) for quota in terms.quotas]
        observed = range(given, len(state.levels))
        state.levels = [
            quota.amount if place is None else min(state.levels[place], quota.amount)
            for place, quota in zip(places, terms.quotas, strict=True)
        ] + state.levels[given:]
        state.terms = terms
        for name in list(state.members):
            end_probes(state, name)
        state.members.pop(request.member, None)
        for member in state.members.values():
            lost = [0.0 if place is None else member.lost[place] + member.held[place] for place in [*places, *observed]]
            member.held, member.short, member.lost = [0.0] * len(lost), [0.0] * len(lost), lost
            member.is_waiting, member.proposed = False, None
        if terms.budget is not None:
            begin_period(state, terms.budget, now)

    def _decide(self, request: ExchangeRequest, member: MemberState) -> ExchangeReply:
        """Grant what can be granted, and return the reply."""
        state, name = self.state, request.member
        if request.leaving:
            return_quotas(state, member)
            member.usd = member.usd_reserved = 0.0
            return ExchangeReply(epoch=state.epoch, members=len(state.members) - 1, rank=0)
        if not member.is_waiting:
            member.waiting_since = state.time
        member.priority = request.priority
        waits = grant_quotas(state, name, quota_requests(state, request))
        retries = [max(waits)] if any(wait > 0.0 for wait in waits) else []
        slots = None
        if request.slots is not None and state.slot_limit() is not None:
            slots = grant_slots(state, name, request.slots, may_grow=not retries)
        budget = None
        if request.budget is not None and state.terms.budget is not None:
            grant_money(state, name, state.terms.budget, request.budget)
            budget = budget_reply(state, name, state.terms.budget, request.budget)
            if (retry := money_retry(member)) is not None:
                retries.append(retry)
        member.is_waiting = bool(retries)
        return ExchangeReply(
            epoch=state.epoch,
            members=len(state.members),
            rank=sum(1 for other in state.members if other < name),
            competing=sum(1 for other in state.members.values() if other.is_waiting and other.wishes(state.time)),
            retry_in=min(_MAX_RETRY, max(retries)) if retries else None,
            quotas=quota_replies(state, member, waits),
            slots=slots,
            budget=budget,
            limit=None if state.terms.limit is None else limit_reply(state, name),
            stoppages=None if request.stoppages is None else stoppage_replies(state, name, request.stoppages),
            observed=observed_replies(state),
            rate=None if request.rate is None else rate_reply(state, name),
        )


class _Layout(msgspec.Struct):
    """The part of a ledger that every version can read."""

    layout: int = 1


class UnreadableLedger(Exception):
    """A ledger that this version cannot go on with.

    Args:
        layout: that it has; None if it is no ledger.
    """

    def __init__(self, layout: int | None) -> None:
        super().__init__(layout)
        self.layout = layout

    def unavailable(self, where: str) -> StoreUnavailable:
        """Return the error of the store that has it."""
        if self.layout is None:
            why = "it has something else in the place of a ledger, or one that is damaged"
            advice = "Choose another ?name= or another file: budgets begin with the spend log there, or at zero."
        else:
            why = f"a newer Forebay wrote one of its ledgers (layout {self.layout}; this version knows {LAYOUT})"
            advice = "Update this process as well; or give it another ?name= or another file, with limits of its own."
        return StoreUnavailable(where=where, why=why, advice=advice)


def encode_ledger(ledger: AccountLedger) -> bytes:
    """Return a ledger as bytes, for a store."""
    return msgspec.msgpack.encode(ledger.state)


def decode_ledger(data: bytes) -> AccountLedger:
    """Return the ledger that a store has kept. One that an earlier version wrote goes on as one of this version.

    Raises:
        UnreadableLedger: a later version wrote it, or no version did.
    """
    try:
        layout = msgspec.msgpack.decode(data, type=_Layout).layout
        if layout > LAYOUT:
            raise UnreadableLedger(layout)
        state = msgspec.msgpack.decode(data, type=LedgerState)
    except msgspec.DecodeError as error:
        raise UnreadableLedger(None) from error
    state.layout = LAYOUT
    return AccountLedger(state)
