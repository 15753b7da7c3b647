"""The ledger of one account, or of one budget, for all processes that share it: the decision over an exchange. Pure.

A store runs `exchange` as one step: it loads the ledger, decides, and saves it. The arithmetic is plain, because a
store may have the same rules in a script of its own.
"""

from __future__ import annotations

from typing import Final

import msgspec

from forebay.upstream.shared.budget_shares import (
    begin_period,
    budget_reply,
    grant_money,
    money_retry,
    recover_spend,
    report_spend,
    restore_spend,
)
from forebay.upstream.shared.ledger_state import EndedMember, LedgerState, MemberState
from forebay.upstream.shared.limit_learning import begin_limit, limit_reply, report_limit
from forebay.upstream.shared.messages import LEASE, ExchangeReply, ExchangeRequest
from forebay.upstream.shared.periods import period_end
from forebay.upstream.shared.quota_shares import (
    grant_quotas,
    quota_replies,
    refill_quotas,
    report_quotas,
    return_quotas,
)
from forebay.upstream.shared.slot_shares import grant_slots

_MAX_RETRY: Final = 0.25  # seconds: what others return may come before the refill
_RECOVERY: Final = 2.0  # seconds in which members come back after their store was away: longer than between attempts
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
        are empty.
        """
        lost = bool(request.epoch)
        levels = [0.0 if lost else quota.amount for quota in request.terms.quotas]
        if not lost:
            levels = [level - asked.missing for level, asked in zip(levels, request.quotas, strict=False)] or levels
        epoch = f"{request.member}:{request.sequence}"
        state = LedgerState(epoch=epoch, terms=request.terms, clock=now, levels=levels)
        begin_limit(state, request.limit)
        if request.budget is not None:  # what the member knows of the money from elsewhere
            state.period, state.recovered = request.budget.period, request.budget.known_spent
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
            report_quotas(state, member, request.quotas)
            if request.budget is not None:
                if forgotten:
                    restore_spend(state, request.budget)
                report_spend(state, member, request.budget)
            if request.limit is not None and request.epoch == state.epoch:
                report_limit(state, request.limit)
        reply = self._decide(request, member)
        member.reply = reply
        if request.leaving:
            self._end(name)
        return reply

    def expires_at(self) -> float | None:
        """Return when a store may forget the ledger if no exchange comes, in its epoch seconds; None for never.

        A new ledger would be the same then: its quotas are full, and the period of its budget is over.
        """
        state = self.state
        kept = LEASE + _KEEP_ENDED
        for quota, level in zip(state.terms.quotas, state.levels, strict=True):
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
        before = len(state.members)
        for name in [name for name, member in state.members.items() if member.until < state.time]:
            self._end(name, slots=-(-(state.slot_limit() or 0) // before))
        if before and not state.members:
            state.recovers_until = state.time + _RECOVERY

    def _end(self, name: str, *, slots: int = 0) -> None:
        """End a member: its slots and its money are free, unless it may be using its fair share."""
        state = self.state
        member = state.members.pop(name)
        state.ended[name] = EndedMember(member.sequence, state.time, member.held, slots)
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
            return member, True
        quotas = len(state.terms.quotas)
        ended = state.ended.pop(request.member, None)
        lost = ended.lost if ended is not None and len(ended.lost) == quotas else [0.0] * quotas
        member = MemberState(
            sequence=request.sequence,
            until=state.time,
            seen=state.time,
            held=[0.0] * quotas,
            short=[0.0] * quotas,
            lost=list(lost),
        )
        state.members[request.member] = member
        if request.epoch and request.epoch != state.epoch:
            self._recover(request)
        return member, ended is None or request.sequence > ended.sequence

    def _recover(self, request: ExchangeRequest) -> None:
        """Take over what a member of an earlier epoch knows: the store has lost it."""
        state = self.state
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
        levels = {
            (quota.unit, quota.seconds): level for quota, level in zip(state.terms.quotas, state.levels, strict=True)
        }
        state.levels = [
            min(levels.get((quota.unit, quota.seconds), quota.amount), quota.amount) for quota in terms.quotas
        ]
        places = {(quota.unit, quota.seconds): number for number, quota in enumerate(state.terms.quotas)}
        state.terms = terms
        state.members.pop(request.member, None)
        for member in state.members.values():
            lost = [
                0.0
                if (place := places.get((quota.unit, quota.seconds))) is None
                else member.lost[place] + member.held[place]
                for quota in terms.quotas
            ]
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
        waits = grant_quotas(state, name, request.quotas)
        retries = [max(waits)] if any(wait > 0.0 for wait in waits) else []
        slots = None
        if request.slots is not None and state.slot_limit() is not None:
            slots = grant_slots(state, name, request.slots, may_grow=not retries)
        budget = None
        if request.budget is not None and state.terms.budget is not None:
            grant_money(state, name, state.terms.budget, request.budget)
            budget = budget_reply(state, name, state.terms.budget)
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
        )


def encode_ledger(ledger: AccountLedger) -> bytes:
    """Return a ledger as bytes, for a store."""
    return msgspec.msgpack.encode(ledger.state)


def decode_ledger(data: bytes) -> AccountLedger:
    """Return the ledger that a store has kept."""
    return AccountLedger(msgspec.msgpack.decode(data, type=LedgerState))
