"""The budget of a ledger: dollars that are spent, and those that members hold. Pure.

Spent, held and free dollars are the whole budget at every moment. What a member holds is free again when its lease
ends; what it has spent meanwhile is still counted when it reports it.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from typing import Final

from forebay.upstream.shared.ledger.absent_members import absent_members
from forebay.upstream.shared.ledger.ledger_state import LedgerState, MemberState
from forebay.upstream.shared.ledger.messages import BudgetReply, BudgetRequest, BudgetTerms
from forebay.upstream.shared.ledger.periods import period_end, period_start

_CHUNK: Final = 0.01  # of the budget: what a member may hold beyond its need
_SHARE_OF_FREE: Final = 0.25  # of the free dollars, divided by the members: the same near the end of the budget
_EPSILON: Final = 1e-12  # relative
_RETRY: Final = 0.05  # seconds after which money may have come back that others hold, and do not use


def begin_period(state: LedgerState, budget: BudgetTerms, now: float) -> None:
    """Begin the period of `now`, in epoch seconds, if it is another one.

    If the clock goes back to an earlier period, what was spent goes with it, to what was spent there before.
    """
    start = period_start(budget.per, now)
    if start > state.period:
        state.previous_period, state.previous_spent = state.period, state.spent
        state.recovered = state.reported = state.alerted = 0.0
        for member in state.members.values():
            member.usd = member.usd_reserved = member.usd_short = 0.0
        for ended in state.ended.values():
            ended.usd = ended.share * budget.usd
    elif start < state.period:
        if start == state.previous_period:
            state.recovered += state.previous_spent
        state.previous_period, state.previous_spent = -1.0, 0.0
    state.period = start


def begin_with_log(state: LedgerState, asked: BudgetRequest) -> None:
    """Begin a new ledger with what the spend log of its first member has."""
    if asked.logged_period == state.period:
        state.recovered = asked.logged_spent


def recover_spend(state: LedgerState, asked: BudgetRequest) -> None:
    """Count what a member of an earlier epoch knows to have been spent: the store has lost it."""
    if asked.period == state.period:
        state.recovered = max(state.recovered, asked.known_spent)


def restore_spend(state: LedgerState, asked: BudgetRequest) -> None:
    """Count what a member knows to have been spent, and its store has forgotten: it has failed over to a late copy."""
    if asked.period == state.period:
        state.recovered += max(0.0, asked.known_spent - state.spent)


def report_spend(state: LedgerState, member: MemberState, asked: BudgetRequest) -> None:
    """Count what a member has spent, and take back what it does not want to hold any more."""
    if asked.period < state.period:  # it belongs to a period that is over
        member.usd = member.usd_reserved = 0.0
        return
    state.reported += asked.spent
    held = max(0.0, member.usd - asked.spent)
    member.usd_reserved = asked.reserved
    # Calls in flight cost their money, whatever the lease was.
    member.usd = max(asked.reserved, asked.kept(held))


def grant_money(state: LedgerState, name: str, budget: BudgetTerms, asked: BudgetRequest) -> None:
    """Grant a member what it needs, or nothing; then more, up to a chunk that others can do without."""
    member = state.members[name]
    free = budget.usd - state.spent - sum(other.usd for other in state.members.values())
    free -= sum(ended.usd for ended in absent_members(state))
    free_to_all = free - budget.reserved_share * budget.usd
    current = asked.period >= state.period or asked.period < 0.0
    needed, wanted = (asked.needed, asked.wanted) if current else (0.0, 0.0)
    member.usd_short = max(0.0, needed - member.usd)
    available = free if asked.important else free_to_all
    if member.usd_short > 0.0:
        ahead = sum(other.usd_short for other in state.others_before(name))
        if member.usd_short + ahead > available + _EPSILON * budget.usd:
            return
        member.usd += member.usd_short
        free_to_all -= member.usd_short
        member.usd_short = 0.0
    waiting = sum(other.usd_short for other in state.others(name) if other.wishes(state.time))
    chunk = min(_CHUNK * budget.usd, _SHARE_OF_FREE * (free_to_all - waiting) / len(state.members))
    # Beyond what its calls need: up to a chunk.
    member.usd += max(0.0, min(wanted - member.usd, chunk - (member.usd - max(member.usd_reserved, needed))))


def take_alert(state: LedgerState, budget: BudgetTerms, asked: BudgetRequest) -> float:
    """Return the share of the budget for which a member is to give an alert, which no other gives then; 0 for none.

    One is due once a period for the share that the member asks for, and once for all of it; of both, only the latter.
    """
    if state.period in (asked.period, asked.logged_period):
        state.alerted = max(state.alerted, asked.alerted)
    least, due = budget.usd * (1.0 - _EPSILON), 0.0
    if state.spent >= least or (asked.exhausted and asked.period == state.period):
        due = 1.0
    elif state.spent >= asked.alert * least:
        due = asked.alert
    if due <= state.alerted:
        return 0.0
    state.alerted = due
    return due


def budget_reply(state: LedgerState, name: str, budget: BudgetTerms, asked: BudgetRequest) -> BudgetReply:
    """Return the state of the budget for a member."""
    end = period_end(budget.per, state.period)
    return BudgetReply(
        period=state.period,
        ends_in=None if end is None else end - state.clock,
        held=state.members[name].usd,
        spent=state.spent,
        reserved=sum(member.usd_reserved for member in state.members.values()),
        recall=any(other.usd_short > 0.0 and other.wishes(state.time) for other in state.others(name)),
        alert=take_alert(state, budget, asked),
        alerted=state.alerted,
    )


def money_retry(member: MemberState) -> float | None:
    """Return the seconds after which a member may get the money that it needs; None if it has it."""
    return _RETRY if member.usd_short > 0.0 else None
