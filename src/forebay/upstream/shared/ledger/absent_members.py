"""The members whose leases have ended because their store was away, and that have not come back. Pure.

While the store is away, each member goes on with its fair share of the account. What it has used of that is not known
before it comes back, so that much is not granted to those that come back earlier.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from typing import Final

from forebay.upstream.shared.ledger.ledger_state import EndedMember, LedgerState, MemberState
from forebay.upstream.shared.ledger.messages import LEASE_MARGIN, ExchangeRequest

_SILENCE: Final = 2.5  # seconds without any exchange after which the store was away: live members ask more often
_RECOVERY: Final = 2.0  # seconds in which members come back after their store was away: longer than between attempts
_UNNAMED: Final = "?"  # begins the names of members that are known by their number only


def notice_absence(state: LedgerState, silence: float) -> None:
    """Begin to expect members if nobody has asked for so long that the store was away."""
    if silence > _SILENCE and state.members:
        _expect(state)


def expect_unnamed(state: LedgerState, request: ExchangeRequest) -> None:
    """Expect all members of the earlier epoch that the opener of a ledger knew: its store has lost them."""
    if not request.members:
        return
    share = 1.0 / request.members
    for number in range(request.members):
        state.ended[f"{_UNNAMED}{number:06}"] = EndedMember(
            sequence=0,
            at=state.time,
            lost=[],
            until=state.time,
            share=share,
            slots=_slots(state, request.members),
            usd=_usd_left(state, request, share),
        )
    _expect(state)


def take_unnamed(state: LedgerState) -> EndedMember | None:
    """Return an expected member of an earlier epoch, since one is back; None if none is expected."""
    names = [name for name in state.ended if name.startswith(_UNNAMED)]
    return state.ended.pop(min(names)) if names else None


def absent_member(state: LedgerState, member: MemberState) -> EndedMember:
    """Return a member whose lease has ended, with what it may use if it is alive."""
    members = 1 if member.reply is None else member.reply.members
    return EndedMember(
        sequence=member.sequence,
        at=state.time,
        lost=member.held,
        until=member.until,
        share=1.0 / members,
        slots=_slots(state, members),
        usd=_unreported_usd(state, member),
    )


def absent_members(state: LedgerState) -> list[EndedMember]:
    """Return the members that may be alive, and have not reported what they have used since the store was away."""
    if state.time >= state.recovers_until:
        return []
    absences = list(state.ended.values())
    absences += [member.absence for member in state.members.values() if member.absence is not None]
    return [ended for ended in absences if ended.share > 0.0 and ended.at >= state.away_until]


def quota_of_the_absent(state: LedgerState, number: int) -> float:
    """Return what they may have used of a quota since their leases ended."""
    quota, used = state.quotas[number], 0.0
    for ended in absent_members(state):
        seconds = state.time - ended.until + LEASE_MARGIN
        used += min(1.0, seconds / quota.seconds) * ended.share * quota.amount
    return used


def _expect(state: LedgerState) -> None:
    state.away_until, state.recovers_until = state.time, state.time + _RECOVERY


def _slots(state: LedgerState, members: int) -> int:
    """Return the fair share of the slots, rounded up."""
    return -(-(state.slot_limit() or 0) // members)


def _unreported_usd(state: LedgerState, member: MemberState) -> float:
    """Return the dollars that a member may spend and not report: its lease, or its share if that is more."""
    budget = state.terms.budget
    if budget is None or member.reply is None or member.reply.budget is None:
        return 0.0
    known, left = member.reply.budget, budget.usd
    if known.period == state.period:
        left = max(0.0, budget.usd - known.spent - known.reserved)
    return member.usd_reserved + max(member.usd - member.usd_reserved, left / member.reply.members)


def _usd_left(state: LedgerState, request: ExchangeRequest, share: float) -> float:
    """Return a share of the dollars that the opener of a ledger knew to be left."""
    if state.terms.budget is None or request.budget is None:
        return 0.0
    spent = request.budget.known_spent if request.budget.period == state.period else 0.0
    return share * max(0.0, state.terms.budget.usd - spent)
